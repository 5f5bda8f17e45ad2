"""Cross entropy on the GPU: logits are read once in each pass, and only their gradient is written.

As separate operations it moves some fifty bytes per logit and keeps a float32 copy, which for small models and large
vocabularies is a seventh of a training step and most of its memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits of a row read at once.
MOST_BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _forward_kernel(logits, labels, losses, log_sums, stride_m, num_words, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    logits += i_m * stride_m
    o_v = tl.arange(0, BLOCK)
    # one running maximum and sum a lane, which meet at the end; finite, so that a lane that sees nothing makes no NaN
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_max = b_sum - 1e30
    # compiled apart for vocabularies that 16 divides: only there does the mask let a load take 16 bytes
    for i_v in range(0, num_words, BLOCK):
        b_x = tl.load(logits + i_v + o_v, mask=i_v + o_v < num_words, other=float("-inf")).to(tl.float32)
        b_next = tl.maximum(b_max, b_x)
        b_sum = b_sum * tl.exp(b_max - b_next) + tl.exp(b_x - b_next)
        b_max = b_next
    top = tl.max(b_max, 0)
    log_sum = top + tl.log(tl.sum(b_sum * tl.exp(b_max - top), 0))
    right = tl.load(logits + tl.load(labels + i_m)).to(tl.float32)
    tl.store(losses + i_m, log_sum - right)
    tl.store(log_sums + i_m, log_sum)


@triton.jit
def _backward_kernel(
    logits, labels, log_sums, d_losses, d_logits, stride_m, num_words, BLOCK: tl.constexpr
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < num_words
    b_x = tl.load(logits + i_m * stride_m + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_p = tl.exp(b_x - tl.load(log_sums + i_m))
    b_d = (b_p - tl.where(o_v == tl.load(labels + i_m), 1.0, 0.0)) * tl.load(d_losses + i_m)
    tl.store(d_logits + i_m * num_words + o_v, b_d.to(d_logits.dtype.element_ty), mask=m_v)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows, words = logits.shape
        losses, log_sums = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
        block = min(MOST_BLOCK, triton.next_power_of_2(words))
        _forward_kernel[(rows,)](
            logits, labels, losses, log_sums, logits.stride(0), words, BLOCK=block, num_warps=NUM_WARPS
        )
        ctx.save_for_backward(logits, labels, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, labels, log_sums = ctx.saved_tensors
        rows, words = logits.shape
        block = min(MOST_BLOCK, triton.next_power_of_2(words))
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _backward_kernel[(rows, triton.cdiv(words, block))](
            logits, labels, log_sums, gradients[0].contiguous(), d_logits, logits.stride(0), words,
            BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
        return d_logits, None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row, in nats, computed in float32; every bit is the same in every run.

    Args:
        logits: [M, V], float16, bfloat16 or float32; any stride between rows, 1 within them.
        labels: int64 [M], from 0 to V - 1; they are not checked.

    Returns:
        Float32 [M]. The gradient has the dtype of `logits`, which are kept for it.
    """
    return _CrossEntropy.apply(logits, labels.contiguous())
