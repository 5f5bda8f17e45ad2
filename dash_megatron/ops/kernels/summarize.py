"""Local chunk summarization: one routing key per chunk, a softmax-weighted mean of its keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import Sizes


@triton.jit
def saturate(b_x, dtype: tl.constexpr):
    """Cast for the router's products; what lies outside float16 becomes its largest number."""
    if dtype == tl.float16:
        b_x = tl.minimum(tl.maximum(b_x.to(tl.float32), -65504.0), 65504.0)
    return b_x.to(dtype)


@triton.jit
def chunk_weights(b_k, b_w, m_t, inv_sqrt_d):
    """Softmax over a chunk's tokens of w.k / sqrt(D): `b_k` [C, D] and `b_w` [D] float32, `m_t` [C] tokens that exist."""
    b_a = tl.sum(b_k * b_w[None, :], 1) * inv_sqrt_d
    b_a = tl.where(m_t, b_a, float("-inf"))
    b_e = tl.exp(b_a - tl.max(b_a, 0))
    return b_e / tl.sum(b_e, 0)


@triton.jit
def summary_gradients(b_k, b_w, b_ds, m_t, inv_sqrt_d):
    """Gradients of keys [C, D] and of w [D] from that of their summary `b_ds` [D]; the rest as in `chunk_weights`."""
    b_beta = chunk_weights(b_k, b_w, m_t, inv_sqrt_d)
    b_dbeta = tl.sum(b_k * b_ds[None, :], 1)
    b_da = b_beta * (b_dbeta - tl.sum(b_beta * b_dbeta, 0)) * inv_sqrt_d
    return b_beta[:, None] * b_ds[None, :] + b_da[:, None] * b_w[None, :], tl.sum(b_da[:, None] * b_k, 0)


@triton.jit
def _summarize_fwd_kernel(
    k, w, summary, chunk_start, chunk_end, stride_kn, stride_kh, stride_wh, inv_sqrt_d, num_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = tl.load(chunk_start + i_c), tl.load(chunk_end + i_c)
    o_t, o_d = start + tl.arange(0, C), tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < end, o_d < D
    p_s = summary + (i_h * num_chunks + i_c) * D + o_d
    if start >= end:
        tl.store(p_s, tl.zeros([BLOCK_D], summary.dtype.element_ty), mask=m_d)
        return
    p_k = k + o_t.to(tl.int64)[:, None] * stride_kn + i_h * stride_kh + o_d[None, :]
    b_k = tl.load(p_k, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_w = tl.load(w + i_h * stride_wh + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_beta = chunk_weights(b_k, b_w, m_t, inv_sqrt_d)
    b_s = tl.sum(b_k * b_beta[:, None], 0)
    tl.store(p_s, saturate(b_s, summary.dtype.element_ty), mask=m_d)


def summarize(k: Tensor, w: Tensor, chunks: Tensor, sizes: Sizes) -> Tensor:
    """Summaries [Hkv, chunks, D] of k [tokens, Hkv, D] and w [Hkv, D]; zero for empty chunks.

    In float32 beside float32 keys, otherwise in float16: bfloat16 would round them eight times as coarsely, and nothing
    else of the router is rounded so much that it shows in the gradient of w.
    """
    dtype = torch.float32 if k.dtype == torch.float32 else torch.float16
    summary = torch.empty(sizes.num_kv_heads, sizes.num_chunks, sizes.head_dim, dtype=dtype, device=k.device)
    _summarize_fwd_kernel[(sizes.num_chunks, sizes.num_kv_heads)](
        k, w, summary, chunks[0], chunks[1], *k.stride()[:2], w.stride(0), sizes.head_dim**-0.5, sizes.num_chunks,
        D=sizes.head_dim, BLOCK_D=sizes.block_d, C=sizes.chunk_size, num_warps=4,
    )  # fmt: skip
    return summary


@triton.jit
def _summarize_bwd_kernel(
    k, w, d_summary, more, dk, dw_chunk, chunk_start, chunk_end, stride_kn, stride_kh, stride_wh, stride_more, parts,
    inv_sqrt_d, num_chunks, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, end = tl.load(chunk_start + i_c), tl.load(chunk_end + i_c)
    o_t, o_d = start + tl.arange(0, C), tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < end, o_d < D
    p_chunk = (i_h * num_chunks + i_c) * D + o_d
    if start >= end:
        tl.store(dw_chunk + p_chunk, tl.zeros([BLOCK_D], tl.float32), mask=m_d)
        return
    m_td = m_t[:, None] & m_d[None, :]
    p_k = k + o_t.to(tl.int64)[:, None] * stride_kn + i_h * stride_kh + o_d[None, :]
    b_k = tl.load(p_k, mask=m_td, other=0.0).to(tl.float32)
    b_w = tl.load(w + i_h * stride_wh + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_ds = tl.load(d_summary + p_chunk, mask=m_d, other=0.0)
    b_dk, b_dw = summary_gradients(b_k, b_w, b_ds, m_t, inv_sqrt_d)
    tl.store(dw_chunk + p_chunk, b_dw, mask=m_d)
    p_dk = (o_t.to(tl.int64) * HKV + i_h)[:, None] * D + o_d[None, :]
    if more is not None:
        b_more, p_more = tl.zeros([C, BLOCK_D], tl.float32), more + p_dk
        for _ in range(parts):
            b_more += tl.load(p_more, mask=m_td, other=0.0).to(tl.float32)
            p_more += stride_more
        b_dk += b_more
    tl.store(dk + p_dk, b_dk.to(dk.dtype.element_ty), mask=m_td)


def summarize_backward(
    d_summary: Tensor, k: Tensor, w: Tensor, chunks: Tensor, sizes: Sizes, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of k [tokens, Hkv, D], all in chunks, in its dtype, and of w, float32 [Hkv, D].

    That of k is added to the sum of `more` [parts, tokens, Hkv, D], if given, whose parts may lie apart; all is rounded once.
    """
    Hkv, nc, D = sizes.num_kv_heads, sizes.num_chunks, sizes.head_dim
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dw_chunk = torch.empty(Hkv, nc, D, dtype=torch.float32, device=k.device)
    _summarize_bwd_kernel[(nc, Hkv)](
        k, w, d_summary, more, dk, dw_chunk, chunks[0], chunks[1], *k.stride()[:2], w.stride(0),
        *((0, 0) if more is None else (more.stride(0), len(more))), D**-0.5, nc,
        HKV=Hkv, D=D, BLOCK_D=sizes.block_d, C=sizes.chunk_size, num_warps=8,
    )  # fmt: skip
    return dk, dw_chunk.sum(1)
