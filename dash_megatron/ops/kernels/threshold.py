"""The threshold of alpha-entmax, from sums over scores: what routing of whole sequences and of single tokens share.

Scores are x = (alpha - 1) z, and probabilities p = u ** exponent of u = [x - tau]_+, with exponent = 1 / (alpha - 1).
"""

import triton
import triton.language as tl


@triton.jit
def power(b_u, exponent):
    """u ** exponent of u >= 0, with 0 at 0 for any exponent, zero included."""
    return tl.where(b_u > 0, tl.exp2(exponent * tl.log2(tl.where(b_u > 0, b_u, 1.0))), 0.0)


@triton.jit
def probability(b_u, exponent, ALPHA_15: tl.constexpr):
    """Probabilities of u = [x - tau]_+."""
    return b_u * b_u if ALPHA_15 else power(b_u, exponent)


@triton.jit
def quadratic_step(b_s0, b_s1, b_s2, passes):
    """Move of tau from the count, sum and sum of squares of u = [x - tau]_+, for alpha 1.5.

    Exact if no score enters or leaves the support on the way, and of third order in the error otherwise. Where so many
    scores would leave that the quadratic has no root, a Newton step on the norm: it climbs to the root from the left.
    Also after 8 passes, since exact steps could swing about the root for ever.
    """
    b_root = b_s1 * b_s1 - b_s0 * (b_s2 - 1)
    b_s1 = tl.maximum(b_s1, 1e-20)
    b_norm = tl.sqrt(b_s2)
    b_newton = (b_norm - 1) * b_norm / b_s1
    b_exact = (b_s2 - 1) / (b_s1 + tl.sqrt(tl.maximum(b_root, 0.0)))
    return tl.where((b_root >= 0) & (passes < 8), b_exact, b_newton)


@triton.jit
def threshold_step(b_tau, b_low, b_high, b_s0, b_s1, b_s2, exponent, passes, ALPHA_15: tl.constexpr):
    """The next tau, within its bounds, from three sums at this one.

    For alpha 1.5 they are those of `quadratic_step`; for others the first is not used, and the last two are those of
    u ** (exponent - 1) and u ** exponent.
    """
    if ALPHA_15:
        b_move = quadratic_step(b_s0, b_s1, b_s2, passes)
    else:
        b_norm = tl.exp2(tl.log2(tl.maximum(b_s2, 1e-30)) / exponent)
        b_move = (b_norm - 1) * tl.exp2((exponent - 1) * tl.log2(b_norm)) / tl.maximum(b_s1, 1e-30)
    return tl.minimum(tl.maximum(b_tau + b_move, b_low), b_high)


@triton.jit
def threshold_bounds(b_top, past, exponent):
    """Least and greatest tau, given the best score `b_top` of `past`: its probability is at most 1 and at least 1 / past."""
    return b_top - 1, b_top - tl.exp2(-tl.log2(past.to(tl.float32)) / exponent)
