"""The router's queries in decoding: means of new queries and of those that a cache keeps, where the new ones go too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import next_power_of_two

BLOCK_COLUMNS = 128


@triton.jit
def _pool_kernel(
    q, queries, pooled, lengths, cu_seqlens, token_sequence, active, stride_qn, stride_qh,
    POOL: tl.constexpr, KEPT: tl.constexpr, HQ: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK: tl.constexpr, MEAN: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Some columns of one new token: store its mean over the last POOL queries if MEAN, keep its own query if KEEP."""
    COLUMNS: tl.constexpr = HQ * D
    i_t = tl.program_id(0)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < COLUMNS
    o_q = o_x // D * stride_qh + o_x % D
    i_b, first, last = i_t, i_t, i_t + 1
    if token_sequence is not None:
        i_b = tl.load(token_sequence + i_t)
        first, last = tl.load(cu_seqlens + i_b), tl.load(cu_seqlens + i_b + 1)
    start = tl.load(lengths + i_b)
    position, end = start + i_t - first, start + last - first
    b_own = tl.load(q + i_t.to(tl.int64) * stride_qn + o_q, mask=m_x, other=0.0)
    b_mean, added = b_own.to(tl.float32), True
    if active is not None:
        added = tl.load(active + i_b) != 0
    queries += i_b.to(tl.int64) * (KEPT * COLUMNS)
    if MEAN:
        if added:
            # place in the document of the queries that are summed
            o_p = position - tl.arange(0, BLOCK_J)
            m_p = (tl.arange(0, BLOCK_J) < POOL) & (o_p >= 0)
            p_new = q + (first + o_p - start).to(tl.int64)[:, None] * stride_qn + o_q[None, :]
            b_new = tl.load(p_new, mask=(m_p & (o_p >= start))[:, None] & m_x[None, :], other=0.0)
            p_old = queries + (o_p % KEPT)[:, None] * COLUMNS + o_x[None, :]
            b_old = tl.load(p_old, mask=(m_p & (o_p < start))[:, None] & m_x[None, :], other=0.0)
            b_sum = tl.sum(b_new.to(tl.float32) + b_old.to(tl.float32), 0)
            b_mean = b_sum / tl.minimum(position + 1, POOL).to(tl.float32)
        tl.store(pooled + i_t.to(tl.int64) * COLUMNS + o_x, b_mean.to(pooled.dtype.element_ty), mask=m_x)
    if KEEP:
        # of a long prompt the last queries stay
        tl.store(
            queries + position % KEPT * COLUMNS + o_x, b_own, mask=m_x & added & (position >= end - KEPT)
        )


def _launch(
    q: Tensor, queries: Tensor, pooled: Tensor | None, lengths: Tensor, cu_seqlens: Tensor | None, sequence: Tensor | None,
    active: Tensor | None, query_pool: int, MEAN: bool, KEEP: bool,
) -> None:  # fmt: skip
    tokens, heads, D = q.shape
    _pool_kernel[(tokens, triton.cdiv(heads * D, BLOCK_COLUMNS))](
        q, queries, pooled, lengths, cu_seqlens, sequence, active, *q.stride()[:2],
        POOL=query_pool, KEPT=queries.shape[1], HQ=heads, D=D, BLOCK_J=next_power_of_two(query_pool),
        BLOCK=BLOCK_COLUMNS, MEAN=MEAN, KEEP=KEEP, num_warps=4,
    )  # fmt: skip


def _sequences(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each token's sequence, int32 [tokens]."""
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], token, right=True, out_int32=True)


def keep(x: Tensor, kept: Tensor, lengths: Tensor, cu_seqlens: Tensor) -> None:
    """Put the newest rows of new tokens, x [tokens, heads, D] with dense D, into a ring of a `DashCache`; `lengths` are those before."""
    _launch(x, kept, None, lengths, cu_seqlens, _sequences(cu_seqlens, len(x)), None, 1, False, True)


@torch.library.custom_op("dash_megatron::dash_pool_and_keep", mutates_args=("queries",))
def pool_and_keep(
    q: Tensor,
    queries: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None,
    active: Tensor | None,
    query_pool: int,
) -> Tensor:
    """The router's queries [tokens, Hq, D] of new tokens, before `cache_write` moves the lengths on.

    Args:
        q: their queries [tokens, Hq, D], one token a sequence or those between `cu_seqlens`.
        queries: of a `DashCache`, [B, R, Hq, D].
        lengths, cu_seqlens, active: as in `cache_write`.
        query_pool: over how many; at most R.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    pooled = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sequence = None if cu_seqlens is None else _sequences(cu_seqlens, len(q))
    tensors = q, queries, pooled, lengths, cu_seqlens, sequence, active, query_pool
    # the slot that a single token takes held a query that its mean does not need
    for means, keeps in [(True, True)] if sequence is None else [(True, False), (False, True)]:
        _launch(*tensors, means, keeps)
    return pooled


@pool_and_keep.register_fake
def _pool_and_keep_fake(q, *_):
    return q.new_empty(q.shape)
