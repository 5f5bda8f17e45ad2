"""Cross entropy on the GPU: logits are read once in each of two passes, the second of which writes their gradient over them.

As separate operations it moves some fifty bytes per logit and keeps a float32 copy, which for small models and large
vocabularies is a seventh of a training step and most of its memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits of a row read at once.
MOST_BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _loss_score_kernel(logits, labels, lse, label_logits, stride_m, vocab_size, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    logits += i_m * stride_m
    o_v = tl.arange(0, BLOCK)
    # one running maximum and sum a lane, which meet at the end; finite, so that a lane that sees nothing makes no NaN
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_max = b_sum - 1e30
    # compiled apart for vocabularies that 16 divides: only there does the mask let a load take 16 bytes
    for i_v in range(0, vocab_size, BLOCK):
        b_x = tl.load(logits + i_v + o_v, mask=i_v + o_v < vocab_size, other=float("-inf")).to(tl.float32)
        b_next = tl.maximum(b_max, b_x)
        b_sum = b_sum * tl.exp(b_max - b_next) + tl.exp(b_x - b_next)
        b_max = b_next
    top = tl.max(b_max, 0)
    label = tl.load(labels + i_m)
    label_logit = tl.load(logits + label, mask=(label >= 0) & (label < vocab_size), other=0.0)
    tl.store(lse + i_m, top + tl.log(tl.sum(b_sum * tl.exp(b_max - top), 0)))
    tl.store(label_logits + i_m, label_logit.to(tl.float32))


@triton.jit
def _loss_gradient_kernel(logits, labels, lse, weights, vocab_size, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < vocab_size
    p_x = logits + i_m * vocab_size + o_v
    b_p = tl.exp(tl.load(p_x, mask=m_v, other=0.0).to(tl.float32) - tl.load(lse + i_m))
    b_d = (b_p - tl.where(o_v == tl.load(labels + i_m), 1.0, 0.0)) * tl.load(weights + i_m)
    tl.store(p_x, b_d.to(logits.dtype.element_ty), mask=m_v)


def _block(vocab_size: int) -> int:
    return min(MOST_BLOCK, triton.next_power_of_2(vocab_size))


def score_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `dash_megatron.ops.cross_entropy.score_labels`, of float16, bfloat16 or float32; every bit is the same in every run."""
    rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    lse, label_logits = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    _loss_score_kernel[(rows,)](
        logits, labels.contiguous(), lse, label_logits, logits.stride(0), vocab_size,
        BLOCK=_block(vocab_size), num_warps=NUM_WARPS,
    )  # fmt: skip
    return lse, label_logits


def replace_by_gradient(logits: Tensor, labels: Tensor, lse: Tensor, weight: Tensor) -> None:
    """As `dash_megatron.ops.cross_entropy.replace_by_gradient`, of float16, bfloat16 or float32."""
    rows, vocab_size = logits.shape
    assert logits.is_contiguous()
    _loss_gradient_kernel[(rows, triton.cdiv(vocab_size, _block(vocab_size)))](
        logits, labels.contiguous(), lse, weight.float().contiguous(), vocab_size,
        BLOCK=_block(vocab_size), num_warps=NUM_WARPS,
    )  # fmt: skip
