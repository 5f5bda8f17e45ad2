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
        return [group.all_to_all(x[halo.send], halo.send_counts, halo.receive_counts).wait() for x in rows]

    def give_back(gradients: Sequence[Tensor]) -> list[Tensor]:
        (gradient,) = gradients
        returned = group.all_to_all(gradient, halo.receive_counts, halo.send_counts).wait()
        # a row that several pieces need has a gradient from each
        return [gradient.new_zeros(q.shape).index_add_(0, halo.send, returned)]

    before_one, one, before_other, other = halo.sizes
    borrowed = differentiable_transfer([q], borrow, give_back, group)[0][halo.order]
    first, second = borrowed.split([before_one, before_other])
    rows = torch.cat([first, q[:one], second, q[one:]])
    pooled = pool_queries(rows[None], query_pool, position_N=halo.position, backend=backend)[0]
    _, first, _, second = pooled.split([before_one, one, before_other, other])
    return torch.cat([first, second])
