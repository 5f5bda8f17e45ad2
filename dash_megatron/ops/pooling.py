"""The router's queries: causal means of a document's queries, so that neighbouring tokens select much the same chunks."""

import torch
from torch import Tensor

from dash_megatron.ops.backend import pick_backend
from dash_megatron.ops.checks import check_query_pool
from dash_megatron.ops.chunk_grid import document_positions


def pool_queries(
    q_BNHD: Tensor,
    query_pool: int,
    cu_seqlens: Tensor | None = None,
    position_N: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean of each token's query and of the `query_pool` - 1 before it in its document, as many as there are; differentiable.

    Where a document is shared by context-parallel ranks, a rank calls this on its rows with `query_pool` - 1 rows of its
    neighbours in front of each contiguous piece, gives those rows position 0 and the others their position in the document,
    and drops the first rows of the result again.

    Args:
        q_BNHD: queries after RoPE [B, N, H, D], any strides.
        query_pool: from 1 to 128; 1 gives back `q_BNHD` itself.
        cu_seqlens: boundaries of packed documents, int32 [documents + 1] (then B == 1), or None for one a batch row.
        position_N: integers [N], instead of `cu_seqlens`: how many of the rows just before a row are of its document and
            present. The mean is over min(query_pool, position + 1) rows.
        backend: as in `dash_attention`.

    Returns:
        [B, N, H, D] in q's dtype, summed in float32 (float64 if q is) and rounded once.

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    check_query_pool(query_pool)
    if query_pool == 1:
        return q_BNHD
    if position_N is None:
        position_N = document_positions(q_BNHD.shape[1], cu_seqlens, q_BNHD.device)
    if pick_backend(backend, q_BNHD) == "triton":
        from dash_megatron.ops.kernels.pool import pool

        return pool(q_BNHD, position_N, query_pool, False)
    return pool_queries_reference(q_BNHD, position_N, query_pool)


def pool_queries_reference(q_BNHD: Tensor, position_N: Tensor, query_pool: int) -> Tensor:
    """What `pool_queries` returns, in plain torch."""
    q = q_BNHD if q_BNHD.dtype == torch.float64 else q_BNHD.float()
    total = q
    for back in range(1, min(query_pool, q.shape[1])):
        # of a row that has no such predecessor in its document, nothing is added
        has_N11 = (position_N >= back)[:, None, None]
        total = total + torch.where(has_N11, q.roll(back, dims=1), 0)
    count_N11 = (position_N + 1).clamp_max(query_pool)[:, None, None]
    return (total / count_N11).to(q_BNHD.dtype)
