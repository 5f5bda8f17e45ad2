"""Backward over each query tile's list: gradients of queries and of the log priors, then through the router."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.configs import ByPair, Config
from dash_megatron.ops.kernels.geometry import KeyPlaces, Lists, Sizes, own_places, result_dtype
from dash_megatron.ops.kernels.pair_slabs import PairSlabs, plan_slabs
from dash_megatron.ops.kernels.route import routing_products, score_scale
from dash_megatron.ops.kernels.summarize import saturate
from dash_megatron.ops.kernels.threshold import power
from dash_megatron.ops.kernels.tiles import (
    LOG2_E,
    load_entries,
    load_keys,
    load_priors,
    load_rows,
    load_tile,
    own_key_rows,
    own_scores,
    query_tile,
    split_keys,
    spread,
    tile_list,
    tile_rows,
)
from dash_megatron.ops.types import Router

# Most bytes of the float32 gradients of keys and values by pair, which come beside those that are summed over all entries. More, such
# as those of 32 key/value heads of 128 at 1M tokens, might not fit a GPU; then gradients go over tiles.
MAX_PAIR_GRADIENT_BYTES = 2**34


@triton.jit
def _dq_own(
    b_dq, b_q, b_do, b_lse, b_delta, k, v, own_start, own_end, own_keys, o_slot, stride_kn, stride_vn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add the part of a query tile's own chunk, as in `_attend_own`."""
    for i_own in tl.range(0, own_keys, KEYS, num_stages=1):
        b_k, b_v, b_s = own_scores(
            b_q, k, v, i_own, own_start, own_end, o_slot, stride_kn, stride_vn, D, BLOCK_D, KEYS
        )
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit
def _dq_kernel(
    q, k, v, out, d_out, lse, dq, d_prior, delta, centred_lse, list_chunk, list_log_prior, list_offset, list_count, mean_log,
    chunk_start, chunk_end, chunk_first, key_start, key_end, stride_key,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, scale, inv_sqrt_d, inv_sigma, num_chunks,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, SHARDED: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = T * GP
    # list entries that a step takes; or steps that an entry takes
    ENTRIES: tl.constexpr = (KEYS + C - 1) // C
    PARTS: tl.constexpr = (C + KEYS - 1) // KEYS
    i_h, i_tile, own, start, end = query_tile(chunk_start, chunk_end, num_chunks, T, C)
    if start >= end:
        return
    own_start, own_end = own_key_rows(key_start, key_end, stride_key, i_h, own)
    if not SHARDED:
        first = tl.load(chunk_first + own)
        document = tl.load(chunk_start + first)
    _, offset, count = tile_list(list_offset, list_count, i_h, i_tile, num_chunks * (C // T))

    o_r, o_d, o_n, o_g, m_row = tile_rows(start, end, G, GP, T, BLOCK_D)
    m_rd = m_row[:, None] & (o_d < D)[None, :]
    o_row = o_n * (HKV * G) + i_h * G + o_g
    o_rd = o_row[:, None] * D + o_d[None, :]
    b_q = load_tile(q, i_h, o_n, o_g, o_d, m_row, stride_qn, stride_qh, G, D)
    b_do = tl.load(d_out + o_rd, mask=m_rd, other=0.0)
    b_out = tl.load(out + o_rd, mask=m_rd, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + o_row, b_delta, mask=m_row)
    # absent rows get no weight anywhere
    b_lse = tl.load(lse + o_row, mask=m_row, other=float("inf"))
    b_mean = tl.load(mean_log + o_n * HKV + i_h, mask=o_n < end, other=0.0)
    b_centred = b_lse + b_mean * inv_sigma
    tl.store(centred_lse + o_row, b_centred, mask=m_row)
    k += i_h.to(tl.int64) * stride_kh
    v += i_h.to(tl.int64) * stride_vh

    b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    o_slot = i_tile % (C // T) * T + o_r // GP
    if not SHARDED:
        b_dq = _dq_own(
            b_dq, b_q, b_do, b_lse, b_delta, k, v, own_start, own_end, C, o_slot, stride_kn, stride_vn, scale,
            D, BLOCK_D, C // PARTS,
        )  # fmt: skip

    p_chunk = list_chunk + offset
    p_prior = list_log_prior + offset * T + o_r // GP
    if d_prior is not None:
        p_d_prior = d_prior + offset * T + tl.arange(0, T)
        o_entry = tl.arange(0, ENTRIES)
        b_db = tl.zeros([T], tl.float32)
    i_chunk = load_entries(p_chunk, 0, count, KEYS, C)
    for i_s in tl.range(0, tl.cdiv(count, ENTRIES) * PARTS, num_stages=STAGES):
        i_e, i_k = i_s // PARTS * ENTRIES, i_s % PARTS * KEYS
        i_start = (i_chunk if SHARDED else document + (i_chunk - first) * C) + i_k
        # loaded one step early, because addresses depend on it
        i_chunk = load_entries(p_chunk, (i_s + 1) // PARTS * ENTRIES, count, KEYS, C)
        if ENTRIES == 1:
            b_shift = (tl.load(p_prior + i_e * T) * inv_sigma - b_centred)[:, None]
        else:
            b_shift = spread(
                load_priors(p_prior, i_e, count, T, ENTRIES) * inv_sigma - b_centred[:, None], KEYS
            )
        b_k = load_keys(k, i_start, stride_kn, D, BLOCK_D, KEYS, C)
        b_v = load_keys(v, i_start, stride_vn, D, BLOCK_D, KEYS, C)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = tl.exp2(b_s * scale + b_shift) * (b_dp - b_delta[:, None])
        if d_prior is not None:
            # all heads of a group share the prior
            if ENTRIES == 1:
                b_part = tl.sum(tl.reshape(tl.sum(b_ds, 1), (T, GP)), 1)
                b_db = b_part if PARTS == 1 else tl.where(i_k == 0, b_part, b_db + b_part)
                tl.store(p_d_prior + i_e * T, b_db)
            else:
                b_part = tl.sum(tl.reshape(tl.sum(split_keys(b_ds, ENTRIES), 2), (T, GP, ENTRIES)), 1)
                o_e = i_e + o_entry[None, :]
                tl.store(p_d_prior[:, None] + o_e * T, b_part, mask=o_e < count)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    if SHARDED:
        # after the list, as in the forward
        b_dq = _dq_own(
            b_dq, b_q, b_do, b_lse, b_delta, k, v, own_start, own_end, own_end - own_start, o_slot, stride_kn, stride_vn,
            scale, D, BLOCK_D, C // PARTS,
        )  # fmt: skip
    tl.store(dq + o_rd, (b_dq * inv_sqrt_d).to(dq.dtype.element_ty), mask=m_rd)


@triton.jit
def prior_to_probability(b_db, b_log_p, inv_sigma, inv_group):
    """Gradient with respect to one head's probability, from that of the log prior; zero where not selected."""
    m_selected = b_log_p > float("-inf")
    b_mean = tl.exp2(tl.where(m_selected, b_log_p, 0.0))
    return tl.where(m_selected, b_db * (inv_sigma * inv_group) / b_mean, 0.0)


@triton.jit
def entmax_jacobian_root(b_x, b_tau, exponent, ALPHA_15: tl.constexpr):
    """r = p ** (2 - alpha), zero outside the support; u itself for alpha 1.5."""
    b_u = tl.maximum(b_x - b_tau, 0.0)
    # p = u ** exponent and exponent = 1 / (alpha - 1), so that (2 - alpha) * exponent = exponent - 1
    return b_u if ALPHA_15 else power(b_u, exponent - 1)


@triton.jit
def _router_block(
    b_q, b_tau, summary, p_chunk, p_log, p_db, i_e, count, scale, exponent, inv_sigma,
    G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, ALPHA_15: tl.constexpr,
):  # fmt: skip
    """Chunks [BLOCK_S] of a block of list entries, and scores x, r and dp [ROWS, BLOCK_S] of the tile's rows."""
    o_e = i_e + tl.arange(0, BLOCK_S)
    m_e = o_e < count
    o_c = tl.load(p_chunk + o_e, mask=m_e, other=0)
    b_x = routing_products(b_q, summary, o_c, m_e, D, BLOCK_D, True) * scale
    o_et = o_e.to(tl.int64)[None, :] * T + tl.arange(0, T)[:, None]
    b_log = tl.load(p_log + o_et, mask=m_e[None, :], other=float("-inf"))
    b_db = tl.load(p_db + o_et, mask=m_e[None, :], other=0.0)
    b_dp = prior_to_probability(b_db, b_log, inv_sigma, 1.0 / G)
    b_dp = tl.reshape(tl.broadcast_to(b_dp[:, None, :], (T, GP, BLOCK_S)), (T * GP, BLOCK_S))
    b_r = entmax_jacobian_root(b_x, b_tau[:, None], exponent, ALPHA_15)
    return o_c, b_x, tl.where(m_e[None, :], b_r, 0.0), b_dp


@triton.jit
def _router_bwd_kernel(
    q, summary, tau, dq, d_summary, mean_dp, list_chunk, list_log_prior, d_prior, list_offset, list_count,
    chunk_start, chunk_end, chunk_first, chunk_number, head_scaling, d_log_factor, stride_qn, stride_qh, scale,
    gradient_scale,
    exponent, inv_sigma, num_chunks, num_summaries,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr, ALPHA_15: tl.constexpr,
    ATOMIC: tl.constexpr, GRADIENT: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    i_h, i_tile, i_c, start, end = query_tile(chunk_start, chunk_end, num_chunks, T, C)
    if start >= end:
        return
    if head_scaling is not None:
        factor = tl.load(head_scaling + i_h).to(tl.float32)
        scale *= factor
        gradient_scale *= factor
    p_tile, offset, count = tile_list(list_offset, list_count, i_h, i_tile, num_chunks * (C // T))
    if LOCAL > 0:
        # local chunks, which the router does not select, are the last ones listed
        own = i_c if chunk_number is None else tl.load(chunk_number + i_c)
        count -= tl.minimum(own - tl.load(chunk_first + i_c), LOCAL)
    _, o_d, o_n, o_g, m_row = tile_rows(start, end, G, GP, T, BLOCK_D)
    m_rd = m_row[:, None] & (o_d < D)[None, :]
    b_q = load_tile(q, i_h, o_n, o_g, o_d, m_row, stride_qn, stride_qh, G, D)
    b_q = saturate(b_q, summary.dtype.element_ty)
    o_row = o_n * (HKV * G) + i_h * G + o_g
    # absent rows are outside every support
    b_tau = tl.load(tau + o_row, mask=m_row, other=float("inf"))
    summary += i_h.to(tl.int64) * num_summaries * D
    d_summary += i_h.to(tl.int64) * num_summaries * D
    p_chunk, p_log, p_db = list_chunk + offset, list_log_prior + offset * T, d_prior + offset * T

    b_r_sum, b_dp_sum = tl.zeros([T * GP], tl.float32), tl.zeros([T * GP], tl.float32)
    for i_e in range(0, count, BLOCK_S):
        o_c, b_x, b_r, b_dp = _router_block(
            b_q, b_tau, summary, p_chunk, p_log, p_db, i_e, count, scale, exponent, inv_sigma,
            G, GP, T, D, BLOCK_D, BLOCK_S, ALPHA_15,
        )  # fmt: skip
        b_r_sum += tl.sum(b_r, 1)
        b_dp_sum += tl.sum(b_r * b_dp, 1)
    b_mean_dp = b_dp_sum / tl.where(b_r_sum > 0, b_r_sum, 1.0)
    tl.store(mean_dp + o_row, b_mean_dp, mask=m_row)

    o_rd = o_row[:, None] * D + o_d[None, :]
    b_dq, b_dx = tl.zeros([T * GP, BLOCK_D], tl.float32), tl.zeros([T * GP], tl.float32)
    for i_e in range(0, count, BLOCK_S):
        o_c, b_x, b_r, b_dp = _router_block(
            b_q, b_tau, summary, p_chunk, p_log, p_db, i_e, count, scale, exponent, inv_sigma,
            G, GP, T, D, BLOCK_D, BLOCK_S, ALPHA_15,
        )  # fmt: skip
        b_dz = b_r * (b_dp - b_mean_dp[:, None])
        if d_log_factor is not None:
            # scores are proportional to the factor; x is exponent times smaller
            b_dx += tl.sum(b_dz * b_x, 1)
        b_dz = (b_dz * gradient_scale).to(GRADIENT)
        m_e = i_e + tl.arange(0, BLOCK_S) < count
        b_s = load_rows(summary, o_c, D, m_e, D, BLOCK_D).to(GRADIENT)
        b_dq = tl.dot(b_dz, b_s, b_dq, input_precision="ieee")
        if ATOMIC:
            b_d_summary = tl.dot(tl.trans(b_dz), b_q.to(GRADIENT), input_precision="ieee")
            p_ds = d_summary + o_c.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.atomic_add(p_ds, b_d_summary, mask=m_e[:, None] & (o_d < D)[None, :], sem="relaxed")
    if d_log_factor is not None:
        tl.store(d_log_factor + p_tile, tl.sum(b_dx, 0) * exponent)
    b_dq += tl.load(dq + o_rd, mask=m_rd, other=0.0).to(tl.float32)
    tl.store(dq + o_rd, b_dq.to(dq.dtype.element_ty), mask=m_rd)


class QueryGradients(NamedTuple):
    """What `backward_q` returns."""

    dq: Tensor
    """The gradient of q."""
    delta: Tensor
    """float32 [tokens, Hq]: rowsum(dO O)."""
    centred_lse: Tensor
    """float32 [tokens, Hq]: the base-2 log-sum-exp with the prior's mean added."""
    lists: Lists
    """What is left to do for keys and values: the lists as they came, or empty ones where pairs are taken."""
    slabs: PairSlabs | None
    """What `backward_pairs` is to add to all gradients if pairs are taken; None: they never are."""


def backward_q(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, lists: Lists, mean_log: Tensor,
    d_prior: Tensor | None, chunks: Tensor, sizes: Sizes, inv_sigma: float, config: Config, keys: KeyPlaces | None = None,
    by_pair: ByPair | None = None, num_pairs: Tensor | None = None,
) -> QueryGradients:  # fmt: skip
    """Gradient of q [tokens, Hq, D] through attention alone.

    The gradient of the log priors is written to `d_prior` [room, T] where the lists have entries, unless it is None. `keys` is
    as in `attend_forward`, and the gradient of q of `result_dtype`; `by_pair` and `num_pairs` also. By pair, what tokens selected beyond
    their own chunks is left to `backward_pairs`, which writes `d_prior` for pairs selected only.
    """
    sharded, own = keys is not None, own_places(keys, chunks, sizes)
    if keys is None and 8 * k.numel() > MAX_PAIR_GRADIENT_BYTES:
        by_pair = None
    pair_bytes = q[0, 0].nbytes * sizes.group
    slabs = plan_slabs(lists, chunks, sizes, pair_bytes, by_pair, num_pairs, d_prior is not None, keys)
    left = lists if slabs is None else slabs.rest(lists)
    tiled = left if keys is None else left._replace(chunk=keys.row)
    dq = torch.empty(q.shape, dtype=result_dtype(q, keys), device=q.device)
    delta, centred_lse = torch.empty_like(lse), torch.empty_like(lse)
    _dq_kernel[(sizes.num_tiles,)](
        q, k, v, out, d_out, lse, dq, d_prior, delta, centred_lse, *tiled, mean_log, *chunks, *own, own.stride(1),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        sizes.head_dim**-0.5 * LOG2_E, sizes.head_dim**-0.5, inv_sigma, sizes.num_chunks,
        **sizes.constants, KEYS=config.keys, STAGES=config.num_stages, SHARDED=sharded, num_warps=config.num_warps,
        maxnreg=config.maxnreg,
    )  # fmt: skip
    return QueryGradients(dq, delta, centred_lse, left, slabs)


def backward_router(
    q: Tensor, summary: Tensor, tau: Tensor, dq: Tensor, d_prior: Tensor, lists: Lists, chunks: Tensor,
    sizes: Sizes, router: Router, config: Config, deterministic: bool, head_scaling: Tensor | None = None,
    number: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Add the router's part to `dq` in place; `q`, `head_scaling` and `number` are those of `route`.

    Returns:
        Gradient of the summaries, float32 [Hkv, chunks, D], summed with atomics; all zero if `deterministic`, for the
        pass over the transposed lists to fill. The mean of dp that the entmax gradient subtracts, [tokens, Hq]. And the
        gradient of the logarithm of `head_scaling`, float32 [Hkv], if there is one.
    """
    d_summary = torch.zeros(summary.shape, dtype=torch.float32, device=q.device)
    mean_dp = torch.empty_like(tau)
    # tiles without rows write nothing
    d_log = (
        None
        if head_scaling is None
        else torch.zeros(sizes.num_kv_heads, sizes.tiles_per_head, device=q.device)
    )
    local = (chunks[2], number) if router.local_chunks else (None, None)
    _router_bwd_kernel[(sizes.num_tiles,)](
        q, summary, tau, dq, d_summary, mean_dp, lists.chunk, lists.log_prior, d_prior, lists.offset, lists.counts,
        chunks[0], chunks[1], *local, head_scaling, d_log, *q.stride()[:2], score_scale(router, sizes.head_dim),
        router.scaling_factor * sizes.head_dim**-0.5, router.exponent, router.inv_sigma, sizes.num_chunks,
        summary.shape[1],
        **sizes.constants, BLOCK_S=config.block, ALPHA_15=router.alpha == 1.5, ATOMIC=not deterministic,
        # gradients can be too small for float16
        GRADIENT=tl.float32 if q.dtype == torch.float32 else tl.bfloat16, LOCAL=router.local_chunks,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
    )  # fmt: skip
    return d_summary, mean_dp, None if d_log is None else d_log.sum(1)
