"""Alpha-entmax: a softmax that gives exactly zero to what scores too low (used by DashAttention, arXiv 2605.18753)."""

import math
from typing import Any

import torch
from torch import Tensor

from dash_megatron.ops.checks import check_alpha

# A dozen steps settle ordinary scores; this bounds the loop whatever they are.
MAX_NEWTON_STEPS = 100


def _newton_step(x: Tensor, tau: Tensor, exponent: float) -> Tensor:
    """How far to move `tau` [..., 1] so that `sum [x - tau]_+ ** exponent` [..., n] comes closer to one.

    The root is sought on the norm `(sum u ** e) ** (1 / e)` rather than on the sum: both are convex in tau, so Newton
    climbs to the root from the left without ever passing it, but the norm is nearly linear and needs far fewer steps.
    """
    u = (x - tau).clamp_min(0)
    norm = u.pow(exponent).sum(-1, keepdim=True).pow(1 / exponent)
    slope = torch.where(u > 0, u.pow(exponent - 1), 0).sum(-1, keepdim=True) * norm.pow(1 - exponent)
    return (norm - 1) / slope


def _threshold_by_sorting(x: Tensor, alpha: float) -> Tensor:
    """Exact threshold [..., 1] for alpha 1.5 or 2: the candidate of every prefix of the sorted scores, and which holds."""
    sorted_x = x.sort(dim=-1, descending=True).values
    size = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    mean = sorted_x.cumsum(-1) / size
    if alpha == 2:
        candidates = mean - 1 / size
    else:
        spread = sorted_x.square().cumsum(-1) - size * mean.square()
        candidates = mean - ((1 - spread) / size).clamp_min(0).sqrt()
    support = (candidates <= sorted_x).sum(-1, keepdim=True).clamp_min(1)
    tau = candidates.gather(-1, support - 1)
    # prefix sums of thousands of scores round; one step on the scores themselves takes the rounding out again
    return tau + _newton_step(x, tau, 1 / (alpha - 1))


def _threshold_by_newton(x: Tensor, alpha: float) -> Tensor:
    """Threshold [..., 1] for any alpha, from -1 (the best score, 0, then weighs at least one) up to the root."""
    tau = torch.full_like(x[..., :1], -1)
    tolerance = 4 * torch.finfo(x.dtype).eps
    settled = torch.zeros_like(tau, dtype=torch.bool)
    for _ in range(MAX_NEWTON_STEPS):
        # a settled row stays put to the last bit, however long others need: no row may depend on another
        step = _newton_step(x, tau, 1 / (alpha - 1)).masked_fill(settled, 0)
        tau = tau + step
        # written so that NaN settles too
        settled = ~(step.abs() > tolerance)
        if bool(settled.all()):
            break
    return tau


def _entmax_forward(z: Tensor, alpha: float) -> Tensor:
    excluded = z == -math.inf
    # tau is at least -1 once the best score is shifted to 0, so nothing below -1 can weigh anything: clamping there
    # (with a margin for rounding) keeps -inf and 1e4 out of the sums; a row of only -inf is NaN until the last line
    x = ((z - z.amax(-1, keepdim=True)) * (alpha - 1)).clamp_min(-2)
    if alpha in (1.5, 2):
        tau = _threshold_by_sorting(x, alpha)
        u = (x - tau).clamp_min(0)
        p = u if alpha == 2 else u.square()
    else:
        p = (x - _threshold_by_newton(x, alpha)).clamp_min(0).pow(1 / (alpha - 1))
        # near alpha = 1 the exponent magnifies the last bit of tau, by the same factor everywhere
        p = p / p.sum(-1, keepdim=True)
    return p.masked_fill(excluded, 0)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        # 1 / (alpha - 1) magnifies rounding, so the general case solves in float64 (which Apple's GPUs lack)
        exact = alpha in (1.5, 2) or z.device.type == "mps"
        p = _entmax_forward(z if exact else z.double(), alpha).to(z.dtype)
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # plain torch operations on the saved output, so that autograd can differentiate this once more
        (p,) = ctx.saved_tensors
        support = p > 0
        dp = torch.where(support, grads[0], 0)
        base = torch.where(support, p, 1)
        root = base.sqrt() if ctx.alpha == 1.5 else base.pow(2 - ctx.alpha)
        r = torch.where(support, root, 0)
        total = r.sum(-1, keepdim=True)
        mean = (r * dp).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
        return r * (dp - mean), None


def entmax(z: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """Map scores to probabilities that are exactly zero below a threshold.

    `p = [(alpha - 1) z - tau]_+ ** (1 / (alpha - 1))` with the tau that makes them sum to one: the entmax of block
    routing in DashAttention, arXiv 2605.18753. Exact (by sorting) for alpha 1.5 and 2, otherwise solved to the accuracy
    of the dtype. Differentiable, also twice.

    Args:
        z: scores of any shape, floating point. `-inf` excludes an entry: p = 0 and no gradient.
        alpha: in (1, 2]; softmax is the limit 1, sparsemax is 2.
        dim: the dimension that sums to one.

    Returns:
        p in z's shape and dtype, computed in float32 or better. A row of nothing but `-inf` gives zeros.

    Raises:
        ValueError: an argument is of the wrong kind or out of range.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point():
        seen = z.dtype if isinstance(z, Tensor) else repr(z)
        raise ValueError(
            f"z={seen} must be a floating point tensor of scores; use torch.as_tensor(z).float()"
        )
    check_alpha(alpha)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -z.ndim <= dim < z.ndim:
        raise ValueError(
            f"dim={dim!r} must be a dimension of z, which has {z.ndim} (shape {list(z.shape)}); try -1 on a tensor "
            "with at least one dimension"
        )
    if z.numel() == 0:
        return z.clone()
    scores = z.movedim(dim, -1)
    if z.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    return _Entmax.apply(scores, float(alpha)).movedim(-1, dim).to(z.dtype)
