"""Entmax block routing of one token a sequence: scores, thresholds, and the chunks that a group selects.

Long caches: scores of all chunks are written once, by as many programs as there are blocks of chunks; one program a query
head then finds its threshold and leaves one bit a chunk. Short caches: every program of the attention routes for itself.
"""

import triton
import triton.language as tl

from dash_megatron.ops.kernels.summarize import saturate
from dash_megatron.ops.kernels.threshold import power, probability, threshold_bounds, threshold_step


@triton.jit
def enter(DEPENDENT: tl.constexpr):
    """Wait for the kernel before this one to end, then let the next one be launched.

    Every program must come here, before it reads what an earlier kernel of the decode wrote and before it returns early:
    a kernel that has ended tells the next one that all before it have. The first kernel comes here before it reads anything.
    The later ones start when all of its programs did, so that they can read what was there before the decode at any time.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def sequence_place(lengths, i_b, max_chunks, C: tl.constexpr):
    """Whole past chunks of a sequence, tokens of its own chunk (0 if it is empty), and whether it fits the cache."""
    length = tl.load(lengths + i_b)
    fits = length <= max_chunks * C
    length = tl.minimum(length, max_chunks * C)
    past = tl.maximum(length - 1, 0) // C
    return past, length - past * C, fits


@triton.jit
def chunk_place(page_table, i_b, o_c, m_c, stride_table, chunks_per_page, PAGED: tl.constexpr):
    """Number of chunks `o_c` of a sequence in the pool: page * chunks_per_page + place in the page."""
    if PAGED:
        p_page = page_table + i_b.to(tl.int64) * stride_table + o_c // chunks_per_page
        page = tl.load(p_page, mask=m_c, other=0)
        return page * chunks_per_page + o_c % chunks_per_page
    return i_b * chunks_per_page + o_c


@triton.jit
def load_queries(q, i_b, i_h, stride_qb, stride_qh, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Query heads [ROWS, BLOCK_D] of a group; absent ones are zero."""
    o_g, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    p_q = q + i_b.to(tl.int64) * stride_qb + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
    return tl.load(p_q, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def score_chunks(
    b_q, summary, o_place, m_c, i_h, stride_sp, stride_sc, stride_sh, chunks_per_page, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores x = (alpha - 1) z [ROWS, chunks] of the chunks at `o_place` of the pool; -inf where `m_c` is false."""
    o_d = tl.arange(0, BLOCK_D)
    o_page = (o_place // chunks_per_page).to(tl.int64)
    p_s = summary + o_page * stride_sp + (o_place % chunks_per_page) * stride_sc + i_h * stride_sh
    b_s = tl.load(p_s[:, None] + o_d[None, :], mask=m_c[:, None] & (o_d < D)[None, :], other=0.0)
    b_q = saturate(b_q, summary.dtype.element_ty)
    b_x = tl.dot(b_q, tl.trans(b_s), input_precision="ieee") * scale
    return tl.where(m_c[None, :], b_x, float("-inf"))


@triton.jit
def routed_chunks(past, LOCAL: tl.constexpr):
    """How many of the `past` chunks of a sequence the router selects from: all but the LOCAL last ones."""
    return past if LOCAL == 0 else tl.maximum(past - LOCAL, 0)


@triton.jit
def scale_of(scale, head_scaling, i_h):
    """What turns q.s into x for a head."""
    if head_scaling is not None:
        scale *= tl.load(head_scaling + i_h).to(tl.float32)
    return scale


@triton.jit
def threshold_terms(b_u, exponent, ALPHA_15: tl.constexpr):
    """Terms of the three sums that move tau: count, u and u ** 2 of u = [x - tau]_+; for other alphas zero and its two powers."""
    if ALPHA_15:
        return (b_u > 0).to(tl.float32), b_u, b_u * b_u
    return b_u * 0, power(b_u, exponent - 1), power(b_u, exponent)


@triton.jit
def sum_three(b_0, b_1, b_2, axis: tl.constexpr):
    """Sums over an axis in one go: threads meet once instead of three times."""
    b_all = tl.sum(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_1)), axis)
    b_02, b_11 = tl.split(b_all)
    b_s0, b_s2 = tl.split(b_02)
    b_s1, _ = tl.split(b_11)
    return b_s0, b_s1, b_s2


@triton.jit
def solve_rows(b_x, routed, exponent, tolerance, ALPHA_15: tl.constexpr):
    """Thresholds [ROWS] of scores [ROWS, chunks] that fit into registers; routed > 0 of them are finite."""
    b_low, b_high = threshold_bounds(tl.max(b_x, 1), routed, exponent)
    b_tau = b_low
    passes, moved = 0, tolerance + 1
    while (moved > tolerance) & (passes < 60):
        b_0, b_1, b_2 = threshold_terms(tl.maximum(b_x - b_tau[:, None], 0.0), exponent, ALPHA_15)
        b_s0, b_s1, b_s2 = sum_three(b_0, b_1, b_2, 1)
        b_next = threshold_step(b_tau, b_low, b_high, b_s0, b_s1, b_s2, exponent, passes, ALPHA_15)
        moved = tl.max(tl.abs(b_next - b_tau), 0)
        b_tau = b_next
        passes += 1
    return b_tau


@triton.jit
def decode_score_kernel(
    q, summary, lengths, page_table, head_scaling, x, stride_qb, stride_qh, stride_sp, stride_sc, stride_sh, stride_table,
    chunks_per_page, max_chunks, blocks, scale,
    HKV: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
    BLOCK_S: tl.constexpr, PAGED: tl.constexpr, LOCAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Scores float32 [B, Hq, max_chunks] of the routed chunks, a block of chunks for the heads of a group a program."""
    enter(DEPENDENT)
    i_bh = tl.program_id(0) // blocks
    i_b, i_h = i_bh // HKV, i_bh % HKV
    past, _, _ = sequence_place(lengths, i_b, max_chunks, C)
    routed = routed_chunks(past, LOCAL)
    o_c = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    if tl.program_id(0) % blocks * BLOCK_S >= routed:
        return
    m_c = o_c < routed
    o_place = chunk_place(page_table, i_b, o_c, m_c, stride_table, chunks_per_page, PAGED)
    b_q = load_queries(q, i_b, i_h, stride_qb, stride_qh, G, D, BLOCK_D, ROWS)
    scale = scale_of(scale, head_scaling, i_h)
    b_x = score_chunks(
        b_q, summary, o_place, m_c, i_h, stride_sp, stride_sc, stride_sh, chunks_per_page, scale, D, BLOCK_D
    )
    o_g = tl.arange(0, ROWS)
    p_x = x + (i_bh * G + o_g).to(tl.int64)[:, None] * max_chunks + o_c[None, :]
    tl.store(p_x, b_x, mask=(o_g < G)[:, None] & m_c[None, :])


@triton.jit
def decode_threshold_kernel(
    x, lengths, tau, bits, exponent, tolerance, inv_group, max_chunks, max_words,
    HQ: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ALPHA_15: tl.constexpr, LOCAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Threshold float32 [B, Hq] of a query head's scores, and int32 words of bits [B, Hq, words]: what it selects."""
    i_row = tl.program_id(0)
    past, _, _ = sequence_place(lengths, i_row // HQ, max_chunks, C)
    routed = routed_chunks(past, LOCAL)
    enter(DEPENDENT)
    if routed == 0:
        return
    x += i_row.to(tl.int64) * max_chunks
    o_n = tl.arange(0, BLOCK)
    # the first BLOCK scores stay in registers; more are read again in every pass, from the first-level cache
    b_first = tl.load(x + o_n, mask=o_n < routed, other=float("-inf"))
    b_top = b_first
    for i_c in range(BLOCK, routed, BLOCK):
        b_top = tl.maximum(b_top, tl.load(x + i_c + o_n, mask=i_c + o_n < routed, other=float("-inf")))
    low, high = threshold_bounds(tl.max(b_top, 0), routed, exponent)
    threshold = low
    passes, moved = 0, tolerance + 1
    while (moved > tolerance) & (passes < 60):
        b_s0, b_s1, b_s2 = threshold_terms(tl.maximum(b_first - threshold, 0.0), exponent, ALPHA_15)
        for i_c in range(BLOCK, routed, BLOCK):
            b_x = tl.load(x + i_c + o_n, mask=i_c + o_n < routed, other=float("-inf"))
            b_0, b_1, b_2 = threshold_terms(tl.maximum(b_x - threshold, 0.0), exponent, ALPHA_15)
            b_s0, b_s1, b_s2 = b_s0 + b_0, b_s1 + b_1, b_s2 + b_2
        s0, s1, s2 = sum_three(b_s0, b_s1, b_s2, 0)
        following = threshold_step(threshold, low, high, s0, s1, s2, exponent, passes, ALPHA_15)
        moved = tl.abs(following - threshold)
        threshold = following
        passes += 1
    tl.store(tau + i_row, threshold)
    bits += i_row.to(tl.int64) * max_words
    b_x = b_first
    for i_c in range(0, routed, BLOCK):
        if i_c > 0:
            b_x = tl.load(x + i_c + o_n, mask=i_c + o_n < routed, other=float("-inf"))
        # as the mean over the group counts it
        b_bit = (probability(tl.maximum(b_x - threshold, 0.0), exponent, ALPHA_15) * inv_group > 0).to(
            tl.int32
        )
        b_bit = tl.reshape(b_bit, (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
        o_w = i_c // 32 + tl.arange(0, BLOCK // 32)
        tl.store(bits + o_w, tl.sum(b_bit, 1), mask=o_w * 32 < routed)
