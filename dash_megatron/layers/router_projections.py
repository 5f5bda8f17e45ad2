"""Megatron's self-attention with projections for the router: a routing query and a routing key for each kv head and token.

Their rows stand in the fused matrix of queries, keys and values, behind the queries and behind the key of their group, so that
what is split, gathered, biased, normed or rotated with these is so with them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dash_megatron.layers.self_attention import SelfAttention


def qkv_and_routing(
    hidden_size: int, qkv_size: int, *, config: TransformerConfig, **kwargs: Any
) -> ColumnParallelLinear:
    """The fused projection, of so many rows for queries, keys and values, with those for the router."""
    assert config.num_query_groups is not None
    assert config.kv_channels is not None
    routing_size = 2 * config.num_query_groups * config.kv_channels
    return ColumnParallelLinear(hidden_size, qkv_size + routing_size, config=config, **kwargs)


class RoutedSelfAttention(SelfAttention):
    """Self-attention whose `linear_qkv` is `qkv_and_routing`; `split_routing` takes apart what core attention is handed.

    Each group has one more query head, and two keys.
    """

    keys_per_group = 2


def split_routing(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [..., Hq, D] and keys [..., Hkv, D], and the router's, [..., Hkv, D] each, of what `RoutedSelfAttention` made."""
    k = k.unflatten(-2, (-1, 2))
    q = q.unflatten(-2, (k.shape[-3], -1))
    # as a view it would keep the memory of all queries, of which the first are copied here
    return q[..., :-1, :].flatten(-3, -2), k[..., 0, :], q[..., -1, :].contiguous(), k[..., 1, :]


def add_routing_rows(qkv: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """The rows of `qkv_and_routing` from those of a fused projection without, a matrix or a bias, in float32.

    A routing key is the key and a routing query the mean of its group's queries: what a router with `pool_heads` sees.
    """
    heads = qkv.float().unflatten(0, (kv_heads, -1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2, 1, 1], dim=1)
    return torch.cat([q, q.mean(1, keepdim=True), k, k, v], dim=1).flatten(0, 2)
