"""AdamW on flat tensors in one pass: clipping, moments, float32 weights and the weights that a model computes with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def adamw_step(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    *,
    clip: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Make one update in place; as `torch.optim.AdamW` does, but for the last bit.

    Args:
        master: float32 weights [numel].
        gradient: float32 [numel].
        exp_avg, exp_avg_sq: moments, float32 [numel].
        weight: gets the weights rounded, bfloat16 [numel].
        clip: multiplies the gradient.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        step: number of this update, from 1.
    """
    beta1, beta2 = betas
    changing = clip, lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    # a compiled function takes numbers for constants, and would be compiled again in every step
    scale, decay, rate, root = (
        torch.full((), x, dtype=torch.float32, device=master.device) for x in changing
    )
    update = _compiled() if master.is_cuda else _update
    update(master, gradient, exp_avg, exp_avg_sq, weight, scale, decay, rate, root, beta1, beta2, eps)


def _update(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    scale: Tensor,
    decay: Tensor,
    rate: Tensor,
    root: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    g = gradient * scale
    first = exp_avg + (1 - beta1) * (g - exp_avg)
    second = beta2 * exp_avg_sq + (1 - beta2) * g * g
    new = master - decay * master - rate * first / (second.sqrt() * root + eps)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    master.copy_(new)
    weight.copy_(new)


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(_update, dynamic=False)
