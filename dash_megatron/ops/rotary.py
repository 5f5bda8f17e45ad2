"""Rotary position embedding of heads that lie in one projection: split and turned in one pass, in Triton on a GPU and in torch elsewhere.

A head's channel i and channel i + D / 2 are a pair, which is turned by an angle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_and_rotate(
    mixed: Tensor, turns: Tensor, head_dim: int, groups: int, keys: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a projection apart into queries, keys and values, and turn queries and keys.

    Args:
        mixed: [N, B, groups * heads * D], in each group queries, then keys, then one value.
        turns: cosine and sine of each token's angles, float32 [2, N, B, D / 2].
        head_dim: D.
        groups: of query heads.
        keys: of a group.

    Returns:
        Queries [N, B, groups * queries, D], keys [N, B, groups * keys, D] and values [N, B, groups, D], of memory of their own.
        Turned in float32, or in float64 if `mixed` is. Only `turns` is kept for the backward.
    """
    heads = mixed.unflatten(-1, (groups, -1, head_dim))
    return _Rotated.apply(heads, turns, keys, 1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn heads [N, B, H, D] by `turns`; see `split_and_rotate`."""
    return _Rotated.apply(x.unsqueeze(2), turns, 0, 0)[0]


class _Rotated(torch.autograd.Function):
    """Turn the queries and keys of heads [N, B, groups, queries + keys + values, D], and give queries, keys and values apart."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, turns: Tensor, keys: int, values: int) -> tuple[Tensor, ...]:
        tokens, batch, groups, per_group, head_dim = heads.shape
        ctx.save_for_backward(turns)
        ctx.sizes = [per_group - keys - values, keys, values]
        parts = tuple(heads.new_empty(tokens, batch, groups * size, head_dim) for size in ctx.sizes)
        _turn(heads.contiguous(), parts, turns, ctx.sizes, back=False)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_parts: Tensor) -> tuple[Tensor | None, ...]:
        (turns,) = ctx.saved_tensors
        tokens, batch, queries, head_dim = d_parts[0].shape
        d_heads = d_parts[0].new_empty(tokens, batch, queries // ctx.sizes[0], sum(ctx.sizes), head_dim)
        _turn(d_heads, tuple(d.contiguous() for d in d_parts), turns, ctx.sizes, back=True)
        return d_heads, None, None, None


def _turn(heads: Tensor, parts: tuple[Tensor, ...], turns: Tensor, sizes: list[int], back: bool) -> None:
    """Write parts from heads, or back: heads from parts, turned the other way."""
    if heads.is_cuda and heads.dtype != torch.float64:
        from dash_megatron.ops.kernels.rotary import turn

        return turn(heads, parts, turns, sizes, back)
    cos, sin = turns[:, :, :, None, None]
    views = heads.split(sizes, dim=3)
    for number, (view, part) in enumerate(zip(views, parts, strict=True)):
        part = part.view(view.shape)
        source, target = (part, view) if back else (view, part)
        target.copy_(source if number == 2 else _turned(source, cos, -sin if back else sin))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
