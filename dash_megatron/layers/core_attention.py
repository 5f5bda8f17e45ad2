"""Core attention modules that a Megatron-core `SelfAttention` calls: DashAttention and full attention.

Every kind takes what `SelfAttention` hands over: query [N, B, Hq, D], key and value [N, B, Hkv, D] after RoPE, and
`packed_seq_params`, whose `cu_seqlens_q` says where packed documents start (then B == 1). It returns [N, B, Hq * D]. Heads
are those of this tensor-parallel rank. Under context parallelism N counts this rank's tokens, and
`packed_seq_params.context` says which they are; ranks then exchange heads (`a2a`) or keys (DashAttention only). A kind
with weights of heads takes those of the heads that it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dash_megatron.config import AttentionConfig
from dash_megatron.layers.router_projections import split_routing
from dash_megatron.ops.attention import attention_and_routing
from dash_megatron.ops.full import causal_attention, packed_attention
from dash_megatron.ops.reference import upcast
from dash_megatron.ops.types import Router, Routing
from dash_megatron.parallel.context.attention import BackwardStart, sharded_dash_attention
from dash_megatron.parallel.context.communication import ContextGroup
from dash_megatron.parallel.context.heads import heads_for_rows, rows_for_heads
from dash_megatron.parallel.context.layout import ChunkLayout, ContextShard

Observer = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], None]
"""Takes what attention routes with: q [B, N, Hq, D] and k [B, N, Hkv, D] after RoPE, summary_query [Hkv, D], cu_seqlens or None, and
routing_q and routing_k [B, N, Hkv, D], the router's own queries and keys, or None both."""

# Learned factors on routing scores stay within exp of this, either way.
MAX_LOG_FACTOR = 10 / 3


@dataclass
class PackedDocuments(PackedSeqParams):
    """Where packed documents start, how long the longest is and, under context parallelism, which tokens are here."""

    context: ContextShard | None = None
    """This rank's tokens of a sequence that several ranks share; the fields of Megatron's class are those of all."""


class RoutingMeans(NamedTuple):
    """What one layer selected in its last forward pass, averaged over tokens and kv heads."""

    chunks_available: Tensor
    """Float32 scalar: causally available chunks, the token's own chunk included."""
    chunks_selected: Tensor
    """Float32 scalar: selected chunks, the token's own chunk included."""

    @classmethod
    def of(cls, routing: Routing) -> RoutingMeans:
        """The means of what an attention call returned."""
        return cls(routing.chunks_available, routing.chunks_selected.float().mean())


class CoreAttention(MegatronModule):
    """What all kinds of attention share: Megatron's arguments, recomputation, and the exchange of heads.

    A kind has `_attend_here`, for whole sequences.

    Args:
        config, layer_number, attn_mask_type, attention_type, cp_comm_type, softmax_scale, pg_collection: Megatron's; layers
            are counted from 1.
        attention: the run's `attention` section.
        context_comm: what context-parallel ranks exchange, `parallel.context_comm`.
        recompute: compute attention again in the backward instead of keeping what it needs.
    """

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
        context_comm: str = "all_gather",
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
        self.scaling_factor = attention.layer_scaling_factor(layer_number - 1)
        self.recompute = recompute
        self.tensor_parallel_size = pg_collection.tp.size() if pg_collection is not None else 1
        self.context_comm = context_comm
        self.context_group: ContextGroup | None = None
        if pg_collection is not None and pg_collection.cp.size() > 1:
            self.context_group = ContextGroup(pg_collection.cp)
        self.backward_start = BackwardStart()
        """For what is computed from the output of the last forward pass."""
        self.routing: RoutingMeans | None = None
        """What the last forward pass selected; None before it, and for full attention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> Tensor:
        """Attend; the module's docstring has the shapes."""
        assert attention_mask is None, "masks come from causality and packed_seq_params"
        assert attention_bias is None, "attention takes no bias"
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        attend = self._attend_here
        if self.context_group is not None:
            self.context_group.counts = self.training
            attend = self._attend_heads if self.context_comm == "a2a" else self._attend_shards
        if self.recompute and self.training and torch.is_grad_enabled():
            out = checkpoint(attend, q, k, v, packed_seq_params, use_reentrant=False)
        else:
            out = attend(q, k, v, packed_seq_params)
        return out.transpose(0, 1).flatten(2)

    def _attend_here(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        """Attend within whole sequences.

        Args:
            q: [B, N, heads, D], all tokens of some of this tensor-parallel rank's heads: all of them, or those that the
                exchange of heads gave to this context-parallel rank.
            k, v: [B, N, key/value heads, D].
            packed: where documents start; None: one document a row.

        Returns:
            [B, N, heads, D].
        """
        raise NotImplementedError

    def _attend_heads(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        """Exchange all heads of some tokens for all tokens of some heads, attend, and exchange them back."""
        assert self.context_group is not None
        # not by an index, whose gradient is a copy between zeros
        q, k, v = heads_for_rows(self.context_group, *(x.squeeze(0) for x in (q, k, v)))
        out = self._attend_here(q[None], k[None], v[None], packed)
        return rows_for_heads(self.context_group, out.squeeze(0))[None]

    def _attend_shards(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        """Attend with the tokens that are here to keys of other ranks too; the config refuses it but for DashAttention."""
        raise NotImplementedError


def router_of(attention: AttentionConfig, scaling_factor: float | Tensor) -> Router:
    """The router that a config describes, for a layer with this scaling factor."""
    return Router(
        chunk_size=attention.chunk_size,
        scaling_factor=scaling_factor,
        sigma=attention.sigma,
        estimate_diagonal=attention.estimate_diagonal,
        alpha=attention.alpha,
        local_chunks=attention.local_chunks,
        query_pool=attention.query_pool,
        pool_heads=attention.pool_heads,
    )


class DashCoreAttention(CoreAttention):
    """DashAttention (arXiv 2605.18753) as Megatron core attention.

    Owns the summary query, [kv heads of this rank, D], zero at initialisation, so that a chunk's summary starts as
    its mean key; with `attention.learned_scaling` also the logarithm of a factor on routing scores over that
    number, [kv heads of this rank], zero too. Both are marked as sharded by kv head over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        kv_heads = config.num_query_groups // self.tensor_parallel_size
        self.summary_query = torch.nn.Parameter(
            torch.zeros(kv_heads, config.kv_channels, dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.summary_query, True, 0, 1)
        self.log_scaling: torch.nn.Parameter | None = None
        if self.attention.learned_scaling:
            self.log_scaling = torch.nn.Parameter(torch.zeros(kv_heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.log_scaling, True, 0, 1)
        self.observer: Observer | None = None
        """While set, every forward pass calls it."""

    @property
    def router(self) -> Router:
        """What the next forward pass routes with; its scaling factor is a tensor where factors are learned."""
        if self.log_scaling is None:
            return router_of(self.attention, self.scaling_factor)
        # in half precision, neighbouring factors would be a percent apart
        learned = (self.attention.learned_scaling * upcast(self.log_scaling)[0]).exp()
        return router_of(self.attention, self.scaling_factor * learned)

    def split(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Attention's queries and keys, and those of the router or None, from what a layer hands over, [..., heads, D]."""
        return split_routing(q, k) if self.attention.router_projections else (q, k, None, None)

    def _attend_here(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        q, k, routing_q, routing_k = self.split(q, k)
        summary_query: Tensor = self.summary_query
        router = self.router
        if k.shape[2] < len(summary_query):
            # the heads that this context rank was given
            assert self.context_group is not None
            first = self.context_group.rank * k.shape[2]
            heads = slice(first, first + k.shape[2])
            summary_query, router = summary_query[heads], router.of_heads(heads)
        cu_seqlens, longest = (None, None) if packed is None else (packed.cu_seqlens_q, packed.max_seqlen_q)
        if self.observer is not None:
            self.observer(q, k, summary_query, cu_seqlens, routing_q, routing_k)
        out, routing = attention_and_routing(
            q, k, v, summary_query, router, cu_seqlens, self.attention.backend, longest, routing_q, routing_k
        )
        self.routing = RoutingMeans.of(routing)
        return out

    def _attend_shards(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        assert self.context_group is not None
        shard = packed and packed.context
        assert shard is not None, "the batch was sharded"
        assert shard.chunks is not None, "by chunks"
        q, k, routing_q, routing_k = self.split(q.squeeze(0), k.squeeze(0))
        out, selected = sharded_dash_attention(
            q,
            k,
            v.squeeze(0),
            self.summary_query,
            self.router,
            shard.chunks,
            self.context_group,
            exchange=self.context_comm,
            backend=self.attention.backend,
            routing_q=routing_q,
            routing_k=routing_k,
            # where the backward computes attention again, it gathers anew
            start=self.backward_start if torch.is_grad_enabled() and not self.recompute else None,
        )
        self.routing = _shard_means(selected, shard.chunks, shard.rows)
        return out[None]


def _shard_means(selected: Tensor, layout: ChunkLayout, num_rows: int) -> RoutingMeans:
    """Means over the aligned rows of a rank, so weighted that the mean over ranks is the mean over all tokens.

    Args:
        selected: chunks selected for each aligned row, int32 [n, Hkv].
        layout: where the chunks of the aligned rows lie.
        num_rows: this rank's tokens before they were aligned, as many on every rank.
    """
    queries = layout.queries
    row = torch.arange(len(selected), dtype=queries.start.dtype, device=queries.start.device)
    chunk = torch.searchsorted(queries.start, row, right=True) - 1
    available = (queries.number - queries.first + 1)[chunk]
    weight = len(selected) / num_rows
    return RoutingMeans(
        chunks_available=available.float().mean() * weight,
        chunks_selected=selected.float().mean() * weight,
    )


class FullCoreAttention(CoreAttention):
    """Causal softmax attention, by the fastest implementation that is here."""

    def _attend_here(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        if packed is None:
            return causal_attention(q, k, v)
        documents, longest = len(packed.cu_seqlens_q) - 1, packed.max_seqlen_q
        if documents == 1 or documents * longest == q.shape[1]:
            # as none is longer, all are as long: whole rows
            rows = (x[0].unflatten(0, (documents, -1)) for x in (q, k, v))
            return causal_attention(*rows).flatten(0, 1)[None]
        return packed_attention(q[0], k[0], v[0], packed.cu_seqlens_q, longest)[None]
