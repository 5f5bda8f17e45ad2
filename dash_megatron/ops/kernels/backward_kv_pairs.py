"""Gradients of keys and values by gathering: for every chunk the rows of just those tokens that selected it.

The cost follows the selected pairs, whatever neighbouring tokens select. Chunks of fewer than 64 keys are taken side by side,
so that a row is read once for all of them that its token selected, and products have the rows that the tensor cores take.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.backward_summary import Summaries, routing_scales, summary_gradient
from dash_megatron.ops.kernels.configs import Config
from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.pairs import PairPlan, fill_pairs
from dash_megatron.ops.kernels.slab_parts import load_gathered, load_numbers
from dash_megatron.ops.kernels.tiles import (
    KEYS_AS_ROWS,
    LOG2_E,
    load_rows,
    place_sums,
    step_products,
    store_sums,
)


@triton.jit
def _split_pairs(b_x, COPIES: tl.constexpr):
    """First and second of every two numbers, [ROWS, NUMBERS / 2], of what `load_numbers` gives."""
    ROWS: tl.constexpr = b_x.shape[0]
    NUMBERS: tl.constexpr = b_x.shape[1] // COPIES
    if COPIES == 2:
        b_x, _ = tl.split(tl.permute(tl.reshape(b_x, (ROWS, 2, NUMBERS)), (0, 2, 1)))
    return tl.split(tl.reshape(b_x, (ROWS, NUMBERS // 2, 2)))


@triton.jit
def _every_other(b_x, odd: tl.constexpr):
    """Columns 0, 2, ..., or 1, 3, ... if `odd`."""
    b_even, b_odd = tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // 2, 2)))
    return b_odd if odd else b_even


@triton.jit
def _column(b_x, i: tl.constexpr):
    """Column i [ROWS] of numbers [ROWS, WIDTH], at most 4 of them."""
    WIDTH: tl.constexpr = b_x.shape[1]
    if WIDTH > 1:
        b_x = _every_other(b_x, i % 2)
    if WIDTH > 2:
        b_x = _every_other(b_x, i // 2)
    return tl.reshape(b_x, (b_x.shape[0],))


@triton.jit
def _by_key(b_x, C: tl.constexpr, KEYS_AS_ROWS: tl.constexpr):
    """Numbers [ROWS, WIDTH] of chunks of C keys, for each key: [KEYS, ROWS], or turned; one key stands for all of a single chunk."""
    ROWS: tl.constexpr = b_x.shape[0]
    WIDTH: tl.constexpr = b_x.shape[1]
    if WIDTH == 1:
        b_x = tl.trans(b_x) if KEYS_AS_ROWS else b_x
    elif KEYS_AS_ROWS:
        b_x = tl.reshape(tl.broadcast_to(tl.trans(b_x)[:, None, :], (WIDTH, C, ROWS)), (WIDTH * C, ROWS))
    else:
        b_x = tl.reshape(tl.broadcast_to(b_x[:, :, None], (ROWS, WIDTH, C)), (ROWS, WIDTH * C))
    return b_x


@triton.jit(do_not_specialize=["slab", "num_parts"])
def _dkv_pairs_kernel(
    q, k, v, d_out, lse_delta, tau, mean_dp, summary, head_scaling, token_prior, pair_d_prior, base, slab_part, slab, num_parts,
    row_offset, row_work, part_bound, part_row, dk_sum, dv_sum, ds_sum, key_start, key_end, query_start, query_end,
    stride_table, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    scale, inv_sqrt_d, score_scale, gradient_scale, exponent, inv_sigma, num_chunks, num_groups,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, KEYS_AS_ROWS: tl.constexpr, COPIES: tl.constexpr,
    ALPHA_15: tl.constexpr, SUMMARY: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // G
    i_p = tl.load(slab_part + slab) + tl.program_id(0)
    if i_p >= tl.load(slab_part + slab + 1):
        return
    here, stop = tl.load(part_bound + i_p), tl.load(part_bound + i_p + 1)
    i_row = tl.load(part_row + i_p)
    # programs of the second axis share the work by keys of the group
    o_c, o_d = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    m_d, o_w = o_d < D, tl.arange(0, WIDTH)
    # a step's rows are whole tokens; some rows are left over where G is no power of two
    o_rn, o_rg = tl.arange(0, ROWS) // G, tl.arange(0, ROWS) % G
    before = tl.load(base + slab)
    while here < stop:
        begin, end = tl.load(row_work + i_row), tl.load(row_work + i_row + 1)
        i_h, i_first = i_row // num_groups, i_row % num_groups * WIDTH
        i_c = i_first + o_c // C
        p_table, m_c = i_h * stride_table + i_c, i_c < num_chunks
        o_k = tl.load(key_start + p_table, mask=m_c, other=0) + o_c % C
        m_k = o_k < tl.load(key_end + p_table, mask=m_c, other=0)
        own_start = tl.load(query_start + p_table, mask=m_c, other=0)
        m_own = own_start < tl.load(query_end + p_table, mask=m_c, other=0)
        # The first entries are the places of own tokens, which see the keys up to their own; later entries see all.
        after_own = tl.where(tl.max(m_own.to(tl.int32)) > 0, 0, WIDTH * C)
        b_k = load_rows(k + i_h * stride_kh, o_k, stride_kn, m_k, D, BLOCK_D)
        b_v = load_rows(v + i_h * stride_vh, o_k, stride_vn, m_k, D, BLOCK_D)
        if SUMMARY:
            b_ds = tl.zeros([WIDTH, BLOCK_D], tl.float32)
            factor = 1.0 if head_scaling is None else tl.load(head_scaling + i_h).to(tl.float32)
        offset = tl.load(row_offset + i_row)
        p_pair = token_prior + (offset - before) * (2 * WIDTH)
        last = (tl.load(row_offset + i_row + 1) - offset).to(tl.int32) - 1
        first_step, last_step = (here - begin).to(tl.int32), (tl.minimum(stop, end) - begin).to(tl.int32)
        b_dk = tl.zeros([KEYS, BLOCK_D] if KEYS_AS_ROWS else [BLOCK_D, KEYS], tl.float32)
        b_dv = tl.zeros([KEYS, BLOCK_D] if KEYS_AS_ROWS else [BLOCK_D, KEYS], tl.float32)
        # Rows without a token repeat the last one, without weight: loads need no mask.
        last_here = tl.minimum(last, last_step * TOKENS - 1)
        first_entry = tl.minimum(first_step * TOKENS + o_rn, last_here)
        b_pair = load_numbers(p_pair + first_entry * (2 * WIDTH), 2 * WIDTH, COPIES)
        for i_step in tl.range(first_step, last_step, num_stages=STAGES):
            o_e = i_step * TOKENS + o_rn
            m_n = (o_rn < TOKENS) & (o_e <= last)
            b_token, b_log = _split_pairs(b_pair, COPIES)
            o_n, b_log = _column(b_token, 0).to(tl.int64), b_log.to(tl.float32, bitcast=True)
            # loaded one step early, because addresses depend on it
            next_entry = tl.minimum(o_e + TOKENS, last_here)
            b_pair = load_numbers(p_pair + next_entry * (2 * WIDTH), 2 * WIDTH, COPIES)
            o_head = o_n * (HKV * G) + i_h * G + o_rg
            b_q = load_gathered(q, o_n, i_h * G + o_rg, o_d, stride_qn, stride_qh, D, BLOCK_D)
            b_do = load_gathered(d_out, o_n, i_h * G + o_rg, o_d, HKV * G * D, D, D, BLOCK_D)
            b_lse, b_delta = _split_pairs(load_numbers(lse_delta + o_head * 2, 2, COPIES), COPIES)
            b_shift = tl.where(m_n[:, None], b_log * inv_sigma - b_lse, float("-inf"))
            b_dk, b_dv = step_products(
                b_k, b_v, b_q, b_do, b_dk, b_dv, _by_key(b_shift, C, KEYS_AS_ROWS), _column(b_delta, 0), o_c,
                o_e + after_own, scale, KEYS_AS_ROWS,
            )  # fmt: skip
            if SUMMARY:
                for i in tl.static_range(WIDTH):
                    p_s = summary + (i_h * num_chunks + i_first + i) * D + o_d
                    b_s = tl.load(p_s, mask=m_d & (i_first + i < num_chunks), other=0.0)
                    b_log_i = _column(b_log, i)
                    b_part = summary_gradient(
                        b_q, b_s.to(tl.float32), b_log_i, tau + o_head, mean_dp + o_head,
                        pair_d_prior + (offset - before + tl.minimum(o_e, last)) * WIDTH + i,
                        m_n & (o_e + after_own >= WIDTH * C) & (b_log_i > float("-inf")),
                        score_scale * factor, gradient_scale * factor, exponent, inv_sigma, G, ALPHA_15,
                    )  # fmt: skip
                    b_ds += tl.where((o_w == i)[:, None], b_part[None, :], 0.0)
        i_slot, p_row, m_row = place_sums(
            i_p, num_parts, i_row, i_h, here == begin, stop >= end, o_c, o_k, m_k, HKV, WIDTH * C, DIRECT
        )
        store_sums(dk_sum, dv_sum, b_dk * inv_sqrt_d, b_dv, p_row, m_row, o_d, m_d, D, KEYS_AS_ROWS)
        if SUMMARY:
            p_ds = ds_sum + (i_slot * WIDTH + o_w)[:, None] * D + o_d[None, :]
            tl.store(p_ds, b_ds, mask=m_d[None, :] & (tl.program_id(1) == 0))
        here = end
        i_row += 1


def sum_pairs(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, mean_log: Tensor, lists: Lists,
    plan: PairPlan, chunks: Tensor, keys: Tensor, queries: Tensor, sums: Tensor, ds_sum: Tensor | None,
    summaries: Summaries | None, sizes: Sizes, inv_sigma: float, config: Config, direct: bool,
) -> None:  # fmt: skip
    """Fill the partial sums of dk and dv as `_sum_parts` of `backward_kv.py` does, for the heads of the plan.

    A step of the plan is as many tokens as `config.block` rows hold. Slots and rows are those of groups of `plan.width` chunks.
    """
    D, partition, num_parts, width = sizes.head_dim, plan.partition, len(plan.partition.row), plan.width
    tau, mean_dp, summary, d_prior, head_scaling, router = summaries or (None,) * 6
    lse_delta = torch.stack([centred_lse, delta], dim=-1)
    for slab in range(plan.slabs):
        pairs = fill_pairs(plan, slab, lists, mean_log, chunks, queries, sizes, d_prior)
        _dkv_pairs_kernel[(num_parts, width * sizes.chunk_size // config.keys)](
            q, k, v, d_out, lse_delta, tau, mean_dp, summary, head_scaling, *pairs, plan.base, plan.slab_part, slab, num_parts,
            plan.offset, *partition, *sums, ds_sum, *keys, *queries, keys.stride(1),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            D**-0.5 * LOG2_E, D**-0.5, *routing_scales(router, D), inv_sigma, keys.shape[2], plan.run_place.shape[2],
            HKV=sizes.num_kv_heads, G=sizes.group, D=D, BLOCK_D=sizes.block_d, C=sizes.chunk_size, WIDTH=width,
            KEYS=config.keys, ROWS=config.block, STAGES=config.num_stages, KEYS_AS_ROWS=config.keys >= KEYS_AS_ROWS,
            COPIES=2 if config.block * 2 < 32 * config.num_warps else 1,
            ALPHA_15=router is not None and router.alpha == 1.5, SUMMARY=summaries is not None, DIRECT=direct,
            num_warps=config.num_warps,
        )  # fmt: skip
