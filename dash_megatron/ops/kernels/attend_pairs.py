"""Forward by gathering: the tokens that selected a chunk attend to it alone, and each pair leaves its output and log-sum-exp.

Those of a token lie side by side and are then merged with what it found in its own chunk, in the order of its list.
The cost follows the selected pairs, whatever neighbouring tokens select.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.pair_slabs import SUM_REGISTERS, PairSlabs, filled_slabs, heads_and_slots
from dash_megatron.ops.kernels.slab_parts import (
    chunk_of_slab,
    lane_place,
    load_gathered,
    load_pairs,
    load_shifts,
    load_slots,
    part_of_slab,
    parts_of_row,
    rows_of_slab,
    slots_of_row,
    store_rows,
)
from dash_megatron.ops.kernels.tiles import LOG2_E, load_keys

# Log-sum-exps of a head that a program adds up at a time.
SUM_LSES = 64


@triton.jit(do_not_specialize=["slab"])
def _attend_pairs_kernel(
    q, k, v, partial, partial_lse, token_shift, pair_slot, row_place, row_work, part_bound, part_row, first_tile, slab,
    key_start, stride_key, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, scale, num_chunks, tiles_per_head,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GP
    here, stop, i_c, i_h, p_place, p_work = part_of_slab(
        row_place, row_work, part_bound, part_row, first_tile, slab, num_chunks, tiles_per_head
    )
    k += i_h * stride_kh
    v += i_h * stride_vh
    key_start += i_h * stride_key
    o_d = tl.arange(0, BLOCK_D)
    o_rn, o_rg = tl.arange(0, ROWS) // GP, tl.arange(0, ROWS) % GP
    # absent heads repeat the last one: loads need no mask
    o_g = i_h * G + tl.minimum(o_rg, G - 1)
    while here < stop:
        i_c, begin, end, p_pair, last = chunk_of_slab(p_place, p_work, i_c, here)
        start = tl.load(key_start + i_c)
        b_k = load_keys(k, start, stride_kn, D, BLOCK_D, C, C)
        b_v = load_keys(v, start, stride_vn, D, BLOCK_D, C, C)
        first_step, last_step = (here - begin).to(tl.int32), (tl.minimum(stop, end) - begin).to(tl.int32)
        # rows without a token repeat the last one
        b_pair = load_pairs(token_shift + p_pair, tl.minimum(first_step * TOKENS + o_rn, last))
        for i_step in tl.range(first_step, last_step, num_stages=STAGES):
            o_e = i_step * TOKENS + o_rn
            b_token, _ = tl.split(b_pair)
            b_shift = load_shifts(token_shift + p_pair, tl.minimum(o_e, last))
            # loaded one step early, because addresses depend on it
            b_pair = load_pairs(token_shift + p_pair, tl.minimum(o_e + TOKENS, last))
            b_q = load_gathered(q, b_token.to(tl.int64), o_g, o_d, stride_qn, stride_qh, D, BLOCK_D)
            m_row = (o_e <= last) & (o_rg < G)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_max = tl.max(b_s, 1) * scale
            b_p = tl.exp2(b_s * scale - b_max[:, None])
            b_sum = tl.sum(b_p, 1)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee") * (1.0 / b_sum)[:, None]
            b_lse = b_max + b_shift + tl.log2(b_sum)
            o_slot = load_slots(pair_slot + p_pair, tl.minimum(o_e, last)).to(tl.int64) * G + o_rg
            tl.store(partial_lse + o_slot, b_lse, mask=m_row)
            store_rows(partial, b_out.to(partial.dtype.element_ty), o_slot, m_row, o_d, D)
        here = end
        i_c += 1


@triton.jit(do_not_specialize=["slab"])
def _merge_slots_kernel(
    partial, partial_lse, out, lse, slot, first_tile, slab, chunk_start, chunk_end, tiles_per_head,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, LSES: tl.constexpr,
):  # fmt: skip
    """Merge the parts of every token of a slab, HEADS heads at once, with its output and log-sum-exp so far.

    Log-sum-exps come first and alone. With their total known, each part is loaded once and weighted once, and nothing
    that waits for a maximum so far stands between one load and the next.
    """
    BLOCKS: tl.constexpr = G // HEADS
    first, stop, begin = rows_of_slab(slot, first_tile, slab, T, BLOCKS)
    o_s, o_l, o_g, o_d = tl.arange(0, SLOTS), tl.arange(0, LSES), tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_first, step = first + tl.program_id(0), tl.num_programs(0)
    next_slot, next_end = slots_of_row(slot, i_first, stop, BLOCKS)
    for i_row in range(i_first, stop, step):
        i_slot, count = next_slot, (next_end - next_slot).to(tl.int32)
        # loaded one row early, because everything else depends on them
        next_slot, next_end = slots_of_row(slot, i_row + step, stop, BLOCKS)
        if count > 0:
            i_h, i_n, _ = lane_place(i_row // BLOCKS, chunk_start, chunk_end, tiles_per_head, T, C)
            i_g = i_row % BLOCKS * HEADS
            i_part = (i_slot - begin) * G + i_g
            o_row = (i_n * HKV + i_h) * G + i_g + o_g
            # -inf of a token that saw nothing would make NaN
            own_lse = tl.maximum(tl.load(lse + o_row), -1e30)
            b_max = tl.zeros([LSES, HEADS], tl.float32) + own_lse[None, :]
            b_sum = tl.zeros([LSES, HEADS], tl.float32)
            for i_s in range(0, count, LSES):
                p_lse = partial_lse + i_part + ((i_s + o_l) * G)[:, None] + o_g[None, :]
                b_lse = tl.load(p_lse, mask=(i_s + o_l < count)[:, None], other=float("-inf"))
                b_next = tl.maximum(b_max, b_lse)
                b_sum = b_sum * tl.exp2(b_max - b_next) + tl.exp2(b_lse - b_next)
                b_max = b_next
            most = tl.max(b_max, 0)
            b_sum = tl.sum(b_sum * tl.exp2(b_max - most[None, :]), 0)
            total = most + tl.log2(b_sum + tl.exp2(own_lse - most))
            # [SLOTS, HEADS, BLOCK_D]
            p_part = parts_of_row(partial, i_part, o_s, o_g, o_d, G, D)
            b_acc = tl.zeros([SLOTS, HEADS, BLOCK_D], tl.float32)
            for i_s in range(0, count, SLOTS):
                m_s = i_s + o_s < count
                p_lse = partial_lse + i_part + ((i_s + o_s) * G)[:, None] + o_g[None, :]
                b_lse = tl.load(p_lse, mask=m_s[:, None], other=float("-inf"))
                m_part = m_s[:, None, None] & m_d[None, None, :]
                b_part = tl.load(p_part + i_s * (G * D), mask=m_part, other=0.0)
                b_acc += b_part.to(tl.float32) * tl.exp2(b_lse - total[None, :])[:, :, None]
            p_out = out + (o_row * D)[:, None] + o_d[None, :]
            b_out = tl.load(p_out, mask=m_d[None, :], other=0.0).to(tl.float32)
            b_out = b_out * tl.exp2(own_lse - total)[:, None] + tl.sum(b_acc, 0)
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_d[None, :])
            tl.store(lse + o_row, total)


def merge_pairs(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Lists, slabs: PairSlabs, mean_log: Tensor,
    chunks: Tensor, sizes: Sizes, inv_sigma: float,
) -> None:  # fmt: skip
    """Merge attention to the slabs' pairs into `out` [tokens, Hq, D] and the base-2 `lse` [tokens, Hq], in place."""
    config, D = slabs.by_pair.config, sizes.head_dim
    partial = torch.empty(slabs.room, sizes.group, D, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(slabs.room, sizes.group, dtype=torch.float32, device=q.device)
    constants = sizes.constants
    rows = {name: x for name, x in constants.items() if name not in ("T", "HKV")}
    sums = {name: x for name, x in constants.items() if name != "GP"}
    heads, slots = heads_and_slots(sizes)
    for slab, placed, pairs in filled_slabs(slabs, lists, mean_log, chunks, sizes, inv_sigma, False):
        _attend_pairs_kernel[(slabs.by_pair.parts,)](
            q, k, v, partial, partial_lse, pairs.token_shift, pairs.slot, *placed.work, slab,
            slabs.key_start, slabs.key_start.stride(0), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], D**-0.5 * LOG2_E,
            slabs.key_start.shape[1], sizes.tiles_per_head,
            **rows, ROWS=config.block, STAGES=config.num_stages, num_warps=config.num_warps, maxnreg=config.maxnreg,
        )  # fmt: skip
        _merge_slots_kernel[(slabs.sum_programs,)](
            partial, partial_lse, out, lse, slabs.slot, placed.first_tile, slab, chunks[0], chunks[1], sizes.tiles_per_head,
            **sums, HEADS=heads, SLOTS=slots, LSES=SUM_LSES, num_warps=1, maxnreg=SUM_REGISTERS,
        )  # fmt: skip
