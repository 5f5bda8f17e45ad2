"""Means of a rank's last queries where some of them lie on another rank: what the router of a shared sequence sees."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_megatron.ops.pooling import pool_queries
from dash_megatron.parallel.context.communication import ContextGroup, differentiable_transfer
from dash_megatron.parallel.context.layout import QueryHalo


def routing_queries(
    q: Tensor, query_pool: int, halo: QueryHalo, group: ContextGroup, backend: str = "auto"
) -> Tensor:
    """What `pool_queries` gives for this rank's part of a packed sequence, differentiable; collective.

    Args:
        q: this rank's aligned queries [n, heads, D].
        query_pool: how many queries a mean is of.
        halo: which queries of other pieces are needed.
        group: the ranks that share the sequence.
        backend: as in `dash_attention`.

    Returns:
        [n, heads, D] in q's dtype.
    """

    def borrow(rows: Sequence[Tensor]) -> list[Tensor]:
        (x,) = rows
        received = group.all_to_all(x[halo.send], halo.send_counts, halo.receive_counts).wait()
        return [x.view_as(x), received]

    def give_back(gradients: Sequence[Tensor]) -> list[Tensor]:
        own, gradient = gradients
        returned = group.all_to_all(gradient, halo.receive_counts, halo.send_counts).wait()
        # a row that several pieces need has a gradient from each
        return [own.index_add(0, halo.send, returned)]

    before_one, one, before_other, other = halo.sizes
    # not by slices and indices, whose gradients are copies between zeros
    q, borrowed = differentiable_transfer([q], borrow, give_back, group)
    first, second = borrowed[halo.order].split([before_one, before_other])
    own_one, own_other = q.split([one, other])
    rows = torch.cat([first, own_one, second, own_other])
    pooled = pool_queries(rows[None], query_pool, position_N=halo.position, backend=backend).squeeze(0)
    _, first, _, second = pooled.split([before_one, one, before_other, other])
    return torch.cat([first, second])
