"""Gradients of keys and values by gathering: for every chunk the rows of just those tokens that selected it.

The cost follows the selected pairs, whatever neighbouring tokens select.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.backward_summary import Summaries, routing_scales, summary_gradient
from dash_megatron.ops.kernels.configs import Config
from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.pairs import PairPlan, fill_pairs
from dash_megatron.ops.kernels.tiles import (
    KEYS_AS_ROWS,
    LOG2_E,
    load_rows,
    place_sums,
    step_products,
    store_sums,
)


@triton.jit
def _load_two(p_x, COPIES: tl.constexpr):
    """The two numbers at each of the pointers [ROWS], and again if COPIES is 2: [ROWS, 2 * COPIES].

    Triton lets every thread that needs a number load it where there are fewer numbers than threads; copies make up for that.
    """
    return tl.load(p_x[:, None] + tl.arange(0, 2 * COPIES)[None, :] % 2)


@triton.jit
def _split_two(b_x, COPIES: tl.constexpr):
    """First and second numbers [ROWS] of what `_load_two` gives."""
    if COPIES == 2:
        b_x, _ = tl.split(tl.permute(tl.reshape(b_x, (b_x.shape[0], 2, 2)), (0, 2, 1)))
    return tl.split(b_x)


@triton.jit(do_not_specialize=["slab", "num_parts"])
def _dkv_pairs_kernel(
    q, k, v, d_out, lse_delta, tau, mean_dp, summary, head_scaling, token_prior, pair_d_prior, base, slab, num_parts,
    row_offset, row_work, part_bound, part_row, dk_sum, dv_sum, ds_sum, key_start, key_end, query_start, query_end,
    stride_table, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    scale, inv_sqrt_d, score_scale, gradient_scale, exponent, inv_sigma, num_chunks,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, KEYS_AS_ROWS: tl.constexpr, COPIES: tl.constexpr,
    ALPHA_15: tl.constexpr, SUMMARY: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // G
    i_p = slab.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    here, stop = tl.load(part_bound + i_p), tl.load(part_bound + i_p + 1)
    i_row = tl.load(part_row + i_p)
    # programs of the second axis share the work by keys of the chunk
    o_c, o_d = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # a step's rows are whole tokens; some rows are left over where G is no power of two
    o_rn, o_rg = tl.arange(0, ROWS) // G, tl.arange(0, ROWS) % G
    before = tl.load(base + slab)
    while here < stop:
        begin, end = tl.load(row_work + i_row), tl.load(row_work + i_row + 1)
        i_h, i_c = i_row // num_chunks, i_row % num_chunks
        p_table = i_h * stride_table + i_c
        o_k = tl.load(key_start + p_table) + o_c
        m_k = o_k < tl.load(key_end + p_table)
        own_start, own_end = tl.load(query_start + p_table), tl.load(query_end + p_table)
        b_k = load_rows(k + i_h * stride_kh, o_k, stride_kn, m_k, D, BLOCK_D)
        b_v = load_rows(v + i_h * stride_vh, o_k, stride_vn, m_k, D, BLOCK_D)
        if SUMMARY:
            b_ds = tl.zeros([BLOCK_D], tl.float32)
            b_summary = tl.load(summary + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
            factor = 1.0 if head_scaling is None else tl.load(head_scaling + i_h).to(tl.float32)
        offset = tl.load(row_offset + i_row)
        p_pair, last = (
            token_prior + (offset - before) * 2,
            (tl.load(row_offset + i_row + 1) - offset).to(tl.int32) - 1,
        )
        first_step, last_step = (here - begin).to(tl.int32), (tl.minimum(stop, end) - begin).to(tl.int32)
        b_dk = tl.zeros([KEYS, BLOCK_D] if KEYS_AS_ROWS else [BLOCK_D, KEYS], tl.float32)
        b_dv = tl.zeros([KEYS, BLOCK_D] if KEYS_AS_ROWS else [BLOCK_D, KEYS], tl.float32)
        # Rows without a token repeat the last one, without weight: loads need no mask.
        last_here = tl.minimum(last, last_step * TOKENS - 1)
        b_pair = _load_two(p_pair + tl.minimum(first_step * TOKENS + o_rn, last_here) * 2, COPIES)
        for i_step in tl.range(first_step, last_step, num_stages=STAGES):
            o_e = i_step * TOKENS + o_rn
            m_n = (o_rn < TOKENS) & (o_e <= last)
            o_n, b_log = _split_two(b_pair, COPIES)
            o_n, b_log = o_n.to(tl.int64), b_log.to(tl.float32, bitcast=True)
            # loaded one step early, because addresses depend on it
            b_pair = _load_two(p_pair + tl.minimum(o_e + TOKENS, last_here) * 2, COPIES)
            o_head = o_n * (HKV * G) + i_h * G + o_rg
            p_q = q + (o_n * stride_qn + (i_h * G + o_rg) * stride_qh)[:, None] + o_d[None, :]
            p_do = d_out + (o_head * D)[:, None] + o_d[None, :]
            b_q = tl.load(p_q) if BLOCK_D == D else tl.load(p_q, mask=m_d[None, :], other=0.0)
            b_do = tl.load(p_do) if BLOCK_D == D else tl.load(p_do, mask=m_d[None, :], other=0.0)
            b_lse, b_delta = _split_two(_load_two(lse_delta + o_head * 2, COPIES), COPIES)
            b_shift = tl.where(m_n, b_log * inv_sigma - b_lse, float("-inf"))
            # tokens of later chunks see all of it
            m_own = (o_n >= own_start) & (o_n < own_end)
            o_slot = tl.where(m_own, o_n.to(tl.int32) - own_start, C)
            b_dk, b_dv = step_products(
                b_k, b_v, b_q, b_do, b_dk, b_dv, b_shift, b_delta, o_c, o_slot, scale, KEYS_AS_ROWS
            )
            if SUMMARY:
                b_ds += summary_gradient(
                    b_q, b_summary, b_log, tau + o_head, mean_dp + o_head,
                    pair_d_prior + (offset - before) + tl.minimum(o_e, last),
                    m_n & (m_own == 0), score_scale * factor, gradient_scale * factor, exponent, inv_sigma, G, ALPHA_15,
                )  # fmt: skip
        i_slot, p_row, m_row = place_sums(
            i_p, num_parts, i_row, i_h, here == begin, stop >= end, o_c, o_k, m_k, HKV, C, DIRECT
        )
        store_sums(dk_sum, dv_sum, b_dk * inv_sqrt_d, b_dv, p_row, m_row, o_d, m_d, D, KEYS_AS_ROWS)
        if SUMMARY:
            tl.store(ds_sum + i_slot * D + o_d, b_ds, mask=m_d & (tl.program_id(1) == 0))
        here = end
        i_row += 1


def sum_pairs(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, mean_log: Tensor, lists: Lists,
    plan: PairPlan, chunks: Tensor, keys: Tensor, queries: Tensor, sums: Tensor, ds_sum: Tensor | None,
    summaries: Summaries | None, sizes: Sizes, inv_sigma: float, config: Config, direct: bool,
) -> None:  # fmt: skip
    """Fill the partial sums of dk and dv as `_sum_parts` of `backward_kv.py` does, for the heads of the plan.

    A step of the plan is as many tokens as `config.block` rows hold.
    """
    D, partition, num_parts = sizes.head_dim, plan.partition, len(plan.partition.row)
    tau, mean_dp, summary, d_prior, head_scaling, router = summaries or (None,) * 6
    lse_delta = torch.stack([centred_lse, delta], dim=-1)
    for slab in range(plan.slabs):
        pairs = fill_pairs(plan, slab, lists, mean_log, chunks, queries, sizes, d_prior)
        _dkv_pairs_kernel[(num_parts // plan.slabs, sizes.chunk_size // config.keys)](
            q, k, v, d_out, lse_delta, tau, mean_dp, summary, head_scaling, *pairs, plan.base, slab, num_parts,
            plan.offset, *partition, *sums, ds_sum, *keys, *queries, keys.stride(1),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            D**-0.5 * LOG2_E, D**-0.5, *routing_scales(router, D), inv_sigma, keys.shape[2],
            HKV=sizes.num_kv_heads, G=sizes.group, D=D, BLOCK_D=sizes.block_d, C=sizes.chunk_size, KEYS=config.keys,
            ROWS=config.block, STAGES=config.num_stages, KEYS_AS_ROWS=config.keys >= KEYS_AS_ROWS,
            COPIES=2 if config.block * 2 < 32 * config.num_warps else 1,
            ALPHA_15=router is not None and router.alpha == 1.5, SUMMARY=summaries is not None, DIRECT=direct,
            num_warps=config.num_warps,
        )  # fmt: skip
