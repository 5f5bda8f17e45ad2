"""Writing keys and values to a decode cache, with the summaries of the chunks they complete.

A program takes one chunk that new tokens of a sequence fall into, for one head. Keys of the chunk that came earlier lie in
the cache. The last program of a sequence moves its length on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.decode_pool import keep
from dash_megatron.ops.kernels.decode_route import chunk_place
from dash_megatron.ops.kernels.geometry import next_power_of_two
from dash_megatron.ops.kernels.summarize import chunk_weights, saturate


@triton.jit
def _finish(lengths, arrived, i_b, start, end, C: tl.constexpr, HKV: tl.constexpr):
    """Count this program as done; the last one of its sequence sets the length."""
    programs = ((end - 1) // C - start // C + 1) * HKV
    # every thread has read the length
    tl.debug_barrier()
    if tl.atomic_add(arrived + i_b, 1) == programs - 1:
        tl.store(lengths + i_b, end)
        tl.store(arrived + i_b, 0)


@triton.jit
def _write_kernel(
    k_new, v_new, w, routing_k, k, v, summary, routing_keys, lengths, arrived, page_table, cu_seqlens, active, tile_sequence, tile_chunk,
    stride_in, stride_ih, stride_vn, stride_vh, stride_wh, stride_kp, stride_kn, stride_kh,
    stride_sp, stride_sc, stride_sh, stride_table, chunks_per_page, max_chunks, inv_sqrt_d,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, KEPT: tl.constexpr, PAGED: tl.constexpr,
    RAGGED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    i_t, i_h = tl.program_id(0) // HKV, (tl.program_id(0) % HKV).to(tl.int64)
    i_b, first, num = i_t, i_t, 1
    if RAGGED:
        i_b = tl.load(tile_sequence + i_t)
        if i_b < 0:
            return
        first = tl.load(cu_seqlens + i_b)
        num = tl.load(cu_seqlens + i_b + 1) - first
    if GATED and tl.load(active + i_b) == 0:
        return
    start = tl.load(lengths + i_b)
    end = start + num
    i_c = tl.load(tile_chunk + i_t) if RAGGED else start // C
    # what does not fit is counted, so that it shows, but not written
    if i_c < max_chunks:
        o_t, o_d = i_c * C + tl.arange(0, C), tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        m_new, m_old = ((o_t >= start) & (o_t < end))[:, None] & m_d, (o_t < start)[:, None] & m_d
        place = chunk_place(page_table, i_b, i_c, i_c < max_chunks, stride_table, chunks_per_page, PAGED)
        i_page, i_slot = (place // chunks_per_page).to(tl.int64), place % chunks_per_page
        o_in = (first + o_t - start).to(tl.int64)[:, None]
        b_k = tl.load(k_new + o_in * stride_in + i_h * stride_ih + o_d[None, :], mask=m_new, other=0.0)
        b_v = tl.load(v_new + o_in * stride_vn + i_h * stride_vh + o_d[None, :], mask=m_new, other=0.0)
        o_row = i_slot.to(tl.int64) * C + tl.arange(0, C)
        p_kv = i_page * stride_kp + o_row[:, None] * stride_kn + i_h * stride_kh + o_d[None, :]
        p_old, b_new = k + p_kv, b_k
        if routing_k is not None:
            o_kept = (i_b.to(tl.int64) * KEPT + o_t % KEPT) * HKV + i_h
            p_old = routing_keys + o_kept[:, None] * D + o_d[None, :]
            b_new = tl.load(routing_k + (o_in * HKV + i_h) * D + o_d[None, :], mask=m_new, other=0.0)
        if (i_c + 1) * C <= end:
            b_all = tl.where(m_new, b_new, tl.load(p_old, mask=m_old, other=0.0)).to(tl.float32)
            b_w = tl.load(w + i_h * stride_wh + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_beta = chunk_weights(b_all, b_w, o_t < end, inv_sqrt_d)
            b_s = tl.sum(b_all * b_beta[:, None], 0)
            p_s = summary + i_page * stride_sp + i_slot * stride_sc + i_h * stride_sh + o_d
            tl.store(p_s, saturate(b_s, summary.dtype.element_ty), mask=o_d < D)
        if routing_k is not None and not RAGGED:
            # of several tokens, one's slot may be that of an old key which another program reads
            tl.store(p_old, b_new, mask=m_new)
        tl.store(k + p_kv, b_k, mask=m_new)
        tl.store(v + p_kv, b_v, mask=m_new)
    _finish(lengths, arrived, i_b, start, end, C, HKV)


def _tiles(lengths: Tensor, cu_seqlens: Tensor, num_tokens: int, C: int) -> tuple[Tensor, Tensor]:
    """Sequence (-1: none) and chunk, int32 [tiles], of every chunk that new tokens fall into; never waits for the device."""
    start, num = lengths.long(), cu_seqlens.long().diff()
    first = start // C
    count = torch.where(num > 0, (start + num - 1) // C - first + 1, 0)
    end = count.cumsum(0)
    tile = torch.arange(min(num_tokens, num_tokens // C + 2 * len(lengths)), device=lengths.device)
    sequence = torch.searchsorted(end, tile, right=True)
    exists = sequence < len(lengths)
    at = sequence.clamp_max(len(lengths) - 1)
    return torch.where(exists, sequence, -1).int(), (first[at] + tile - (end - count)[at]).int()


@torch.library.custom_op(
    "dash_megatron::dash_cache_write",
    mutates_args=("k", "v", "summary", "routing_keys", "lengths", "arrived"),
)
def cache_write(
    k_new: Tensor,
    v_new: Tensor,
    w: Tensor,
    routing_k: Tensor | None,
    k: Tensor,
    v: Tensor,
    summary: Tensor,
    routing_keys: Tensor | None,
    lengths: Tensor,
    arrived: Tensor,
    page_table: Tensor | None,
    cu_seqlens: Tensor | None,
    active: Tensor | None,
    chunk_size: int,
) -> None:
    """Append k_new and v_new [tokens, Hkv, D] to the sequences: one token each, or those between `cu_seqlens`.

    Beside `routing_keys`, routing_k is as k_new and what is summarized. The rest is as in `DashCache`; `arrived` int32 [B] is zero
    before and after.
    """
    (tokens, Hkv, D), per_page = k_new.shape, summary.shape[1]
    k_new, v_new, w = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_new, v_new, w))
    routing_k = None if routing_k is None else routing_k.contiguous()
    sequence = chunk = before = None
    tiles = tokens
    if cu_seqlens is not None:
        sequence, chunk = _tiles(lengths, cu_seqlens, tokens, chunk_size)
        tiles = len(sequence)
        before = None if routing_k is None else lengths.clone()
    stride_table, max_pages = (0, 1) if page_table is None else (page_table.stride(0), page_table.shape[1])
    _write_kernel[(tiles * Hkv,)](
        k_new, v_new, w, routing_k, k, v, summary, routing_keys, lengths, arrived, page_table, cu_seqlens, active, sequence, chunk,
        *k_new.stride()[:2], *v_new.stride()[:2], w.stride(0),
        *k.stride()[:3], *summary.stride()[:3],
        stride_table, per_page, per_page * max_pages, D**-0.5,
        HKV=Hkv, D=D, BLOCK_D=next_power_of_two(D), C=chunk_size, KEPT=1 if routing_keys is None else routing_keys.shape[1],
        PAGED=page_table is not None, RAGGED=cu_seqlens is not None, GATED=active is not None, num_warps=4,
    )  # fmt: skip
    if before is not None and routing_k is not None and routing_keys is not None and cu_seqlens is not None:
        keep(routing_k, routing_keys, before, cu_seqlens)


@cache_write.register_fake
def _cache_write_fake(*_):
    return None
