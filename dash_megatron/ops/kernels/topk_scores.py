"""Scores of chunks from pooled keys on the GPU, and the chunks that they select.

Scores of single pooled keys stay on chip: one pass over them finds every row's log-sum-exp, a second computes them again
chunk by chunk. Neither looks beyond a row's past or document.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.configs import plan
from dash_megatron.ops.kernels.geometry import check_supported, size_tiles
from dash_megatron.ops.kernels.tiles import LOG2_E, load_rows
from dash_megatron.ops.topk.grid import Block, Grid, top_chunks
from dash_megatron.topk_selection import Selection

# Scores of one piece, in units of those of `Grid.blocks`: `top_chunks` keeps int64 copies of them.
SCORE_COST = 4


@triton.jit
def _log_sum_exp(
    b_q, pooled, stride_pj, first, end, b_end, scale, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """In base 2, over the pooled keys first <= j < b_end[row] <= end; 0 for rows that see none."""
    b_sum = tl.zeros([ROWS], tl.float32)
    # finite, so that a row that sees nothing yet makes no NaN
    b_max = b_sum - 1e30
    for i_j in range(first, end, BLOCK):
        o_j = i_j + tl.arange(0, BLOCK)
        b_k = load_rows(pooled, o_j, stride_pj, o_j < end, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where(o_j[None, :] < b_end[:, None], b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_next) + tl.sum(tl.exp2(b_s - b_next[:, None]), 1)
        b_max = b_next
    return tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)


@triton.jit(do_not_specialize=["start_chunk", "first_chunk", "num_chunks", "tiles_per_head"])
def _score_chunks_kernel(
    q, pooled, scores, chunk_first, stride_qn, stride_qh, stride_pj, stride_ph, scale,
    start_chunk, first_chunk, num_chunks, tiles_per_head,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = T * GP
    PER_CHUNK: tl.constexpr = C // STRIDE
    PARTS: tl.constexpr = SIZE // STRIDE
    # pooled keys that overlap a chunk
    OVERLAPS: tl.constexpr = PER_CHUNK + PARTS - 1
    MOST: tl.constexpr = PARTS if PARTS < PER_CHUNK else PER_CHUNK
    i_h = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    # late tiles have the most keys before them: start them first
    i_tile = tiles_per_head - 1 - tl.program_id(0) % tiles_per_head
    own = start_chunk + i_tile // (C // T)
    document = tl.load(chunk_first + own).to(tl.int32)
    start = start_chunk * C + i_tile * T

    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    o_n, o_g = start + o_r // GP, o_r % GP
    p_q = q + o_n.to(tl.int64)[:, None] * stride_qn + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)
    pooled += i_h * stride_ph
    # visible: those of the document that end at the row or before
    first, end = document * PER_CHUNK, tl.maximum(start + T + STRIDE - SIZE, 0) // STRIDE
    b_end = tl.maximum(o_n + 1 + STRIDE - SIZE, 0) // STRIDE
    b_lse = _log_sum_exp(b_q, pooled, stride_pj, first, end, b_end, scale, ROWS, D, BLOCK_D, BLOCK)

    # absent heads add nothing to their group
    b_end = tl.where(o_g < G, b_end, 0)
    o_t = tl.arange(0, T)
    p_scores = scores + (i_h * tiles_per_head * T + i_tile * T + o_t)[:, None] * num_chunks - first_chunk
    for i_c in range(document, own, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        b_score = tl.zeros([T, BLOCK], tl.float32)
        for i_o in range(OVERLAPS):
            o_j = o_c * PER_CHUNK + i_o - (PARTS - 1)
            m_j = (o_j >= first) & (o_j < end)
            b_k = load_rows(pooled, o_j, stride_pj, m_j, D, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            m_s = m_j[None, :] & (o_j[None, :] < b_end[:, None])
            b_p = tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_group = tl.sum(tl.reshape(b_p, (T, GP, BLOCK)), 1)
            if SUM:
                shared = tl.minimum(tl.minimum(i_o + 1, OVERLAPS - i_o), MOST)
                b_score += b_group * shared
            else:
                b_score = tl.maximum(b_score, b_group)
        tl.store(p_scores + o_c[None, :], b_score, mask=(o_c < own)[None, :])


def score_chunks(
    q: Tensor, pooled: Tensor, grid: Grid, block: Block, selection: Selection, reduce: str
) -> Tensor:
    """Scores float32 [H, T, c] of the chunks first <= c < end for a block's rows; -inf outside the document's past.

    Args:
        q: [S, Hq, D] on the grid; not divided by sqrt(D).
        pooled: [J, H, D] in q's dtype, in dense rows.
        grid, block: where the rows are, and which.
        selection: kernels.
        reduce: "max" or "sum", as in `chunk_scores`.
    """
    (S, Hq, D), H, C = q.shape, pooled.shape[1], grid.chunk_size
    launches = plan(q.device, q.dtype, D, C, Hq // H)
    sizes = size_tiles(S, (Hq, D), H, C, grid.num_chunks, 0, launches.tile_rows)
    rows, num_chunks = (block.end - block.start) * C, block.end - block.first
    scores = torch.full((H, rows, num_chunks), -torch.inf, dtype=torch.float32, device=q.device)
    tiles = rows // sizes.tile_tokens
    _score_chunks_kernel[(tiles * H,)](
        q, pooled, scores, grid.first_c, q.stride(0), q.stride(1), pooled.stride(0), pooled.stride(1), D**-0.5 * LOG2_E,
        block.start, block.first, num_chunks, tiles,
        G=sizes.group, GP=sizes.padded_group, D=D, BLOCK_D=sizes.block_d, T=sizes.tile_tokens, C=C,
        SIZE=selection.kernel_size, STRIDE=selection.kernel_stride, SUM=reduce == "sum", BLOCK=launches.route.block,
        num_warps=launches.route.num_warps, num_stages=launches.route.num_stages,
    )  # fmt: skip
    return scores


@torch.no_grad()
def select_chunks_triton(q: Tensor, pooled: Tensor, grid: Grid, selection: Selection, reduce: str) -> Tensor:
    """As `select_chunks_reference`, for float16, bfloat16 and float32; pooled keys are rounded to q's dtype.

    Probabilities are accumulated in float32. Every bit is the same in every run.
    """
    check_supported(q, pooled.shape[1])
    q = q if q.stride(-1) == 1 else q.contiguous()
    pooled = pooled.to(q.dtype).contiguous()
    selected = []
    for block in grid.blocks(SCORE_COST * pooled.shape[1] * grid.num_chunks):
        scores = score_chunks(q, pooled, grid, block, selection, reduce)
        selected.append(top_chunks(scores, grid, block, selection))
    return torch.cat(selected)
