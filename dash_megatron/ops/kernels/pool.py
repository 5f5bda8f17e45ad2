"""Causal means of the queries of each document, for the router, and their transpose, for its gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.chunk_grid import document_positions
from dash_megatron.ops.tensor_cache import cached

BLOCK_TOKENS, BLOCK_COLUMNS = 32, 128


@triton.jit
def _pool_kernel(
    x, base, position, out, stride_xn, stride_xh, num_tokens,
    POOL: tl.constexpr, H: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of some rows of the mean over up to POOL rows or, if TRANSPOSED, of the sum of what they are parts of."""
    o_n, o_x = (
        tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.program_id(1) * BLOCK + tl.arange(0, BLOCK),
    )
    m_x = (o_x < H * D)[None, :]
    p_x = x + (o_x // D * stride_xh + o_x % D)[None, :]
    b_sum = tl.zeros([BLOCK_N, BLOCK], tl.float32)
    b_position = tl.load(position + o_n, mask=o_n < num_tokens, other=-1)
    # rows are read again for each of their sums: they lie in the first-level cache
    for i in range(POOL):
        if TRANSPOSED:
            o_row = o_n + i
            b_position = tl.load(position + o_row, mask=o_row < num_tokens, other=-1)
        else:
            o_row = o_n - i
        m_row = b_position >= i
        b_x = tl.load(p_x + o_row.to(tl.int64)[:, None] * stride_xn, mask=m_row[:, None] & m_x, other=0.0)
        if TRANSPOSED:
            b_sum += (
                b_x.to(tl.float32) / tl.minimum(tl.maximum(b_position, 0) + 1, POOL).to(tl.float32)[:, None]
            )
        else:
            b_sum += b_x.to(tl.float32)
    if not TRANSPOSED:
        b_sum /= tl.minimum(tl.maximum(b_position, 0) + 1, POOL).to(tl.float32)[:, None]
    o_out = o_n.to(tl.int64)[:, None] * (H * D) + o_x[None, :]
    m_out = (o_n < num_tokens)[:, None] & m_x
    if base is not None:
        b_sum += tl.load(base + o_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(out + o_out, b_sum.to(out.dtype.element_ty), mask=m_out)


def positions(num_tokens: int, batch: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Place of every token in its document, int32 [tokens of all batch rows]; the arguments are those of `pool_queries`."""
    return cached(
        cu_seqlens,
        ("positions", num_tokens, batch),
        lambda: document_positions(num_tokens, cu_seqlens, device).int().repeat(batch),
    )


def pool_rows(
    x: Tensor, position: Tensor, query_pool: int, transposed: bool = False, base: Tensor | None = None
) -> Tensor:
    """What `pool` does, for rows x [tokens, H, D] with dense D and their `positions`; added to `base`, dense, if given."""
    N, H, D = x.shape
    out = torch.empty(N, H, D, dtype=x.dtype, device=x.device)
    _pool_kernel[(triton.cdiv(N, BLOCK_TOKENS), triton.cdiv(H * D, BLOCK_COLUMNS))](
        x, base, position, out, *x.stride()[:2], N,
        POOL=query_pool, H=H, D=D, TRANSPOSED=transposed, BLOCK_N=BLOCK_TOKENS, BLOCK=BLOCK_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("dash_megatron::pool_queries", mutates_args=())
def pool(q: Tensor, position: Tensor, query_pool: int, transposed: bool) -> Tensor:
    """What `pool_queries` returns for q [B, N, H, D] and positions [N] or, if `transposed`, its gradient from that of the means."""
    rows = q.flatten(0, 1)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    places = position.to(torch.int32).repeat(q.shape[0])
    return pool_rows(rows, places, query_pool, transposed).view(q.shape)


@pool.register_fake
def _pool_fake(q, position, query_pool, transposed):
    return q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, position, *ctx.settings = inputs
    ctx.save_for_backward(position)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    query_pool, transposed = ctx.settings
    return pool(d_out, ctx.saved_tensors[0], query_pool, not transposed), None, None, None


pool.register_autograd(_backward, setup_context=_setup_context)
