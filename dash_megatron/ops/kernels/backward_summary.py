"""Gradient of the chunk summaries from the rows that list each chunk, summed in order; the deterministic way."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.backward_q import entmax_jacobian_root, prior_to_probability
from dash_megatron.ops.kernels.geometry import Sizes
from dash_megatron.ops.kernels.route import score_scale
from dash_megatron.ops.kernels.transpose import Transposed
from dash_megatron.ops.types import Router


@triton.jit
def summary_gradient(
    b_q, b_summary, b_log, p_tau, p_mean_dp, p_d_prior, m_n, score_scale, gradient_scale, exponent, inv_sigma,
    G: tl.constexpr, ALPHA_15: tl.constexpr,
):  # fmt: skip
    """What rows `b_q` [ROWS, D], of which `m_n` list the chunk, add to its summary's gradient [D]."""
    b_dp = prior_to_probability(tl.load(p_d_prior, mask=m_n, other=0.0), b_log, inv_sigma, 1.0 / G)
    b_tau = tl.load(p_tau, mask=m_n, other=float("inf"))
    b_q = b_q.to(tl.float32)
    b_x = tl.sum(b_q * b_summary[None, :], 1) * score_scale
    b_r = tl.where(b_log > float("-inf"), entmax_jacobian_root(b_x, b_tau, exponent, ALPHA_15), 0.0)
    b_mean_dp = tl.load(p_mean_dp, mask=m_n, other=0.0)
    return tl.sum(b_q * (b_r * (b_dp - b_mean_dp) * gradient_scale)[:, None], 0)


class Summaries(NamedTuple):
    """What the pass to keys and values needs to sum the gradient of the summaries as well."""

    tau: Tensor
    mean_dp: Tensor
    summary: Tensor
    d_prior: Tensor
    head_scaling: Tensor | None
    router: Router


def routing_scales(router: Router | None, head_dim: int) -> tuple[float, float, float]:
    """What turns q.s into x, what turns the gradient of a score into that of q.s, and entmax's exponent; zeros without a router."""
    if router is None:
        return 0.0, 0.0, 0.0
    return score_scale(router, head_dim), router.scaling_factor * head_dim**-0.5, router.exponent


def _chunk_of_tokens(start: Tensor, num_tokens: int) -> Tensor:
    """Each token's chunk, [tokens]; `start` is every chunk's first token."""
    token = torch.arange(num_tokens, dtype=start.dtype, device=start.device)
    return torch.searchsorted(start, token, right=True) - 1


@triton.jit
def _d_summary_kernel(
    q, tau, mean_dp, summary, list_log_prior, d_prior, head_scaling, first_local, row_place, row_entry, row_offset, d_summary,
    stride_qn, stride_qh, score_scale, gradient_scale, exponent, inv_sigma, num_chunks,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, ALPHA_15: tl.constexpr,
):  # fmt: skip
    """Gradient of one chunk's summary, tile by tile of those that list the chunk."""
    i_row = tl.program_id(0).to(tl.int64)
    i_h = i_row // num_chunks
    o_r, o_d = tl.arange(0, T * GP), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if head_scaling is not None:
        factor = tl.load(head_scaling + i_h).to(tl.float32)
        score_scale *= factor
        gradient_scale *= factor
    b_summary = tl.load(summary + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_ds = tl.zeros([BLOCK_D], tl.float32)
    for i_e in range(tl.load(row_offset + i_row), tl.load(row_offset + i_row + 1)):
        place, entry = tl.load(row_place + i_e), tl.load(row_entry + i_e)
        m_n = (o_r // GP < (place >> 32)) & (o_r % GP < G)
        if first_local is not None:
            # not routed for this tile
            m_n &= i_row % num_chunks < tl.load(first_local + (place & 0x7FFFFFFF))
        o_n, o_g = (place & 0x7FFFFFFF) + o_r // GP, i_h * G + o_r % GP
        p_q = q + (o_n * stride_qn + o_g * stride_qh)[:, None] + o_d[None, :]
        b_q = tl.load(p_q, mask=m_n[:, None] & m_d[None, :], other=0.0)
        o_list, o_head = entry * T + o_r // GP, o_n * (HKV * G) + o_g
        b_log = tl.load(list_log_prior + o_list, mask=m_n, other=float("-inf"))
        b_ds += summary_gradient(
            b_q, b_summary, b_log, tau + o_head, mean_dp + o_head, d_prior + o_list,
            m_n, score_scale, gradient_scale, exponent, inv_sigma, G, ALPHA_15,
        )  # fmt: skip
    tl.store(d_summary + i_row * D + o_d, b_ds, mask=m_d)


def sum_d_summary(
    q: Tensor, tau: Tensor, mean_dp: Tensor, summary: Tensor, log_prior: Tensor, d_prior: Tensor,
    transposed: Transposed, start: Tensor, number: Tensor | None, sizes: Sizes, router: Router,
    head_scaling: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gradient of the summaries, float32 [Hkv, chunks, D], summed in the order of the lists transposed over all chunks.

    `start` is the first token of each of the queries' chunks; `q`, `number` and `head_scaling` are those of `route`.
    """
    first_local = None
    if router.local_chunks:
        own = _chunk_of_tokens(start, len(q))
        first_local = (own if number is None else number[own]).int() - router.local_chunks
    d_summary = torch.empty(summary.shape, dtype=torch.float32, device=q.device)
    Hkv, nc, D = summary.shape
    _d_summary_kernel[(Hkv * nc,)](
        q, tau, mean_dp, summary, log_prior, d_prior, head_scaling, first_local, *transposed,
        d_summary, *q.stride()[:2], *routing_scales(router, D), router.inv_sigma, nc,
        HKV=Hkv, G=sizes.group, GP=sizes.padded_group, D=D, BLOCK_D=sizes.block_d, T=sizes.tile_tokens,
        ALPHA_15=router.alpha == 1.5, num_warps=4,
    )  # fmt: skip
    return d_summary
