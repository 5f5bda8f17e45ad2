"""Core attention modules that a Megatron-core `SelfAttention` calls: DashAttention and full attention.

Both take what `SelfAttention` hands over: query [N, B, Hq, D], key and value [N, B, Hkv, D] after RoPE, and
`packed_seq_params` whose `cu_seqlens_q` marks packed documents (B == 1). Both return [N, B, Hq * D]. Heads are
those of this tensor-parallel rank.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dash_megatron.config import AttentionConfig
from dash_megatron.ops import dash_attention


class RoutingMeans(NamedTuple):
    """What one layer's router selected in its last forward pass, averaged over tokens and kv heads."""

    density: Tensor
    """Float32 scalar: selected over causally available chunks."""
    chunks_selected: Tensor
    """Float32 scalar: selected chunks per token, the token's own chunk included."""


class _CoreAttention(MegatronModule):
    """What both kinds share: the arguments of Megatron's builder, recomputation and the layout of tensors."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        attention: AttentionConfig,
        recompute: bool = False,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"attn_mask_type={attn_mask_type}, attention_type={attention_type!r}: only causal self"
            )
        if softmax_scale is not None and softmax_scale != config.kv_channels**-0.5:
            raise ValueError(
                f"softmax_scale={softmax_scale} must be 1/sqrt(head_dim)={config.kv_channels**-0.5}"
            )
        self.layer_number = layer_number
        self.attention = attention
        self.recompute = recompute
        self.tensor_parallel_size = pg_collection.tp.size() if pg_collection is not None else 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend; see the module's docstring for shapes."""
        assert attention_mask is None, "masks come from causality and packed_seq_params"
        assert attention_bias is None, "attention takes no bias"
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if self.recompute and self.training and torch.is_grad_enabled():
            out = checkpoint(self._attend, q, k, v, packed_seq_params, use_reentrant=False)
        else:
            out = self._attend(q, k, v, packed_seq_params)
        return out.transpose(0, 1).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams | None) -> Tensor:
        raise NotImplementedError


class DashCoreAttention(_CoreAttention):
    """DashAttention (arXiv 2605.18753) as Megatron core attention.

    Owns the summary query, [kv heads of this rank, D], zero at initialisation, so that a chunk's summary starts as
    its mean key. It is marked as sharded by kv head over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        kv_heads = config.num_query_groups // self.tensor_parallel_size
        self.summary_query = torch.nn.Parameter(
            torch.zeros(kv_heads, config.kv_channels, dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.summary_query, True, 0, 1)
        self.routing: RoutingMeans | None = None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams | None) -> Tensor:
        attention = self.attention
        out, routing = dash_attention(
            q,
            k,
            v,
            self.summary_query,
            chunk_size=attention.chunk_size,
            scaling_factor=attention.scaling_factor,
            sigma=attention.sigma,
            estimate_diagonal=attention.estimate_diagonal,
            alpha=attention.alpha,
            cu_seqlens=None if packed is None else packed.cu_seqlens_q,
            backend=attention.backend,
            return_routing=True,
        )
        self.routing = RoutingMeans(
            density=routing.density.detach().float(),
            chunks_selected=routing.chunks_selected.float().mean(),
        )
        return out


class FullCoreAttention(_CoreAttention):
    """Causal softmax attention through torch: cuDNN or flash attention on CUDA, the CPU kernel elsewhere."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams | None) -> Tensor:
        if packed is None or len(packed.cu_seqlens_q) == 2:
            return _causal_attention(q, k, v)
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            return _packed_flash_attention(q, k, v, packed)
        # a few large documents per sequence: one call each
        lengths = packed.cu_seqlens_q.diff().tolist()
        documents = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([_causal_attention(*document) for document in documents], dim=1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, D] in and out."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _packed_flash_attention(q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams) -> Tensor:
    """Causal attention inside each document, [1, N, H, D] in and out, one launch for all documents."""
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    # not every torch that has this kernel takes fewer kv heads, so they are repeated; a view until it is copied
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    causal = _causal_argument(varlen_attn)
    out: Any = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, **causal)
    return out.unsqueeze(0)


def _causal_argument(varlen_attn: Any) -> dict[str, Any]:
    """How this torch spells causal: the first releases had a flag, later ones have a window."""
    parameters = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
