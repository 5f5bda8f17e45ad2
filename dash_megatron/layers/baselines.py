"""The top-k baselines as Megatron-core attention: InfLLM v2 and Native Sparse Attention.

Shapes are those of `core_attention.py`. NSA under context parallelism is refused when the config is read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dash_megatron.layers.core_attention import CoreAttention, PackedDocuments, RoutingMeans
from dash_megatron.ops.topk.infllmv2 import infllmv2_attention
from dash_megatron.ops.topk.nsa import Compression, nsa_attention

# Parameters below that start at zero, so that a compressed key or value is the mean of its kernel and every gate 1/2.
ZERO_INITIALIZED = ("key_pool", "value_pool", "key_mlp_out", "value_mlp_out", "gate_weight", "gate_bias")


class InfLLMv2CoreAttention(CoreAttention):
    """InfLLM v2 (arXiv 2506.07900, 2509.24663) as Megatron core attention; it has no parameters."""

    def _attend_here(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        out, routing = infllmv2_attention(
            q,
            k,
            v,
            self.attention.infllmv2.selection(),
            chunk_size=self.attention.chunk_size,
            cu_seqlens=None if packed is None else packed.cu_seqlens_q,
            backend=self.attention.backend,
        )
        self.routing = RoutingMeans.of(routing)
        return out


class NSACoreAttention(CoreAttention):
    """Native Sparse Attention (arXiv 2502.11089) as Megatron core attention.

    Owns the weights that compress keys and values, for every kv head, and those of the gates, for every query head. A gate
    is the sigmoid of a linear function of the head's query, because core attention sees nothing else of the token.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        heads = config.num_attention_heads // self.tensor_parallel_size
        kv_heads, D = config.num_query_groups // self.tensor_parallel_size, config.kv_channels
        kernel = (kv_heads, self.attention.nsa.kernel_size, D)

        def weight(*shape: int) -> torch.nn.Parameter:
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
            # by heads
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            return parameter

        self.key_pool, self.value_pool = weight(*kernel), weight(*kernel)
        self.key_mlp_in, self.value_mlp_in = weight(kv_heads, D, D), weight(kv_heads, D, D)
        self.key_mlp_out, self.value_mlp_out = weight(kv_heads, D, D), weight(kv_heads, D, D)
        self.gate_weight = weight(heads, 3, D)
        # one dimension, like other weights that do not decay
        self.gate_bias = weight(heads * 3)

    def _attend_here(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments | None) -> Tensor:
        # to eight columns, which matrix products of a GPU need to be fast
        weight = F.pad(self.gate_weight.to(q.dtype), (0, 0, 0, 5))
        scores = torch.einsum("bnhd,hkd->bnhk", q, weight)[..., :3]
        gates = torch.sigmoid(scores.float() + self.gate_bias.view(-1, 3)).to(q.dtype)
        out, routing = nsa_attention(
            q,
            k,
            v,
            gates,
            Compression(self.key_pool, self.key_mlp_in, self.key_mlp_out),
            Compression(self.value_pool, self.value_mlp_in, self.value_mlp_out),
            self.attention.nsa.selection(),
            window=self.attention.nsa.window,
            chunk_size=self.attention.chunk_size,
            cu_seqlens=None if packed is None else packed.cu_seqlens_q,
            backend=self.attention.backend,
        )
        self.routing = RoutingMeans.of(routing)
        return out
