"""Gradient of queries by gathering: the tokens that selected a chunk are multiplied with it, and each pair leaves its part.

The parts of a token, one for each chunk that it selected, lie side by side and are then summed in the order of its list.
The cost follows the selected pairs, whatever neighbouring tokens select.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.pair_slabs import SUM_ELEMENTS, PairSlabs, fill_slab, new_pairs
from dash_megatron.ops.kernels.tiles import LOG2_E, load_keys, tile_place


@triton.jit
def split_pair(b_pair):
    """Token, int64, and log prior of packed pairs."""
    return b_pair & 0x7FFFFFFF, (b_pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_gathered(x, o_n, o_head, o_d, stride_n, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [ROWS, BLOCK_D] of x at tokens `o_n` and heads `o_head`, all of which exist; zero beyond D."""
    p_x = x + (o_n * stride_n + o_head * stride_h)[:, None] + o_d[None, :]
    return tl.load(p_x) if BLOCK_D == D else tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def lane_place(i_lane, chunk_start, chunk_end, tiles_per_head, T: tl.constexpr, C: tl.constexpr):
    """Head and token of a row of all tiles, and whether it exists."""
    i_tile = i_lane // T
    _, start, end = tile_place(i_tile % tiles_per_head, chunk_start, chunk_end, C // T, T)
    i_n = start + i_lane % T
    return i_tile // tiles_per_head, i_n.to(tl.int64), i_n < end


@triton.jit(do_not_specialize=["slab"])
def _dq_pairs_kernel(
    q, k, v, d_out, centred_lse, delta, partial, d_prior, token_prior, pair_slot, pair_entry,
    row_place, row_work, part_bound, part_row, lane, slab, chunk_start,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, scale, inv_sqrt_d, inv_sigma, num_chunks, lanes_per_head,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GP
    i_p = slab * (tl.num_programs(0) + 1) + tl.program_id(0)
    here, stop = tl.load(part_bound + i_p), tl.load(part_bound + i_p + 1)
    i_c = tl.load(part_row + i_p - slab)
    i_h = tl.load(lane + slab) // lanes_per_head
    row_place += slab * (num_chunks + 1)
    row_work += slab * (num_chunks + 1)
    k += i_h * stride_kh
    v += i_h * stride_vh
    o_d, o_token = tl.arange(0, BLOCK_D), tl.arange(0, TOKENS)
    o_rn, o_rg = tl.arange(0, ROWS) // GP, tl.arange(0, ROWS) % GP
    # absent heads repeat the last one, without weight: loads need no mask
    o_g = i_h * G + tl.minimum(o_rg, G - 1)
    while here < stop:
        begin, end = tl.load(row_work + i_c), tl.load(row_work + i_c + 1)
        p_pair = tl.load(row_place + i_c)
        last = (tl.load(row_place + i_c + 1) - p_pair).to(tl.int32) - 1
        start = tl.load(chunk_start + i_c)
        b_k = load_keys(k, start, stride_kn, D, BLOCK_D, C, C)
        b_v = load_keys(v, start, stride_vn, D, BLOCK_D, C, C)
        first_step, last_step = (here - begin).to(tl.int32), (tl.minimum(stop, end) - begin).to(tl.int32)
        # rows without a token repeat the last one
        b_pair = tl.load(token_prior + p_pair + tl.minimum(first_step * TOKENS + o_rn, last))
        for i_step in tl.range(first_step, last_step, num_stages=STAGES):
            o_e = i_step * TOKENS + o_rn
            o_n, b_log = split_pair(b_pair)
            # loaded one step early, because addresses depend on it
            b_pair = tl.load(token_prior + p_pair + tl.minimum(o_e + TOKENS, last))
            b_q = load_gathered(q, o_n, o_g, o_d, stride_qn, stride_qh, D, BLOCK_D)
            b_do = load_gathered(d_out, o_n, o_g, o_d, HKV * G * D, D, D, BLOCK_D)
            m_row = (o_e <= last) & (o_rg < G)
            b_lse = tl.load(centred_lse + o_n * (HKV * G) + o_g)
            b_delta = tl.load(delta + o_n * (HKV * G) + o_g)
            b_shift = tl.where(m_row, b_log * inv_sigma - b_lse, float("-inf"))
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = tl.exp2(b_s * scale + b_shift[:, None]) * (b_dp - b_delta[:, None])
            if d_prior is not None:
                # all heads of a group share the prior
                b_db = tl.sum(tl.reshape(tl.sum(b_ds, 1), (TOKENS, GP)), 1)
                o_entry = i_step * TOKENS + o_token
                p_entry = tl.load(pair_entry + p_pair + tl.minimum(o_entry, last))
                tl.store(d_prior + p_entry, b_db, mask=o_entry <= last)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee") * inv_sqrt_d
            b_slot = tl.load(pair_slot + p_pair + tl.minimum(o_e, last)).to(tl.int64)
            p_out = partial + ((b_slot * G + o_rg) * D)[:, None] + o_d[None, :]
            tl.store(
                p_out,
                b_dq.to(partial.dtype.element_ty),
                mask=m_row[:, None] & (o_d < D)[None, :],
                cache_modifier=".cs",
            )
        here = end
        i_c += 1


@triton.jit(do_not_specialize=["slab"])
def _sum_slots_kernel(
    partial, dq, slot, lane, slab, chunk_start, chunk_end, tiles_per_head,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the parts of every token and head of a slab to its gradient: the slots of a token are dealt out to SLOTS sums."""
    first, stop = tl.load(lane + slab), tl.load(lane + slab + 1)
    begin = tl.load(slot + first)
    o_s, o_d = tl.arange(0, SLOTS), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for i_row in range(first * G + tl.program_id(0), stop * G, tl.num_programs(0)):
        i_lane, i_g = i_row // G, i_row % G
        i_slot = tl.load(slot + i_lane)
        count = (tl.load(slot + i_lane + 1) - i_slot).to(tl.int32)
        if count > 0:
            i_h, i_n, _ = lane_place(i_lane, chunk_start, chunk_end, tiles_per_head, T, C)
            p_part = partial + ((i_slot - begin) * G + i_g) * D + o_s[:, None] * (G * D) + o_d[None, :]
            b_sum = tl.zeros([SLOTS, BLOCK_D], tl.float32)
            for i_s in range(0, count, SLOTS):
                m_part = (i_s + o_s < count)[:, None] & m_d[None, :]
                b_sum += tl.load(p_part + i_s * (G * D), mask=m_part, other=0.0).to(tl.float32)
            p_dq = dq + ((i_n * HKV + i_h) * G + i_g) * D + o_d
            b_dq = tl.sum(b_sum, 0) + tl.load(p_dq, mask=m_d, other=0.0).to(tl.float32)
            tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_d)


def add_dq_pairs(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, dq: Tensor, d_prior: Tensor | None,
    lists: Lists, slabs: PairSlabs, chunks: Tensor, sizes: Sizes, inv_sigma: float,
) -> None:  # fmt: skip
    """Add what the slabs' pairs give to `dq` [tokens, Hq, D], in place, and write their part of `d_prior` as `backward_q` does."""
    pairs, config, D = new_pairs(slabs), slabs.by_pair.config, sizes.head_dim
    partial = torch.empty(slabs.room, sizes.group, D, dtype=q.dtype, device=q.device)
    constants = sizes.constants
    rows = {name: x for name, x in constants.items() if name != "T"}
    sums = {name: x for name, x in constants.items() if name != "GP"}
    for slab in range(slabs.num_slabs):
        fill_slab(slabs, slab, lists, chunks, sizes, pairs)
        _dq_pairs_kernel[(slabs.by_pair.parts,)](
            q, k, v, d_out, centred_lse, delta, partial, d_prior, *pairs,
            slabs.row_place, slabs.row_work, slabs.part_bound, slabs.part_row, slabs.lane, slab, chunks[0],
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], D**-0.5 * LOG2_E, D**-0.5, inv_sigma,
            sizes.num_chunks, sizes.tiles_per_head * sizes.tile_tokens,
            **rows, ROWS=config.block, STAGES=config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip
        _sum_slots_kernel[(slabs.sum_programs,)](
            partial, dq, slabs.slot, slabs.lane, slab, chunks[0], chunks[1], sizes.tiles_per_head,
            **sums, SLOTS=SUM_ELEMENTS // sizes.block_d, num_warps=1,
        )  # fmt: skip
