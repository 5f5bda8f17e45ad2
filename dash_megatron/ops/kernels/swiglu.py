"""SwiGLU: both halves are read once in either pass. Compiled by torch, the backward would load all of them for every element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _swiglu_forward_kernel(halves, out, words, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < words
    b_gate = tl.load(halves + i_m * 2 * words + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_linear = tl.load(halves + i_m * 2 * words + words + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_out = b_gate / (1 + tl.exp(-b_gate)) * b_linear
    tl.store(out + i_m * words + o_v, b_out.to(out.dtype.element_ty), mask=m_v)


@triton.jit
def _swiglu_backward_kernel(halves, d_out, d_halves, words, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < words
    b_d = tl.load(d_out + i_m * words + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_gate = tl.load(halves + i_m * 2 * words + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_linear = tl.load(halves + i_m * 2 * words + words + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_s = 1 / (1 + tl.exp(-b_gate))
    b_dgate = b_d * b_linear * b_s * (1 + b_gate * (1 - b_s))
    p_d = d_halves + i_m * 2 * words + o_v
    tl.store(p_d, b_dgate.to(d_halves.dtype.element_ty), mask=m_v)
    tl.store(p_d + words, (b_d * b_gate * b_s).to(d_halves.dtype.element_ty), mask=m_v)


def _launch(kernel, halves: Tensor, *others: Tensor) -> None:
    words = halves.shape[-1] // 2
    block = min(MOST_BLOCK, triton.next_power_of_2(words))
    grid = halves.numel() // (2 * words), triton.cdiv(words, block)
    kernel[grid](halves, *others, words, BLOCK=block, num_warps=NUM_WARPS)


def swiglu_forward(halves: Tensor) -> Tensor:
    """As `dash_megatron.ops.swiglu.swiglu`, of float16, bfloat16 or float32 [..., 2 * words], contiguous."""
    out = halves.new_empty(*halves.shape[:-1], halves.shape[-1] // 2)
    _launch(_swiglu_forward_kernel, halves, out)
    return out


def swiglu_backward(halves: Tensor, d_out: Tensor) -> Tensor:
    """The gradient of `halves`, of that of the output; both contiguous."""
    d_halves = torch.empty_like(halves)
    _launch(_swiglu_backward_kernel, halves, d_out, d_halves)
    return d_halves
