"""Entmax block routing: solve every row's threshold, then list the chunks that any token of a query tile selected.

Scores stay on chip and are computed again in every pass. Thresholds are those of `x = (alpha - 1) z`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.configs import Config
from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.summarize import saturate
from dash_megatron.ops.kernels.threshold import (
    power,
    probability,
    quadratic_step,
    threshold_bounds,
    threshold_step,
)
from dash_megatron.ops.kernels.tiles import load_tile, tile_number, tile_place, tile_rows
from dash_megatron.ops.types import Router


def score_scale(router: Router, head_dim: int) -> float:
    """What turns q.s into x, where the router's scaling factor is a number."""
    assert not isinstance(router.scaling_factor, Tensor)
    return (router.alpha - 1) * router.scaling_factor * head_dim**-0.5


@triton.jit
def routing_products(b_q, summary, o_c, m_c, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """q.s [rows, chunks] of rows `b_q` with the chunks `o_c` of one head's summaries; zero where `m_c` is false."""
    o_d = tl.arange(0, BLOCK_D)
    p_s = summary + o_c.to(tl.int64)[:, None] * D + o_d[None, :]
    m_s = m_c[:, None] & (o_d < D)[None, :] if MASKED else (o_d < D)[None, :]
    return tl.dot(b_q, tl.trans(tl.load(p_s, mask=m_s, other=0.0)), input_precision="ieee")


@triton.jit
def _guess_block(
    b_q, summary, i_s, end, scale, b_max, b_tau, b_s0, b_s1, b_s2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ALPHA_15: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take a block into the running maximum and, for alpha 1.5, into running sums; then one step of tau."""
    o_c = i_s + tl.arange(0, BLOCK_S)
    b_x = routing_products(b_q, summary, o_c, o_c < end, D, BLOCK_D, MASKED) * scale
    if MASKED:
        b_x = tl.where((o_c < end)[None, :], b_x, float("-inf"))
    b_max = tl.maximum(b_max, tl.max(b_x, 1))
    if not ALPHA_15:
        return b_max, b_max - 1, b_s0, b_s1, b_s2
    b_next = tl.maximum(b_tau, b_max - 1)
    b_move = b_next - b_tau
    # sums over earlier blocks move along; what fell out of the support meanwhile stays in: it is only a guess
    b_late = (b_move > 1) | (b_s1 <= b_move * b_s0)
    b_s2 = tl.where(b_late, 0.0, b_s2 - 2 * b_move * b_s1 + b_move * b_move * b_s0)
    b_s1 = tl.where(b_late, 0.0, b_s1 - b_move * b_s0)
    b_s0 = tl.where(b_late, 0.0, b_s0)
    b_u = tl.maximum(b_x - b_next[:, None], 0.0)
    b_s0 += tl.sum((b_u > 0).to(tl.float32), 1)
    b_s1 += tl.sum(b_u, 1)
    b_s2 += tl.sum(b_u * b_u, 1)
    b_move = tl.maximum(quadratic_step(b_s0, b_s1, b_s2, 0), 0.0)
    b_s2 += b_move * (b_move * b_s0 - 2 * b_s1)
    return b_max, b_next + b_move, b_s0, b_s1 - b_move * b_s0, b_s2


@triton.jit
def _block_sums(
    b_q, summary, i_s, end, scale, exponent, b_tau,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ALPHA_15: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """For alpha 1.5 count, sum and sum of squares of u = [x - tau]_+; for others 0 and the sums `threshold_step` needs."""
    o_c = i_s + tl.arange(0, BLOCK_S)
    b_x = routing_products(b_q, summary, o_c, o_c < end, D, BLOCK_D, MASKED)
    b_u = tl.maximum(b_x * scale - b_tau[:, None], 0.0)
    if MASKED:
        b_u = tl.where((o_c < end)[None, :], b_u, 0.0)
    if ALPHA_15:
        return tl.sum((b_u > 0).to(tl.float32), 1), tl.sum(b_u, 1), tl.sum(b_u * b_u, 1)
    return b_tau * 0, tl.sum(power(b_u, exponent - 1), 1), tl.sum(power(b_u, exponent), 1)


@triton.jit
def solve_threshold(
    b_q, summary, first, end, scale, exponent, tolerance,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, ALPHA_15: tl.constexpr,
):  # fmt: skip
    """Threshold [ROWS] at which the probabilities of the chunks first <= c < end sum to one."""
    b_zero = tl.zeros([ROWS], tl.float32)
    b_max, b_tau, b_s0, b_s1, b_s2 = b_zero - float("inf"), b_zero - 1e15, b_zero, b_zero, b_zero
    # blocks that are whole need no mask on their scores
    whole = first + (end - first) // BLOCK_S * BLOCK_S
    for i_s in range(first, whole, BLOCK_S):
        b_max, b_tau, b_s0, b_s1, b_s2 = _guess_block(
            b_q, summary, i_s, end, scale, b_max, b_tau, b_s0, b_s1, b_s2, D, BLOCK_D, BLOCK_S, ALPHA_15, False
        )  # fmt: skip
    if whole < end:
        b_max, b_tau, b_s0, b_s1, b_s2 = _guess_block(
            b_q, summary, whole, end, scale, b_max, b_tau, b_s0, b_s1, b_s2, D, BLOCK_D, BLOCK_S, ALPHA_15, True
        )  # fmt: skip
    b_low, b_high = threshold_bounds(b_max, end - first, exponent)
    b_tau = tl.minimum(tl.maximum(b_tau, b_low), b_high)
    passes, moved = 0, tolerance + 1
    while (moved > tolerance) & (passes < 60):
        b_s0, b_s1, b_s2 = b_zero, b_zero, b_zero
        for i_s in range(first, whole, BLOCK_S):
            b_0, b_1, b_2 = _block_sums(
                b_q, summary, i_s, end, scale, exponent, b_tau, D, BLOCK_D, BLOCK_S, ALPHA_15, False
            )
            b_s0, b_s1, b_s2 = b_s0 + b_0, b_s1 + b_1, b_s2 + b_2
        if whole < end:
            b_0, b_1, b_2 = _block_sums(
                b_q, summary, whole, end, scale, exponent, b_tau, D, BLOCK_D, BLOCK_S, ALPHA_15, True
            )
            b_s0, b_s1, b_s2 = b_s0 + b_0, b_s1 + b_1, b_s2 + b_2
        b_next = threshold_step(b_tau, b_low, b_high, b_s0, b_s1, b_s2, exponent, passes, ALPHA_15)
        moved = tl.max(tl.abs(b_next - b_tau), 0)
        b_tau = b_next
        passes += 1
    return b_tau


@triton.jit
def _emit_block(
    b_q, b_tau, m_row, summary, i_s, end, num_listed, scale, exponent, inv_group, p_chunk, p_log_prior,
    D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, GP: tl.constexpr, BLOCK_S: tl.constexpr,
    ALPHA_15: tl.constexpr, WRITE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """List the chunks of a block that any token selected, with mean probabilities; returns the number listed so far."""
    o_c = i_s + tl.arange(0, BLOCK_S)
    b_x = routing_products(b_q, summary, o_c, o_c < end, D, BLOCK_D, MASKED)
    b_u = tl.maximum(b_x * scale - b_tau[:, None], 0.0)
    b_p = probability(b_u, exponent, ALPHA_15)
    b_p = tl.where(m_row[:, None] & (o_c < end)[None, :], b_p, 0.0) if MASKED else b_p
    # [T, BLOCK_S]
    b_mean = tl.sum(tl.reshape(b_p, (T, GP, BLOCK_S)), 1) * inv_group
    b_listed = (tl.max(b_mean, 0) > 0).to(tl.int32)
    if WRITE:
        o_entry = (num_listed + tl.cumsum(b_listed, 0) - b_listed).to(tl.int64)
        tl.store(p_chunk + o_entry, o_c, mask=b_listed > 0)
        p_out = p_log_prior + o_entry[None, :] * T + tl.arange(0, T)[:, None]
        tl.store(p_out, b_mean, mask=(b_listed > 0)[None, :])
    return num_listed + tl.sum(b_listed, 0)


@triton.jit
def _emit(
    b_q, b_tau, m_row, summary, first, end, scale, exponent, inv_group, p_chunk, p_log_prior,
    D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, GP: tl.constexpr, BLOCK_S: tl.constexpr,
    ALPHA_15: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """List the chunks that any token selected: number listed, and per token the number selected and their sum of logs."""
    # absent rows select nothing
    b_tau = tl.where(m_row, b_tau, float("inf"))
    whole = first + (end - first) // BLOCK_S * BLOCK_S
    num_listed = 0
    for i_s in range(first, whole, BLOCK_S):
        num_listed = _emit_block(
            b_q, b_tau, m_row, summary, i_s, end, num_listed, scale, exponent, inv_group, p_chunk, p_log_prior,
            D, BLOCK_D, T, GP, BLOCK_S, ALPHA_15, WRITE, False,
        )  # fmt: skip
    if whole < end:
        num_listed = _emit_block(
            b_q, b_tau, m_row, summary, whole, end, num_listed, scale, exponent, inv_group, p_chunk, p_log_prior,
            D, BLOCK_D, T, GP, BLOCK_S, ALPHA_15, WRITE, True,
        )  # fmt: skip
    b_selected, b_log_sum = tl.zeros([T], tl.int32), tl.zeros([T], tl.float32)
    if WRITE:
        # logarithms of what is listed only; other threads wrote it
        tl.debug_barrier()
        for i_e in range(0, num_listed, BLOCK_S):
            o_e = i_e + tl.arange(0, BLOCK_S)
            p_entry = p_log_prior + o_e.to(tl.int64)[None, :] * T + tl.arange(0, T)[:, None]
            m_e = (o_e < num_listed)[None, :]
            b_mean = tl.load(p_entry, mask=m_e, other=0.0)
            m_selected = b_mean > 0
            b_log = tl.log2(tl.where(m_selected, b_mean, 1.0))
            tl.store(p_entry, tl.where(m_selected, b_log, float("-inf")), mask=m_e)
            b_selected += tl.sum(m_selected.to(tl.int32), 1)
            b_log_sum += tl.sum(b_log, 1)
    return num_listed, b_selected, b_log_sum


@triton.jit
def _route_kernel(
    q, summary, tau, list_chunk, list_log_prior, list_offset, list_count, mean_log, selected,
    chunk_start, chunk_end, chunk_first, chunk_number, head_scaling, stride_qn, stride_qh, scale, exponent, tolerance,
    num_chunks, num_summaries,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr, ALPHA_15: tl.constexpr,
    CENTRE: tl.constexpr, LOCAL: tl.constexpr, SOLVE: tl.constexpr, COUNT: tl.constexpr, EMIT: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = T * GP
    tiles_per_head = num_chunks * (C // T)
    i_h, i_tile = tile_number(tiles_per_head)
    p_tile = i_h.to(tl.int64) * tiles_per_head + i_tile
    i_c, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
    if start >= end:
        tl.store(list_count + p_tile, 0)
        return
    first, own = tl.load(chunk_first + i_c), i_c
    if chunk_number is not None:
        own = tl.load(chunk_number + i_c)
    # one past the last chunk that is routed; local ones follow it
    routed_end = own if LOCAL == 0 else tl.maximum(own - LOCAL, first)
    if head_scaling is not None:
        scale *= tl.load(head_scaling + i_h).to(tl.float32)
    _, o_d, o_n, o_g, m_row = tile_rows(start, end, G, GP, T, BLOCK_D)
    b_q = load_tile(q, i_h, o_n, o_g, o_d, m_row, stride_qn, stride_qh, G, D)
    b_q = saturate(b_q, summary.dtype.element_ty)
    summary += i_h.to(tl.int64) * num_summaries * D
    p_tau = tau + o_n * (HKV * G) + i_h * G + o_g
    b_tau = tl.zeros([ROWS], tl.float32)
    if SOLVE:
        if routed_end > first:
            b_tau = solve_threshold(
                b_q,
                summary,
                first,
                routed_end,
                scale,
                exponent,
                tolerance,
                D,
                BLOCK_D,
                ROWS,
                BLOCK_S,
                ALPHA_15,
            )
        tl.store(p_tau, b_tau, mask=m_row)
    else:
        b_tau = tl.load(p_tau, mask=m_row, other=0.0)
    if COUNT or EMIT:
        offset = tl.load(list_offset + p_tile) if EMIT else 0
        num_listed, b_selected, b_log_sum = _emit(
            b_q, b_tau, m_row, summary, first, routed_end, scale, exponent, 1.0 / G,
            list_chunk + offset, list_log_prior + offset * T,
            D, BLOCK_D, T, GP, BLOCK_S, ALPHA_15, EMIT,
        )  # fmt: skip
        num_local = own - routed_end
        tl.store(list_count + p_tile, num_listed + num_local)
        if EMIT:
            o_t = (start + tl.arange(0, T)).to(tl.int64)
            tl.store(selected + o_t * HKV + i_h, b_selected + 1 + num_local, mask=o_t < end)
            b_mean = b_log_sum / tl.maximum(b_selected, 1) if CENTRE else b_log_sum * 0
            tl.store(mean_log + o_t * HKV + i_h, b_mean, mask=o_t < end)
            if LOCAL > 0:
                for i_local in range(num_local):
                    i_e = offset + num_listed + i_local
                    tl.store(list_chunk + i_e, routed_end + i_local)
                    # the own chunk's prior: as if at the mean
                    tl.store(list_log_prior + i_e * T + tl.arange(0, T), b_mean)


def route(
    q: Tensor, summary: Tensor, chunks: Tensor, offsets: Tensor, sizes: Sizes, router: Router, config: Config,
    number: Tensor | None = None, head_scaling: Tensor | None = None,
) -> tuple[Lists, Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve the entmax of every query, and list the chunks that the tokens of each tile select.

    Args:
        q: the router's queries [tokens, Hq, D].
        summary: [Hkv, chunks, D].
        chunks, offsets: from `chunk_layout`.
        sizes: of the tiles as the router sees them, see `Sizes.of_router`.
        router: its constants.
        config: how the kernel is launched.
        number: which summary is a chunk's own, int32 [chunks]; None if chunks and summaries are numbered alike.
        head_scaling: multiplies the router's scaling factor, for each key/value head [Hkv], contiguous.

    Returns:
        The lists, local chunks last, with a token's mean as their log prior; thresholds [tokens, Hq]; mean log2 probability
        [tokens, Hkv] of a token's routed chunks (zero if the prior is not centred); number of chunks selected, the own one
        and the local ones included, int32 [tokens, Hkv].
    """
    N, Hq, Hkv, T = sizes.num_tokens, sizes.num_heads, sizes.num_kv_heads, sizes.tile_tokens
    tau = torch.empty(N, Hq, dtype=torch.float32, device=q.device)
    mean_log = torch.empty(N, Hkv, dtype=torch.float32, device=q.device)
    selected = torch.empty(N, Hkv, dtype=torch.int32, device=q.device)
    count = torch.empty(sizes.num_tiles, dtype=torch.int32, device=q.device)
    # third-order convergence: a move this small leaves an error below float32's own
    tolerance = 1e-6 if router.alpha != 1.5 else 1e-3 if q.dtype == torch.float32 else 4e-3

    def launch(lists: Lists, SOLVE: bool, COUNT: bool, EMIT: bool) -> None:
        _route_kernel[(sizes.num_tiles,)](
            q, summary, tau, lists.chunk, lists.log_prior, lists.offset, lists.counts, mean_log, selected,
            *chunks, number, head_scaling, *q.stride()[:2],
            score_scale(router, sizes.head_dim), router.exponent, tolerance, sizes.num_chunks, summary.shape[1],
            **sizes.constants, BLOCK_S=config.block, ALPHA_15=router.alpha == 1.5,
            CENTRE=router.estimate_diagonal, LOCAL=router.local_chunks, SOLVE=SOLVE, COUNT=COUNT, EMIT=EMIT,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
        )  # fmt: skip

    def allocate(room: int, offset: Tensor) -> Lists:
        chunk = torch.empty(room, dtype=torch.int32, device=q.device)
        return Lists(chunk, torch.empty(room, T, dtype=torch.float32, device=q.device), offset, count)

    if sizes.lists_are_bounded:
        lists = allocate(sizes.list_bound, offsets)
        launch(lists, SOLVE=True, COUNT=False, EMIT=True)
    else:
        launch(allocate(1, count), SOLVE=True, COUNT=True, EMIT=False)
        total = count.sum(dtype=torch.int64)
        # the host waits here: room for every chunk would be too much
        lists = allocate(max(1, int(total)), count.cumsum(0) - count)
        launch(lists, SOLVE=False, COUNT=False, EMIT=True)
    return lists, tau, mean_log, selected
