"""Attention of one token a sequence over the chunks its group selected, split over programs, and the sum of the splits.

The selected chunks of a sequence and key/value head are numbered in ascending order, and split i of S attends to an equal
share of consecutive ones; one more split has the own chunk and the local ones, which are not listed. The mean log prior is
only known when all shares are: it shifts all listed chunks alike, so that it can wait for the sum of the splits.
"""

import triton
import triton.language as tl

from dash_megatron.ops.kernels.decode_route import (
    chunk_place,
    enter,
    load_queries,
    routed_chunks,
    scale_of,
    score_chunks,
    sequence_place,
    solve_rows,
)
from dash_megatron.ops.kernels.threshold import probability
from dash_megatron.ops.kernels.tiles import load_rows

# Below it, a probability counts as this: float32 has nothing smaller without losing digits.
LEAST_PROBABILITY = tl.constexpr(1.1754944e-38)


@triton.jit
def count_bits(b_w):
    """Number of bits set in each int32."""
    b_w = b_w - ((b_w >> 1) & 0x55555555)
    b_w = (b_w & 0x33333333) + ((b_w >> 2) & 0x33333333)
    b_w = (b_w + (b_w >> 4)) & 0x0F0F0F0F
    b_w += b_w >> 8
    return (b_w + (b_w >> 16)) & 0x3F


@triton.jit
def share(total, i_split, splits):
    """First entry of a split, and one past its last."""
    return total * i_split // splits, total * (i_split + 1) // splits


@triton.jit
def _list_short(
    b_q, summary, page_table, list_place, list_log, i_b, i_h, i_split, splits, routed,
    stride_sp, stride_sc, stride_sh, stride_table, chunks_per_page, scale, exponent, tolerance,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    PAGED: tl.constexpr, ALPHA_15: tl.constexpr,
):  # fmt: skip
    """Route among at most CHUNKS chunks and list this split's share: first, last, and the sum of its logs."""
    o_c = tl.arange(0, CHUNKS)
    m_c = o_c < routed
    o_place = chunk_place(page_table, i_b, o_c, m_c, stride_table, chunks_per_page, PAGED)
    b_x = score_chunks(
        b_q, summary, o_place, m_c, i_h, stride_sp, stride_sc, stride_sh, chunks_per_page, scale, D, BLOCK_D
    )
    b_tau = solve_rows(b_x, routed, exponent, tolerance, ALPHA_15)
    b_p = probability(tl.maximum(b_x - b_tau[:, None], 0.0), exponent, ALPHA_15)
    b_p = tl.where((tl.arange(0, ROWS) < G)[:, None], b_p, 0.0)
    b_mean = tl.sum(b_p, 0) * (1.0 / G)
    b_selected = (b_mean > 0).to(tl.int32)
    o_entry = tl.cumsum(b_selected, 0) - b_selected
    first, last = share(tl.sum(b_selected, 0), i_split, splits)
    m_mine = (b_selected > 0) & (o_entry >= first) & (o_entry < last)
    b_log = tl.where(m_mine, tl.log2(tl.maximum(b_mean, LEAST_PROBABILITY)), 0.0)
    tl.store(list_place + o_entry, o_place, mask=m_mine)
    tl.store(list_log + o_entry, b_log, mask=m_mine)
    return first, last, tl.sum(b_log, 0)


@triton.jit
def _list_long(
    x, tau, bits, list_chunk, list_place, list_log, page_table, i_b, i_row, i_split, splits, routed,
    stride_table, chunks_per_page, max_chunks, max_words, exponent,
    G: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, BLOCK_E: tl.constexpr,
    PAGED: tl.constexpr, ALPHA_15: tl.constexpr,
):  # fmt: skip
    """List this split's share of the chunks whose bits are set for any head: first, last, and the sum of its logs."""
    o_w, o_g = tl.arange(0, WORDS), tl.arange(0, ROWS)
    bits += i_row.to(tl.int64) * max_words
    b_w = tl.zeros([WORDS], tl.int32)
    for i_g in tl.static_range(G):
        b_w |= tl.load(bits + i_g * max_words + o_w, mask=o_w * 32 < routed, other=0)
    b_n = count_bits(b_w)
    o_entry = tl.cumsum(b_n, 0) - b_n
    first, last = share(tl.sum(b_n, 0), i_split, splits)
    for i_bit in range(0, tl.max(b_n, 0)):
        # the lowest bit of every word that has one left
        m_mine = (i_bit < b_n) & (o_entry >= first) & (o_entry < last)
        tl.store(list_chunk + o_entry, o_w * 32 + count_bits((b_w & -b_w) - 1), mask=m_mine)
        b_w &= b_w - 1
        o_entry += 1
    # other threads wrote the chunks
    tl.debug_barrier()
    m_g = (o_g < G)[:, None]
    b_tau = tl.load(tau + i_row + o_g, mask=o_g < G, other=0.0)
    b_sum = tl.zeros([BLOCK_E], tl.float32)
    x += (i_row + o_g).to(tl.int64)[:, None] * max_chunks
    for i_e in range(first, last, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)
        m_e = o_e < last
        o_c = tl.load(list_chunk + o_e, mask=m_e, other=0)
        b_x = tl.load(x + o_c[None, :], mask=m_g & m_e[None, :], other=float("-inf"))
        b_mean = tl.sum(probability(tl.maximum(b_x - b_tau[:, None], 0.0), exponent, ALPHA_15), 0) * (1.0 / G)
        b_log = tl.where(m_e, tl.log2(tl.maximum(b_mean, LEAST_PROBABILITY)), 0.0)
        o_place = chunk_place(page_table, i_b, o_c, m_e, stride_table, chunks_per_page, PAGED)
        tl.store(list_place + o_e, o_place, mask=m_e)
        tl.store(list_log + o_e, b_log, mask=m_e)
        b_sum += b_log
    return first, last, tl.sum(b_sum, 0)


@triton.jit
def _softmax_step(b_acc, b_sum, b_max, b_s, b_v):
    """One step of online softmax with scores in base 2, one of them finite in every row."""
    b_next = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_next[:, None])
    b_rescale = tl.exp2(b_max - b_next)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_sum * b_rescale + tl.sum(b_p, 1), b_next


@triton.jit
def _attend_listed(
    b_acc, b_sum, b_max, b_q, k, v, list_place, list_log, first, last, stride_kp, stride_kn, chunks_per_page,
    scale, inv_sigma,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the entries first <= e < last; the prior is not centred."""
    STEPS: tl.constexpr = C // KEYS
    o_n, o_d = tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    p_kv = o_n[:, None] * stride_kn + o_d[None, :]
    i_place = tl.load(list_place + first, mask=first < last, other=0)
    for i_s in tl.range(first * STEPS, last * STEPS, num_stages=STAGES):
        start = (i_place // chunks_per_page).to(tl.int64) * stride_kp
        start += (i_place % chunks_per_page * C + i_s % STEPS * KEYS).to(tl.int64) * stride_kn
        i_e, i_next = i_s // STEPS, (i_s + 1) // STEPS
        # loaded one step early, because addresses depend on it
        i_place = tl.load(list_place + i_next, mask=i_next < last, other=0)
        bias = tl.load(list_log + i_e) * inv_sigma
        if BLOCK_D == D:
            b_k = tl.load(k + start + p_kv)
            b_v = tl.load(v + start + p_kv)
        else:
            b_k = tl.load(k + start + p_kv, mask=(o_d < D)[None, :], other=0.0)
            b_v = tl.load(v + start + p_kv, mask=(o_d < D)[None, :], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale + bias
        b_acc, b_sum, b_max = _softmax_step(b_acc, b_sum, b_max, b_s, b_v)
    return b_acc, b_sum, b_max


@triton.jit
def _attend_chunk(
    b_acc, b_sum, b_max, b_q, k, v, page_table, i_b, i_c, tokens, stride_kp, stride_kn, stride_table, chunks_per_page, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the first `tokens` keys of chunk `i_c`, without a prior; what lies behind them is not read."""
    i_place = chunk_place(page_table, i_b, i_c, tokens > 0, stride_table, chunks_per_page, PAGED)
    start = (i_place // chunks_per_page).to(tl.int64) * stride_kp
    start += (i_place % chunks_per_page * C).to(tl.int64) * stride_kn
    k += start
    v += start
    for i_n in range(0, tokens, KEYS):
        o_n = i_n + tl.arange(0, KEYS)
        b_k = load_rows(k, o_n, stride_kn, o_n < tokens, D, BLOCK_D)
        b_v = load_rows(v, o_n, stride_kn, o_n < tokens, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where((o_n < tokens)[None, :], b_s, float("-inf"))
        b_acc, b_sum, b_max = _softmax_step(b_acc, b_sum, b_max, b_s, b_v)
    return b_acc, b_sum, b_max


@triton.jit
def decode_attend_kernel(
    q, routing_q, k, v, summary, lengths, page_table, head_scaling, x, tau, bits, list_chunk, list_place, list_log, part, lse, stats, out, selected,
    stride_qb, stride_qh, stride_kp, stride_kn, stride_kh, stride_sp, stride_sc, stride_sh, stride_table,
    chunks_per_page, max_chunks, max_words, splits, scale, route_scale, exponent, tolerance, inv_sigma,
    HKV: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr, PAGED: tl.constexpr,
    ALPHA_15: tl.constexpr, CENTRE: tl.constexpr, SHORT: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    LOCAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One split: output and log-sum-exp of its share; if WHOLE, the only program has everything and writes the output."""
    if SHORT:
        # the first kernel of the decode
        enter(DEPENDENT)
    parts = splits if WHOLE else splits + 1
    i_bh, i_split = tl.program_id(0) // parts, tl.program_id(0) % parts
    i_b, i_h = i_bh // HKV, i_bh % HKV
    past, own, fits = sequence_place(lengths, i_b, max_chunks, C)
    routed = routed_chunks(past, LOCAL)
    o_g, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    b_q = load_queries(q, i_b, i_h, stride_qb, stride_qh, G, D, BLOCK_D, ROWS)
    b_routing_q = b_q
    if routing_q is not None:
        b_routing_q = load_queries(routing_q, i_b, i_h, HKV * G * D, D, G, D, BLOCK_D, ROWS)
    if not SHORT:
        # the kernels before this one do not write what was read so far
        enter(DEPENDENT)
    k += i_h.to(tl.int64) * stride_kh
    v += i_h.to(tl.int64) * stride_kh
    b_acc, b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS], tl.float32)
    b_max = b_sum - float("inf")
    count, log_sum = past * 0, 0.0
    if (routed > 0) & (i_split < splits):
        list_place += i_bh.to(tl.int64) * max_chunks
        list_log += i_bh.to(tl.int64) * max_chunks
        if SHORT:
            route_scale = scale_of(route_scale, head_scaling, i_h)
            first, last, log_sum = _list_short(
                b_routing_q, summary, page_table, list_place, list_log, i_b, i_h, i_split, splits, routed,
                stride_sp, stride_sc, stride_sh, stride_table, chunks_per_page, route_scale, exponent, tolerance,
                G, D, BLOCK_D, ROWS, CHUNKS, PAGED, ALPHA_15,
            )  # fmt: skip
        else:
            first, last, log_sum = _list_long(
                x, tau, bits, list_chunk + i_bh.to(tl.int64) * max_chunks, list_place, list_log, page_table,
                i_b, i_bh * G, i_split, splits, routed, stride_table, chunks_per_page, max_chunks, max_words, exponent,
                G, ROWS, WORDS, BLOCK_E, PAGED, ALPHA_15,
            )  # fmt: skip
        count = last - first
        # other threads wrote the list
        tl.debug_barrier()
        b_acc, b_sum, b_max = _attend_listed(
            b_acc, b_sum, b_max, b_q, k, v, list_place, list_log, first, last, stride_kp, stride_kn, chunks_per_page,
            scale, inv_sigma, D, BLOCK_D, C, KEYS, STAGES,
        )  # fmt: skip
    if WHOLE and CENTRE:
        b_max -= log_sum / tl.maximum(count, 1) * inv_sigma
    if WHOLE or i_split == splits:
        if LOCAL > 0:
            for i_c in range(routed, past):
                b_acc, b_sum, b_max = _attend_chunk(
                    b_acc, b_sum, b_max, b_q, k, v, page_table, i_b, i_c, C, stride_kp, stride_kn, stride_table,
                    chunks_per_page, scale, D, BLOCK_D, C, KEYS, PAGED,
                )  # fmt: skip
        b_acc, b_sum, b_max = _attend_chunk(
            b_acc, b_sum, b_max, b_q, k, v, page_table, i_b, past, own, stride_kp, stride_kn, stride_table,
            chunks_per_page, scale, D, BLOCK_D, C, KEYS, PAGED,
        )  # fmt: skip
        if LOCAL > 0:
            count += past - routed
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    m_g, m_o = o_g < G, (o_g < G)[:, None] & (o_d < D)[None, :]
    if WHOLE:
        b_out = tl.where(fits, b_out, float("nan"))
        p_out = out + (i_bh * G + o_g).to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_o)
        tl.store(selected + i_bh, count + (own > 0).to(tl.int32))
    else:
        i_part = i_bh.to(tl.int64) * parts + i_split
        # a sequence that does not fit the cache has no output
        b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
        b_lse = tl.where(fits | (i_split < splits), b_lse, float("nan"))
        tl.store(lse + (i_bh * G + o_g).to(tl.int64) * parts + i_split, b_lse, mask=m_g)
        tl.store(stats + 2 * i_part, log_sum)
        count += ((i_split == splits) & (own > 0)).to(tl.int32)
        tl.store(stats + 2 * i_part + 1, count.to(tl.float32))
        p_part = part + (i_part * G + o_g)[:, None] * D + o_d[None, :]
        # the sum of the splits does not read what has no weight
        tl.store(p_part, b_out, mask=m_o & (b_sum > 0)[:, None])


@triton.jit
def decode_sum_kernel(
    part, lse, stats, out, selected, splits, inv_sigma,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, CENTRE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some columns of the output [B, Hq, D] of one query head from all splits, and the chunks its group selected."""
    enter(DEPENDENT)
    i_row, i_bh = tl.program_id(0).to(tl.int64), (tl.program_id(0) // G).to(tl.int64)
    o_s, o_d = tl.arange(0, PARTS), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_s = o_s <= splits
    p_stats = stats + 2 * (i_bh * (splits + 1) + o_s)
    b_count = tl.load(p_stats + 1, mask=m_s, other=0.0)
    count = tl.sum(tl.where(o_s < splits, b_count, 0.0), 0)
    p_lse = lse + i_row * (splits + 1)
    shift = 0.0
    if CENTRE:
        b_log = tl.load(p_stats, mask=o_s < splits, other=0.0)
        shift = tl.sum(b_log, 0) / tl.maximum(count, 1.0) * inv_sigma
    b_lse = tl.load(p_lse + o_s, mask=m_s, other=float("-inf")) - tl.where(o_s < splits, shift, 0.0)
    top = tl.max(b_lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    b_acc, b_total = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    for i_s in range(0, splits + 1, BLOCK_P):
        o_p = i_s + tl.arange(0, BLOCK_P)
        b_part_lse = tl.load(p_lse + o_p, mask=o_p <= splits, other=float("-inf"))
        b_weight = tl.exp2(b_part_lse - tl.where(o_p < splits, shift, 0.0) - top)
        p_part = part + ((i_bh * (splits + 1) + o_p) * G + i_row % G)[:, None] * D + o_d[None, :]
        # loads do not wait for weights: what has none was not written
        b_part = tl.load(p_part, mask=(o_p <= splits)[:, None] & (o_d < D)[None, :], other=0.0)
        b_acc += tl.sum(tl.where((b_weight > 0)[:, None], b_part * b_weight[:, None], 0.0), 0)
        b_total += b_weight
    total = tl.sum(b_total, 0)
    # an empty sequence attends to nothing
    b_out = b_acc / tl.where(total == 0, 1.0, total)
    tl.store(out + i_row * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)
    if (i_row % G == 0) & (tl.program_id(1) == 0):
        tl.store(selected + i_bh, (count + tl.sum(tl.where(o_s == splits, b_count, 0.0), 0)).to(tl.int32))
