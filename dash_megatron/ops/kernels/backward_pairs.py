"""Backward by gathering: the tokens that selected a chunk are multiplied with it, once for queries, keys and values.

Each pair leaves its part of the gradient of queries; those of a token, one for each chunk that it selected, lie side by side and
are then summed in the order of its list. What a slab's pairs give to keys and values is added to their float32 gradients.
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


@triton.jit(do_not_specialize=["slab"])
def _backward_pairs_kernel(
    q, k, v, d_out, lse, delta, partial, d_prior, dk, dv, dk_sum, dv_sum, token_shift, pair_slot, pair_entry,
    row_place, row_work, part_bound, part_row, first_tile, slab, key_start, stride_key,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, scale, inv_sqrt_d, num_chunks, tiles_per_head,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GP
    here, stop, i_c, i_h, p_place, p_work = part_of_slab(
        row_place, row_work, part_bound, part_row, first_tile, slab, num_chunks, tiles_per_head
    )
    k += i_h * stride_kh
    v += i_h * stride_vh
    key_start += i_h * stride_key
    o_d, o_c, o_token = tl.arange(0, BLOCK_D), tl.arange(0, C), tl.arange(0, TOKENS)
    o_rn, o_rg = tl.arange(0, ROWS) // GP, tl.arange(0, ROWS) % GP
    # absent heads repeat the last one, without weight: loads need no mask
    o_g = i_h * G + tl.minimum(o_rg, G - 1)
    while here < stop:
        i_c, begin, end, p_pair, last = chunk_of_slab(p_place, p_work, i_c, here)
        start = tl.load(key_start + i_c)
        b_k = load_keys(k, start, stride_kn, D, BLOCK_D, C, C)
        b_v = load_keys(v, start, stride_vn, D, BLOCK_D, C, C)
        # turned, so that dimensions are the rows of products: there are more of them than keys
        b_dk, b_dv = tl.zeros([BLOCK_D, C], tl.float32), tl.zeros([BLOCK_D, C], tl.float32)
        first_step, last_step = (here - begin).to(tl.int32), (tl.minimum(stop, end) - begin).to(tl.int32)
        # rows without a token repeat the last one
        b_pair = load_pairs(token_shift + p_pair, tl.minimum(first_step * TOKENS + o_rn, last))
        b_dq = tl.zeros([ROWS, BLOCK_D], partial.dtype.element_ty)
        b_slot = tl.full([ROWS], -1, tl.int32)
        for i_step in tl.range(first_step, last_step, num_stages=STAGES):
            # Of the step before, while this one's rows arrive: written in their own step, the pass took 16% longer on an H200,
            # because rows are asked for behind the last product and nothing was left to do until they came.
            store_rows(partial, b_dq, b_slot.to(tl.int64) * G + o_rg, (b_slot >= 0) & (o_rg < G), o_d, D)
            o_e = i_step * TOKENS + o_rn
            b_slot = tl.where(o_e <= last, load_slots(pair_slot + p_pair, tl.minimum(o_e, last)), -1)
            b_token, _ = tl.split(b_pair)
            o_n = b_token.to(tl.int64)
            b_shift = load_shifts(token_shift + p_pair, tl.minimum(o_e, last))
            # loaded one step early, because addresses depend on it
            b_pair = load_pairs(token_shift + p_pair, tl.minimum(o_e + TOKENS, last))
            b_q = load_gathered(q, o_n, o_g, o_d, stride_qn, stride_qh, D, BLOCK_D)
            b_do = load_gathered(d_out, o_n, o_g, o_d, HKV * G * D, D, D, BLOCK_D)
            m_row = (o_e <= last) & (o_rg < G)
            b_shift = tl.where(m_row, b_shift - tl.load(lse + o_n * (HKV * G) + o_g), float("-inf"))
            b_delta = tl.load(delta + o_n * (HKV * G) + o_g) * inv_sqrt_d
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_p = tl.exp2(b_s * scale + b_shift[:, None])
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_dv = tl.dot(tl.trans(b_do), b_p.to(b_do.dtype), b_dv, input_precision="ieee")
            # with the scale that products with queries and keys need
            b_ds = b_p * (b_dp * inv_sqrt_d - b_delta[:, None])
            if d_prior is not None:
                # all heads of a group share the prior
                b_db = tl.sum(tl.reshape(tl.sum(b_ds, 1), (TOKENS, GP)), 1)
                o_entry = i_step * TOKENS + o_token
                p_entry = tl.load(pair_entry + p_pair + tl.minimum(o_entry, last))
                tl.store(d_prior + p_entry, b_db / inv_sqrt_d, mask=o_entry <= last)
            b_ds = b_ds.to(b_k.dtype)
            b_dk = tl.dot(tl.trans(b_q), b_ds, b_dk, input_precision="ieee")
            b_dq = tl.dot(b_ds, b_k, input_precision="ieee").to(partial.dtype.element_ty)
        store_rows(partial, b_dq, b_slot.to(tl.int64) * G + o_rg, (b_slot >= 0) & (o_rg < G), o_d, D)
        whole = (here == begin) & (stop >= end)
        if whole:
            i_place, stride = (start.to(tl.int64) * HKV + i_h) * D, HKV * D
            p_dk, p_dv = dk + i_place, dv + i_place
        else:
            # Sums of a chunk that parts share wait in slots: one that began in an earlier part in the first of two.
            i_place, stride = (tl.program_id(0) * 2 + (here == begin).to(tl.int64)) * (C * D), D
            p_dk, p_dv = dk_sum + i_place, dv_sum + i_place
        o_sum, m_d = o_c[None, :] * stride + o_d[:, None], (o_d < D)[:, None]
        # one way through the sums, whose registers would otherwise be wanted twice
        b_dk += tl.load(p_dk + o_sum, mask=m_d & whole, other=0.0)
        b_dv += tl.load(p_dv + o_sum, mask=m_d & whole, other=0.0)
        tl.store(p_dk + o_sum, b_dk, mask=m_d)
        tl.store(p_dv + o_sum, b_dv, mask=m_d)
        here = end
        i_c += 1


@triton.jit(do_not_specialize=["slab"])
def _shared_sums_kernel(
    gradients, stride_gradients, sums, stride_sums, row_work, part_bound, part_row, first_tile, slab, key_start, stride_key,
    num_chunks, tiles_per_head, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add the slots of the chunk that began in an earlier part and ends in this one to its gradient, in order."""
    i_part, parts = tl.program_id(0), tl.num_programs(0)
    sums += tl.program_id(1).to(tl.int64) * stride_sums
    gradients += tl.program_id(1).to(tl.int64) * stride_gradients
    part_bound += slab * (parts + 1)
    row_work += slab * (num_chunks + 1)
    here, stop = tl.load(part_bound + i_part), tl.load(part_bound + i_part + 1)
    if here < stop:
        i_c = tl.load(part_row + slab * parts + i_part)
        begin = tl.load(row_work + i_c)
        if (begin < here) & (tl.load(row_work + i_c + 1) <= stop):
            i_first = i_part
            while tl.load(part_bound + i_first) > begin:
                i_first -= 1
            o_c, o_d = tl.arange(0, C), tl.arange(0, BLOCK_D)
            o_sum, m_d = o_c[:, None] * D + o_d[None, :], (o_d < D)[None, :]
            i_h = tl.load(first_tile + slab) // tiles_per_head
            start = tl.load(key_start + i_h * stride_key + i_c).to(tl.int64)
            p_sum = gradients + ((start + o_c) * HKV + i_h)[:, None] * D + o_d[None, :]
            b_sum = tl.load(p_sum, mask=m_d, other=0.0)
            b_sum += tl.load(sums + (i_first * 2 + 1) * (C * D) + o_sum, mask=m_d, other=0.0)
            for i_p in range(i_first + 1, i_part + 1):
                b_sum += tl.load(sums + (i_p * 2) * (C * D) + o_sum, mask=m_d, other=0.0)
            tl.store(p_sum, b_sum, mask=m_d)


@triton.jit(do_not_specialize=["slab"])
def _sum_slots_kernel(
    partial, dq, slot, first_tile, slab, chunk_start, chunk_end, tiles_per_head,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the parts of every token of a slab, HEADS heads at once, to its gradient: its slots are dealt out to SLOTS sums."""
    BLOCKS: tl.constexpr = G // HEADS
    first, stop, begin = rows_of_slab(slot, first_tile, slab, T, BLOCKS)
    o_s, o_g, o_d = tl.arange(0, SLOTS), tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
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
            # [SLOTS, HEADS, BLOCK_D]
            i_part = (i_slot - begin) * G + i_g
            p_part = parts_of_row(partial, i_part, o_s, o_g, o_d, G, D)
            b_sum = tl.zeros([SLOTS, HEADS, BLOCK_D], tl.float32)
            for i_s in range(0, count, SLOTS):
                m_part = (i_s + o_s < count)[:, None, None] & m_d[None, None, :]
                b_sum += tl.load(p_part + i_s * (G * D), mask=m_part, other=0.0).to(tl.float32)
            p_dq = dq + (((i_n * HKV + i_h) * G + i_g + o_g) * D)[:, None] + o_d[None, :]
            b_dq = tl.sum(b_sum, 0) + tl.load(p_dq, mask=m_d[None, :], other=0.0).to(tl.float32)
            tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_d[None, :])


def _sum_slots(
    partial: Tensor, dq: Tensor, slabs: PairSlabs, first_tile: Tensor, slab: int, chunks: Tensor, sizes: Sizes
) -> None:
    """Add the parts of a slab's pairs, [room, G, D] by slot, to `dq` [tokens, Hq, D], in place."""
    constants = {name: x for name, x in sizes.constants.items() if name != "GP"}
    heads, slots = heads_and_slots(sizes)
    _sum_slots_kernel[(slabs.sum_programs,)](
        partial, dq, slabs.slot, first_tile, slab, chunks[0], chunks[1], sizes.tiles_per_head,
        **constants, HEADS=heads, SLOTS=slots, num_warps=1, maxnreg=SUM_REGISTERS,
    )  # fmt: skip


def backward_pairs(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, d_prior: Tensor | None,
    lists: Lists, slabs: PairSlabs | None, mean_log: Tensor, chunks: Tensor, sizes: Sizes, inv_sigma: float,
    d_keys: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Add what the slabs' pairs give to `dq` [tokens, Hq, D], in place, and write their part of `d_prior` as `backward_q` does.

    Returns:
        Gradients of k and v, float32 [2, *k.shape]: `d_keys`, to which the pairs' part was added, or that alone if it is None,
        and None if there are no slabs.
    """
    if slabs is None:
        return d_keys
    if d_keys is None:
        d_keys = torch.zeros(2, *k.shape, device=k.device)
    D, C, parts = sizes.head_dim, sizes.chunk_size, slabs.by_pair.parts
    config, key_start = slabs.by_pair.config, slabs.key_start
    keys = key_start, key_start.stride(0)
    partial = torch.empty(slabs.room, sizes.group, D, dtype=q.dtype, device=q.device)
    sums = torch.empty(2, 2 * parts, C, D, dtype=torch.float32, device=q.device)
    rows = {name: x for name, x in sizes.constants.items() if name != "T"}
    for slab, placed, pairs in filled_slabs(
        slabs, lists, mean_log, chunks, sizes, inv_sigma, d_prior is not None
    ):
        _backward_pairs_kernel[(parts,)](
            q, k, v, d_out, lse, delta, partial, d_prior, *d_keys, *sums, *pairs, *placed.work, slab, *keys,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            D**-0.5 * LOG2_E, D**-0.5, key_start.shape[1], sizes.tiles_per_head,
            **rows, ROWS=config.block, STAGES=config.num_stages, num_warps=config.num_warps, maxnreg=config.maxnreg,
        )  # fmt: skip
        _shared_sums_kernel[(parts, 2)](
            d_keys, d_keys.stride(0), sums, sums.stride(0), *placed.work[1:], slab, *keys, key_start.shape[1],
            sizes.tiles_per_head, HKV=sizes.num_kv_heads, D=D, BLOCK_D=sizes.block_d, C=C, num_warps=4,
        )  # fmt: skip
        _sum_slots(partial, dq, slabs, placed.first_tile, slab, chunks, sizes)
    return d_keys
