"""Backward over the transposed lists: gradients of keys and values, then through the chunk summaries.

Early chunks are listed by almost every tile. So the work of all chunks is concatenated and cut into equal parts, one a program (stream-K); a
chunk cut by a boundary leaves one partial sum per part, which the last kernel adds in order.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.backward_kv_pairs import sum_pairs
from dash_megatron.ops.kernels.backward_summary import (
    Summaries,
    routing_scales,
    summary_gradient,
)
from dash_megatron.ops.kernels.configs import HOPPER, Config, Launches
from dash_megatron.ops.kernels.geometry import Lists, Sizes, own_places
from dash_megatron.ops.kernels.hopper import HOPPER_ROWS, fits_hopper
from dash_megatron.ops.kernels.pairs import plan_pairs
from dash_megatron.ops.kernels.summarize import summary_gradients
from dash_megatron.ops.kernels.tiles import (
    KEYS_AS_ROWS,
    LOG2_E,
    load_rows,
    place_sums,
    step_products,
    store_sums,
)
from dash_megatron.ops.kernels.transpose import Transposed, WorkPartition, partition_work, transpose

# Keys of a chunk that the Hopper kernel takes.
HOPPER_KEYS = 64


@triton.jit
def _dkv_kernel(
    q, k, v, d_out, centred_lse, delta, tau, mean_log, mean_dp, summary, list_log_prior, d_prior, head_scaling,
    row_place, row_entry, row_offset, row_work, part_bound, part_row, dk_sum, dv_sum, ds_sum,
    key_start, key_end, query_start, query_end, stride_table,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    scale, inv_sqrt_d, score_scale, gradient_scale, exponent, inv_sigma, num_chunks,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, ALPHA_15: tl.constexpr,
    SUMMARY: tl.constexpr, DIRECT: tl.constexpr, KEYS_AS_ROWS: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = T * GP // ROWS
    TILES_PER_CHUNK: tl.constexpr = C // T
    i_p = tl.program_id(0).to(tl.int64)
    here, stop = tl.load(part_bound + i_p), tl.load(part_bound + i_p + 1)
    i_row = tl.load(part_row + i_p)
    # programs of the second axis share the work by keys of the chunk
    o_c, o_d = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_rn, o_rg = tl.arange(0, ROWS) // GP, tl.arange(0, ROWS) % GP
    o_head = o_rn * (HKV * G) + o_rg
    o_q = (o_rn * stride_qn + o_rg * stride_qh)[:, None] + o_d[None, :]
    o_do = o_head[:, None] * D + o_d[None, :]
    while here < stop:
        begin, end = tl.load(row_work + i_row), tl.load(row_work + i_row + 1)
        i_h, i_c = i_row // num_chunks, i_row % num_chunks
        p_table = i_h * stride_table + i_c
        o_k = tl.load(key_start + p_table) + o_c
        m_k = o_k < tl.load(key_end + p_table)
        own_start, own_end = tl.load(query_start + p_table), tl.load(query_end + p_table)
        own_tiles = tl.where(own_end > own_start, TILES_PER_CHUNK, 0)
        b_k = load_rows(k + i_h * stride_kh, o_k, stride_kn, m_k, D, BLOCK_D)
        b_v = load_rows(v + i_h * stride_vh, o_k, stride_vn, m_k, D, BLOCK_D)
        b_dk = tl.zeros([KEYS, BLOCK_D] if KEYS_AS_ROWS else [BLOCK_D, KEYS], tl.float32)
        b_dv = tl.zeros([KEYS, BLOCK_D] if KEYS_AS_ROWS else [BLOCK_D, KEYS], tl.float32)
        b_ds = tl.zeros([BLOCK_D], tl.float32)
        if SUMMARY:
            p_s = summary + (i_h * num_chunks + i_c) * D + o_d
            b_summary = tl.load(p_s, mask=m_d, other=0.0).to(tl.float32)
            factor = 1.0 if head_scaling is None else tl.load(head_scaling + i_h).to(tl.float32)
        p_entry = tl.load(row_offset + i_row) - own_tiles
        first_step = (here - begin).to(tl.int32) * STEPS
        last_step = (tl.minimum(stop, end) - begin).to(tl.int32) * STEPS
        i_first = first_step // STEPS
        m_first = (i_first >= own_tiles) & (first_step < last_step)
        i_place = tl.load(row_place + p_entry + i_first, mask=m_first, other=0)
        i_entry = tl.load(row_entry + p_entry + i_first, mask=m_first, other=0)
        for i_step in tl.range(first_step, last_step, num_stages=STAGES):
            i_e, i_r = i_step // STEPS, i_step % STEPS * ROWS
            # a row begins with the tiles of the chunk itself, which no list holds and which have no prior
            listed = i_e >= own_tiles
            t_start = tl.where(listed, (i_place & 0x7FFFFFFF).to(tl.int32), own_start + i_e * T)
            t_end = tl.where(listed, t_start + (i_place >> 32).to(tl.int32), tl.minimum(t_start + T, own_end))
            p_list = i_entry
            # loaded one step early, because addresses depend on them
            i_next = (i_step + 1) // STEPS
            m_next = (i_next >= own_tiles) & (i_step + 1 < last_step)
            i_place = tl.load(row_place + p_entry + i_next, mask=m_next, other=0)
            i_entry = tl.load(row_entry + p_entry + i_next, mask=m_next, other=0)
            # A step's rows are whole tokens, or some heads of one. Only numbers change from step to step, not offsets.
            i_n, i_g = (t_start + i_r // GP).to(tl.int64), i_h * G + i_r % GP
            m_n = (i_n + o_rn < t_end) & (i_r % GP + o_rg < G)
            m_nd = m_n[:, None] & m_d[None, :]
            i_head = i_n * (HKV * G) + i_g
            b_q = tl.load((q + i_n * stride_qn + i_g * stride_qh) + o_q, mask=m_nd, other=0.0)
            b_do = tl.load((d_out + i_head * D) + o_do, mask=m_nd, other=0.0)
            b_lse = tl.load((centred_lse + i_head) + o_head, mask=m_n, other=float("inf"))
            b_delta = tl.load((delta + i_head) + o_head, mask=m_n, other=0.0)
            # a token's own chunk has no prior: as if at the mean, which the log-sum-exp contains
            p_log = tl.where(listed, list_log_prior + p_list * T + i_r // GP, mean_log + i_n * HKV + i_h)
            b_log = tl.load(p_log + o_rn * tl.where(listed, 1, HKV), mask=m_n, other=0.0)

            # later chunks see all of it
            o_slot = tl.where(listed, C, i_e * T + i_r // GP) + o_rn
            b_shift = b_log * inv_sigma - b_lse
            b_shift = b_shift[None, :] if KEYS_AS_ROWS else b_shift[:, None]
            b_dk, b_dv = step_products(
                b_k, b_v, b_q, b_do, b_dk, b_dv, b_shift, b_delta, o_c, o_slot, scale, KEYS_AS_ROWS
            )
            if SUMMARY:
                b_ds += summary_gradient(
                    b_q, b_summary, b_log, tau + i_head + o_head, mean_dp + i_head + o_head,
                    d_prior + p_list * T + i_r // GP + o_rn,
                    m_n & listed, score_scale * factor, gradient_scale * factor, exponent, inv_sigma, G, ALPHA_15,
                )  # fmt: skip
        i_slot, p_row, m_row = place_sums(
            i_p, tl.num_programs(0), i_row, i_h, here == begin, stop >= end, o_c, o_k, m_k, HKV, C, DIRECT
        )
        store_sums(dk_sum, dv_sum, b_dk * inv_sqrt_d, b_dv, p_row, m_row, o_d, m_d, D, KEYS_AS_ROWS)
        if SUMMARY:
            tl.store(ds_sum + i_slot * D + o_d, b_ds, mask=m_d & (tl.program_id(1) == 0))
        here = end
        i_row += 1


@triton.jit
def _finish_kernel(
    k, w, dk_sum, dv_sum, ds_sum, more_dk, more_dv, dk, dv, dw_chunk, row_part, key_start, key_end, stride_table,
    stride_kn, stride_kh, stride_wh, inv_sqrt_d, num_chunks, num_groups, num_parts,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    SUMMARY: tl.constexpr, DIRECT: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one chunk in order, then the gradient through its summary, unless `w` is None.

    Rows of work are groups of WIDTH chunks. Those without work are skipped or, with ZERO, set to zero, and with DIRECT those that
    one part did alone are skipped: their gradients are in place.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_row, i_chunk, i_w = i_h * num_groups + i_c // WIDTH, i_h * num_chunks + i_c, i_c % WIDTH
    o_c, o_d = tl.arange(0, C), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_table = i_h * stride_table + i_c
    start, end = tl.load(key_start + p_table), tl.load(key_end + p_table)
    first_part, last_part = tl.load(row_part + i_row * 2), tl.load(row_part + i_row * 2 + 1)
    if start >= end:
        if w is not None:
            tl.store(dw_chunk + i_chunk * D + o_d, tl.zeros([BLOCK_D], tl.float32), mask=m_d)
        return
    o_n = start + o_c
    m_k = o_n < end
    m_kd = m_k[:, None] & m_d[None, :]
    p_out = (o_n.to(tl.int64) * HKV + i_h)[:, None] * D + o_d[None, :]
    done = first_part < 0
    if ZERO:
        b_zero, m_zero = tl.zeros([C, BLOCK_D], dk.dtype.element_ty), m_kd & done
        tl.store(dk + p_out, b_zero, mask=m_zero)
        tl.store(dv + p_out, b_zero, mask=m_zero)
    if DIRECT:
        done = done | (first_part >= last_part)
    if done:
        return
    o_cd = o_c[:, None] * D + o_d[None, :]
    # where the first sum lies: behind the slots of the parts if whole
    i_slot = tl.where(first_part == last_part, num_parts * 2 + i_row, first_part * 2 + 1) * WIDTH + i_w
    b_dk = tl.load(dk_sum + i_slot * C * D + o_cd, mask=m_kd, other=0.0)
    b_dv = tl.load(dv_sum + i_slot * C * D + o_cd, mask=m_kd, other=0.0)
    if w is not None:
        p_ds = ds_sum + (i_slot if SUMMARY else i_chunk) * D + o_d
        b_ds = tl.load(p_ds, mask=m_d, other=0.0)
    for i_part in range(first_part + 1, last_part + 1):
        i_slot = i_part * 2 * WIDTH + i_w
        b_dk += tl.load(dk_sum + i_slot * C * D + o_cd, mask=m_kd, other=0.0)
        b_dv += tl.load(dv_sum + i_slot * C * D + o_cd, mask=m_kd, other=0.0)
        if SUMMARY:
            b_ds += tl.load(ds_sum + i_slot * D + o_d, mask=m_d, other=0.0)
    if more_dk is not None:
        b_dk += tl.load(more_dk + p_out, mask=m_kd, other=0.0)
        b_dv += tl.load(more_dv + p_out, mask=m_kd, other=0.0)
    if w is not None:
        b_k = load_rows(k + i_h * stride_kh, o_n, stride_kn, m_k, D, BLOCK_D).to(tl.float32)
        b_w = tl.load(w + i_h * stride_wh + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_part, b_dw = summary_gradients(b_k, b_w, b_ds, m_k, inv_sqrt_d)
        b_dk += b_part
        tl.store(dw_chunk + i_chunk * D + o_d, b_dw, mask=m_d)
    tl.store(dk + p_out, b_dk.to(dk.dtype.element_ty), mask=m_kd)
    tl.store(dv + p_out, b_dv.to(dv.dtype.element_ty), mask=m_kd)


def _sum_parts(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, mean_log: Tensor,
    log_prior: Tensor, transposed: Transposed, partition: WorkPartition, keys: Tensor, queries: Tensor, sums: Tensor,
    ds_sum: Tensor | None, summaries: Summaries | None, sizes: Sizes, inv_sigma: float, config: Config, direct: bool,
) -> None:  # fmt: skip
    """Fill the partial sums of dk and dv [2, slots, C, D] and, with `summaries`, of their gradient [slots, D].

    There are two slots a part, then one for each row, [Hkv, chunks]; with `direct` the latter are replaced by the gradients
    of the whole buffer [m, Hkv, D], to which rows that one part does alone are written. `keys` and `queries`, int32 [2, Hkv, chunks],
    give first row and one past the last of every chunk's keys and of the queries of the same chunk, equal if absent.
    """
    D = sizes.head_dim
    tau, mean_dp, summary, d_prior, head_scaling, router = summaries or (None,) * 6
    _dkv_kernel[(len(partition.row), sizes.chunk_size // config.keys)](
        q, k, v, d_out, centred_lse, delta, tau, mean_log, mean_dp, summary, log_prior, d_prior, head_scaling,
        *transposed, *partition, *sums, ds_sum, *keys, *queries, keys.stride(1),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        D**-0.5 * LOG2_E, D**-0.5, *routing_scales(router, D), inv_sigma, keys.shape[2],
        **sizes.constants, KEYS=config.keys, ROWS=min(config.block, sizes.tile_rows), STAGES=config.num_stages,
        ALPHA_15=router is not None and router.alpha == 1.5, SUMMARY=summaries is not None, DIRECT=direct,
        KEYS_AS_ROWS=config.keys >= KEYS_AS_ROWS, num_warps=config.num_warps,
    )  # fmt: skip


def _finish(
    k: Tensor, w: Tensor | None, sums: Tensor, ds_sum: Tensor | None, dk: Tensor, dv: Tensor, dw_chunk: Tensor | None,
    partition: WorkPartition, width: int, keys: Tensor, sizes: Sizes, sum_summaries: bool, direct: bool,
    more: Tensor | None = None, zero: bool = False,
) -> None:  # fmt: skip
    """Add up the partial sums and `more`, float32 [2, *k.shape]. With `w` also add the gradient through the summaries, and write that of w
    for each chunk, `dw_chunk` [Hkv, chunks, D].

    Rows of the partition are groups of `width` chunks. With `direct` rows that one part did alone are skipped: they are in `dk` and `dv` already.
    Chunks without work are set to zero with `zero`, and otherwise skipped.
    """
    nc, D = keys.shape[2], sizes.head_dim
    ends = torch.stack([partition.work[:-1], partition.work[1:] - 1], dim=1)
    row_part = torch.searchsorted(partition.bound, ends, right=True) - 1
    # rows without work are those of another pass, or of no chunk
    row_part.masked_fill_((ends[:, 1] < ends[:, 0])[:, None], -1)
    _finish_kernel[(nc, sizes.num_kv_heads)](
        k, w, *sums, ds_sum, *((None, None) if more is None else more), dk, dv, dw_chunk, row_part, *keys, keys.stride(1),
        *k.stride()[:2], 0 if w is None else w.stride(0), D**-0.5, nc, triton.cdiv(nc, width), len(partition.row),
        HKV=sizes.num_kv_heads, D=D, BLOCK_D=sizes.block_d, C=sizes.chunk_size, WIDTH=width, SUMMARY=sum_summaries, DIRECT=direct,
        ZERO=zero, num_warps=8,
    )  # fmt: skip


class _Pass(NamedTuple):
    """What one kernel summed for each part of the work; the parts of a chunk are still to be added up."""

    sums: Tensor
    """Gradients of keys and values, float32 [2, slots, width * C, D]; with `direct` a flat buffer for each."""
    ds_sum: Tensor | None
    """Gradients of summaries, float32 [slots, width, D]; None where they are not summed here."""
    partition: WorkPartition
    width: int
    """Neighbouring chunks that one row of the partition stands for."""


def _num_slots(partition: WorkPartition) -> int:
    """Slots of the partial sums: two for each part of the work, then one for each row."""
    return 2 * len(partition.row) + len(partition.work) - 1


def _passes(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, mean_log: Tensor, lists: Lists,
    window: tuple[int, int], chunks: Tensor, keys: Tensor, queries: Tensor, summaries: Summaries | None, sizes: Sizes,
    inv_sigma: float, launches: Launches, direct: bool, zeros: bool = False,
) -> list[_Pass]:  # fmt: skip
    """The partial sums over pairs, over tiles, or over both where the device chooses: one of the two then has no work.

    With `zeros` rows of the buffer to which nothing is written are zero.
    """
    rows = q, k, v, d_out, centred_lse, delta, mean_log
    found: list[_Pass] = []
    taken = None

    def allocate(partition: WorkPartition, width: int) -> _Pass:
        slots, C, D = _num_slots(partition), width * sizes.chunk_size, sizes.head_dim
        ds_sum = None
        if summaries is not None:
            ds_sum = torch.empty(slots, width, D, dtype=torch.float32, device=k.device)
        if direct:
            # The buffer may hold few of the window's chunks: no slots for all of these.
            sums = torch.empty(2, 2 * len(partition.row) * C * D + k.numel(), device=k.device)
            if zeros:
                # one after the other is contiguous, and takes less than half the time
                for part in sums:
                    part[-k.numel() :] = 0
        else:
            sums = torch.empty(2, slots, C, D, dtype=torch.float32, device=k.device)
        found.append(_Pass(sums, ds_sum, partition, width))
        return found[-1]

    if launches.pairs_above < math.inf:
        config = launches.pairs
        width, step = max(1, config.keys // sizes.chunk_size), config.block // sizes.group
        plan = plan_pairs(
            lists, chunks, queries, sizes, window, width, launches.pair_parts, step, launches.pairs_above
        )  # fmt: skip
        sums, ds_sum, *_ = allocate(plan.partition, width)
        sum_pairs(
            *rows, lists, plan, chunks, keys, queries, sums, ds_sum, summaries, sizes, inv_sigma, config, direct
        )  # fmt: skip
        taken = plan.taken
    if launches.pairs_above > 0:
        transposed = transpose(lists, chunks, sizes, window)
        partition = partition_work(transposed, queries, sizes, launches.parts, taken)
        sums, ds_sum, *_ = allocate(partition, 1)
        if not direct and summaries is None and _takes_hopper(q, k, v, sizes, launches.keys):
            from dash_megatron.ops.kernels.backward_kv_hopper import sum_hopper

            sum_hopper(
                *rows, lists.log_prior, transposed, partition, sums, chunks, sizes, inv_sigma, launches.keys
            )
        else:
            _sum_parts(
                *rows, lists.log_prior, transposed, partition, keys, queries, sums, ds_sum, summaries, sizes, inv_sigma,
                launches.keys, direct,
            )  # fmt: skip
    return found


def _takes_hopper(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, config: Config) -> bool:
    return (
        config.kernel == HOPPER
        and sizes.chunk_size == HOPPER_KEYS
        and sizes.group == sizes.padded_group
        and sizes.tile_rows % HOPPER_ROWS == 0
        and fits_hopper(q, k, v, sizes)
    )


def backward_kv(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, mean_log: Tensor, lists: Lists,
    chunks: Tensor, sizes: Sizes, inv_sigma: float, launches: Launches, key_sums: Tensor | None = None,
    w: Tensor | None = None, d_summary: Tensor | None = None, summaries: Summaries | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k and v, [tokens, Hkv, D] in their dtype, and of w, float32 [Hkv, D].

    With `w` and `d_summary` they go through the summaries too; without, that of w is empty. With `summaries` the gradient of the
    summaries is summed here, in order, instead of taken from `d_summary`.
    """
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dw_chunk = None if d_summary is None else dk.new_empty(d_summary.shape, dtype=torch.float32)
    places = own_places(None, chunks, sizes)
    for sums, ds_sum, partition, width in _passes(
        q, k, v, d_out, centred_lse, delta, mean_log, lists, (0, sizes.num_chunks), chunks, places, places, summaries,
        sizes, inv_sigma, launches, False,
    ):  # fmt: skip
        ds_sum = d_summary if ds_sum is None else ds_sum
        _finish(
            k, w, sums, ds_sum, dk, dv, dw_chunk, partition, width, places, sizes, summaries is not None, False, key_sums
        )  # fmt: skip
    return dk, dv, dk.new_empty(0) if dw_chunk is None else dw_chunk.sum(1)


def backward_kv_buffer(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, mean_log: Tensor, lists: Lists,
    window: tuple[int, int], chunks: Tensor, keys: Tensor, queries: Tensor, sizes: Sizes, inv_sigma: float,
    launches: Launches, whole: bool,
) -> Tensor:  # fmt: skip
    """Float32 gradients of a buffer's k and v, [2, rows, Hkv, D], through attention alone; zero in rows of no chunk unless it is `whole`.

    `keys` and `queries` are those of `_sum_parts`, of the chunks in the window first <= c < last, in which those of the lists lie.
    """
    parts = []
    for sums, _, partition, width in _passes(
        q, k, v, d_out, centred_lse, delta, mean_log, lists, window, chunks, keys, queries, None, sizes, inv_sigma,
        launches, True, not whole,
    ):  # fmt: skip
        d_keys = sums[:, -k.numel() :].unflatten(1, k.shape)
        dk, dv = d_keys
        _finish(k, None, sums, None, dk, dv, None, partition, width, keys, sizes, False, True, zero=whole)
        parts.append(d_keys)
    # where there are two, one is zero
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
