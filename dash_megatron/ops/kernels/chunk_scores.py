"""Scores of chunks from pooled keys on the GPU, for selections of a fixed size.

Scores of single pooled keys stay on chip: one pass over them finds every row's log-sum-exp, a second computes them again
chunk by chunk. Neither looks beyond a row's past or document.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.configs import Config
from dash_megatron.ops.kernels.geometry import Sizes
from dash_megatron.ops.kernels.tiles import LOG2_E, load_rows, load_tile, tile_number


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
    i_h, i_tile = tile_number(tiles_per_head)
    i_h = i_h.to(tl.int64)
    own = start_chunk + i_tile // (C // T)
    document = tl.load(chunk_first + own).to(tl.int32)
    start = start_chunk * C + i_tile * T

    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    o_n, o_g = start + o_r // GP, o_r % GP
    b_q = load_tile(q, i_h, o_n.to(tl.int64), o_g, o_d, o_g < G, stride_qn, stride_qh, G, D)
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
    q: Tensor, pooled: Tensor, chunk_first: Tensor, first: int, start: int, end: int, kernel_size: int, kernel_stride: int,
    reduce: str, sizes: Sizes, config: Config,
) -> Tensor:  # fmt: skip
    """Scores float32 [H, T, c] of the chunks first <= c < end for the rows of the chunks start <= c < end.

    They are -inf outside a row's past and document. A score is made of the softmax over the pooled keys that end at the row
    or before, summed over the heads of a group.

    Args:
        q: [S, Hq, D] in whole chunks, dense in D; not divided by sqrt(D).
        pooled: [J, H, D] in q's dtype, in dense rows; one begins every `kernel_stride` rows and covers `kernel_size`.
        chunk_first: the first chunk of each chunk's document, [S / chunk size].
        first, start, end: as above; no row sees chunks before the first.
        reduce: "max" of the pooled keys that overlap a chunk, or "sum", each as often as its strides lie in the chunk.
        sizes: of q, with H key/value heads.
        config: `block` pooled keys, or chunks, a step.
    """
    rows, num_chunks = (end - start) * sizes.chunk_size, end - first
    scores = torch.full(
        (sizes.num_kv_heads, rows, num_chunks), -torch.inf, dtype=torch.float32, device=q.device
    )
    tiles = rows // sizes.tile_tokens
    _score_chunks_kernel[(tiles * sizes.num_kv_heads,)](
        q, pooled, scores, chunk_first, *q.stride()[:2], *pooled.stride()[:2], sizes.head_dim**-0.5 * LOG2_E,
        start, first, num_chunks, tiles,
        G=sizes.group, GP=sizes.padded_group, D=sizes.head_dim, BLOCK_D=sizes.block_d, T=sizes.tile_tokens,
        C=sizes.chunk_size, SIZE=kernel_size, STRIDE=kernel_stride, SUM=reduce == "sum", BLOCK=config.block,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return scores
