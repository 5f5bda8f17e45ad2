"""Prior-induced sparse softmax, forward: one program a query tile, online softmax over the chunks in its list."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.attend_pairs import merge_pairs
from dash_megatron.ops.kernels.configs import PLAIN, ByPair, Config
from dash_megatron.ops.kernels.geometry import KeyPlaces, Lists, Sizes, own_places, result_dtype
from dash_megatron.ops.kernels.hopper import HOPPER_ROWS, fits_hopper
from dash_megatron.ops.kernels.pair_slabs import plan_slabs
from dash_megatron.ops.kernels.tiles import (
    LOG2_E,
    load_entries,
    load_keys,
    load_priors,
    load_tile,
    own_key_rows,
    own_scores,
    query_tile,
    split_keys,
    spread,
    tile_list,
    tile_rows,
)


@triton.jit
def _accumulate(b_acc, b_sum, b_max, b_s, b_shift, b_v, scale, ENTRIES: tl.constexpr = 1):
    """One step of online softmax with scores `scale * b_s + b_shift` in base 2, where the keys of each of ENTRIES list entries
    share a shift: [rows] of one, [rows, ENTRIES] of more."""
    if ENTRIES == 1:
        b_next = tl.maximum(b_max, tl.max(b_s, 1) * scale + b_shift)
        b_offset = (b_shift - b_next)[:, None]
    else:
        b_most = tl.max(split_keys(b_s, ENTRIES), 2) * scale + b_shift
        b_next = tl.maximum(b_max, tl.max(b_most, 1))
        b_offset = spread(b_shift - b_next[:, None], b_s.shape[1])
    b_p = tl.exp2(b_s * scale + b_offset)
    b_alpha = tl.exp2(b_max - b_next)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision="ieee")
    return b_acc, b_sum, b_next


@triton.jit
def _attend_own(
    b_acc, b_sum, b_max, b_q, k, v, own_start, own_end, own_keys, o_slot, stride_kn, stride_vn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the first `own_keys` of a query tile's own chunk; row r sees those up to `o_slot[r]`."""
    for i_own in tl.range(0, own_keys, KEYS, num_stages=1):
        _, b_v, b_s = own_scores(
            b_q, k, v, i_own, own_start, own_end, o_slot, stride_kn, stride_vn, D, BLOCK_D, KEYS
        )
        b_acc, b_sum, b_max = _accumulate(b_acc, b_sum, b_max, b_s, b_sum * 0, b_v, scale)
    return b_acc, b_sum, b_max


@triton.jit
def _attend_fwd_kernel(
    q, k, v, out, lse, list_chunk, list_log_prior, list_offset, list_count, mean_log,
    chunk_start, chunk_end, chunk_first, key_start, key_end, stride_key,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, scale, inv_sigma, num_chunks,
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
    p_head = (i_h * G + o_g)[:, None]
    b_q = load_tile(q, i_h, o_n, o_g, o_d, m_row, stride_qn, stride_qh, G, D)
    b_mean = tl.load(mean_log + o_n * HKV + i_h, mask=o_n < end, other=0.0)
    k += i_h.to(tl.int64) * stride_kh
    v += i_h.to(tl.int64) * stride_vh

    b_acc, b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS], tl.float32)
    # finite if SHARDED: a token that sees none of the listed chunks would get NaN from -inf
    b_max = b_sum - (1e30 if SHARDED else float("inf"))
    o_slot = i_tile % (C // T) * T + o_r // GP
    if not SHARDED:
        # own chunk first: every token sees itself, so the running maximum is finite ever after
        b_acc, b_sum, b_max = _attend_own(
            b_acc, b_sum, b_max, b_q, k, v, own_start, own_end, C, o_slot, stride_kn, stride_vn, scale,
            D, BLOCK_D, C // PARTS,
        )  # fmt: skip

    p_chunk = list_chunk + offset
    p_prior = list_log_prior + offset * T + o_r // GP
    i_chunk = load_entries(p_chunk, 0, count, KEYS, C)
    for i_s in tl.range(0, tl.cdiv(count, ENTRIES) * PARTS, num_stages=STAGES):
        i_e = i_s // PARTS * ENTRIES
        # Past chunks of a document are whole, so that their number tells where they start; lists of SHARDED hold the start.
        i_start = (i_chunk if SHARDED else document + (i_chunk - first) * C) + i_s % PARTS * KEYS
        # loaded one step early, because addresses depend on it
        i_chunk = load_entries(p_chunk, (i_s + 1) // PARTS * ENTRIES, count, KEYS, C)
        if ENTRIES == 1:
            b_shift = (tl.load(p_prior + i_e * T) - b_mean) * inv_sigma
        else:
            b_shift = (load_priors(p_prior, i_e, count, T, ENTRIES) - b_mean[:, None]) * inv_sigma
        b_k = load_keys(k, i_start, stride_kn, D, BLOCK_D, KEYS, C)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_v = load_keys(v, i_start, stride_vn, D, BLOCK_D, KEYS, C)
        b_acc, b_sum, b_max = _accumulate(b_acc, b_sum, b_max, b_s, b_shift, b_v, scale, ENTRIES)

    if SHARDED:
        # The own chunk may be absent, so that its loop has no fixed length; ahead of the other loop it would slow it down.
        b_acc, b_sum, b_max = _attend_own(
            b_acc, b_sum, b_max, b_q, k, v, own_start, own_end, own_end - own_start, o_slot, stride_kn, stride_vn, scale,
            D, BLOCK_D, C // PARTS,
        )  # fmt: skip
        # a token that sees nothing here: output 0, log-sum-exp -inf
        b_max = tl.where(b_sum > 0, b_max, float("-inf"))
        b_sum = tl.where(b_sum > 0, b_sum, 1.0)
    p_out = out + (o_n * (HKV * G))[:, None] * D + p_head * D + o_d[None, :]
    b_out = b_acc / b_sum[:, None]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])
    tl.store(lse + o_n * (HKV * G) + i_h * G + o_g, b_max + tl.log2(b_sum), mask=m_row)


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, mean_log: Tensor, chunks: Tensor,
    sizes: Sizes, inv_sigma: float, config: Config, keys: KeyPlaces | None = None, by_pair: ByPair | None = None,
    num_pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [tokens, Hq, D] and base-2 log-sum-exp [tokens, Hq] of q [tokens, Hq, D], k and v [tokens, Hkv, D].

    Keys and values may lie elsewhere than the queries: then `keys` says where. The output is of `result_dtype`, zero beside a
    log-sum-exp of -inf for tokens that see none of the keys.

    Where `by_pair` says so, tiles attend to their own chunks only, and what else each token selected is merged by pair.
    `num_pairs` is that of `plan_slabs`.
    """
    pair_bytes = sizes.group * (q[0, 0].nbytes + 4)
    slabs = plan_slabs(lists, chunks, sizes, pair_bytes, by_pair, num_pairs, False, keys)
    tiled = lists if slabs is None else slabs.rest(lists)
    out, lse = _attend_tiles(q, k, v, tiled, mean_log, chunks, sizes, inv_sigma, config, keys)
    if slabs is not None:
        merge_pairs(q, k, v, out, lse, lists, slabs, mean_log, chunks, sizes, inv_sigma)
    return out, lse


def _attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, mean_log: Tensor, chunks: Tensor,
    sizes: Sizes, inv_sigma: float, config: Config, keys: KeyPlaces | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend_forward` over tiles alone."""
    sharded, own = keys is not None, own_places(keys, chunks, sizes)
    if keys is not None:
        lists = lists._replace(chunk=keys.row)
    if (
        config.kernel != PLAIN
        and sizes.tile_rows == 2 * HOPPER_ROWS
        and fits_hopper(q, k, v, sizes, (32, 64, 128))
    ):
        from dash_megatron.ops.kernels.attend_hopper import attend_forward_hopper

        return attend_forward_hopper(q, k, v, lists, mean_log, chunks, sizes, inv_sigma, config, keys)
    out = torch.empty(q.shape, dtype=result_dtype(q, keys), device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _attend_fwd_kernel[(sizes.num_tiles,)](
        q, k, v, out, lse, *lists, mean_log, *chunks, *own, own.stride(1),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        sizes.head_dim**-0.5 * LOG2_E, inv_sigma, sizes.num_chunks,
        **sizes.constants, KEYS=config.keys, STAGES=config.num_stages, SHARDED=sharded, num_warps=config.num_warps,
    )  # fmt: skip
    return out, lse
