"""SwiGLU of a projection that holds both halves: in Triton on a GPU, and in torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(halves: Tensor) -> Tensor:
    """The first half of the last dimension, through SiLU, times the second half.

    Args:
        halves: [..., 2 * words]; all that is kept for the backward.

    Returns:
        [..., words], computed in float32 and rounded once on a GPU.
    """
    if halves.is_cuda and halves.dtype != torch.float64:
        return _SwiGLU.apply(halves.contiguous())
    gate, linear = halves.chunk(2, dim=-1)
    return F.silu(gate) * linear


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        from dash_megatron.ops.kernels.swiglu import swiglu_forward

        ctx.save_for_backward(halves)
        return swiglu_forward(halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:  # type: ignore[override]
        from dash_megatron.ops.kernels.swiglu import swiglu_backward

        (halves,) = ctx.saved_tensors
        return swiglu_backward(halves, d_out.contiguous())
