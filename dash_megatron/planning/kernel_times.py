"""How long attention kernels take: a model fitted to the tables of `docs/results/kernels.md`.

Measured on one NVIDIA H200 in bf16 with head dim 128 and chunks of 64 tokens. Every stage's time is a non-negative
sum of what it must do (pairs scored or attended, rows touched, launches); the coefficients are fitted to groups of 16
heads, and groups of 4 and of 1 head scale each stage by the one row there is of them. Other head dims and chunk sizes
are extrapolated by their operation counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

TILE_ROWS = 128
"""Rows of a query tile of the fused kernels: tokens times heads of a group."""


class KernelCase(NamedTuple):
    """One row of the tables "Against cuDNN" and "By stage"; times in milliseconds."""

    tokens: int
    heads: int
    kv_heads: int
    density: float
    """Mean over tokens of selected / available chunks, as measured there."""
    attend_tflops: float
    """Rate of the attend stage, from which the listed work follows."""
    route: float
    attend: float
    queries: float
    router_backward: float
    transpose: float
    keys: float
    forward: float
    total: float
    """Forward and backward."""

    @property
    def work(self) -> AttentionWork:
        """The case as the model sees it; pairs attended come from rate x time, not from the density."""
        listed = self.attend_tflops * 1e12 * self.attend / 1e3 / (4 * 128 * self.heads)
        return AttentionWork(self.tokens, self.heads, self.kv_heads, self.tokens**2 / 2, listed)


CASES = (
    KernelCase(16384, 32, 2, 0.277, 434, 0.46, 1.30, 2.12, 0.37, 0.65, 3.10, 1.63, 7.15),
    KernelCase(65536, 32, 2, 0.242, 546, 4.69, 15.47, 27.65, 2.25, 0.41, 46.63, 20.18, 97.58),
    KernelCase(65536, 32, 2, 0.113, 519, 4.03, 6.88, 12.39, 1.40, 0.64, 19.74, 10.61, 44.10),
    KernelCase(131072, 32, 2, 0.103, 529, 15.63, 25.93, 46.08, 3.75, 0.62, 76.59, 40.64, 169.15),
    KernelCase(131072, 32, 2, 0.040, 476, 14.50, 7.86, 14.38, 2.09, 0.66, 21.10, 21.95, 58.97),
    KernelCase(16384, 32, 2, 1.0, 534, 0.53, 4.14, 7.26, 0.64, 0.41, 11.45, 4.46, 23.91),
)
"""Groups of 16 heads."""

GROUP_CASES = (
    KernelCase(65536, 32, 8, 0.110, 500, 4.48, 7.12, 12.16, 1.58, 0.39, 22.36, 11.19, 48.04),
    KernelCase(65536, 32, 32, 0.107, 334, 8.46, 19.93, 23.70, 3.14, 0.50, 55.57, 28.83, 110.55),
)
"""Groups of 4 heads and of 1."""

DENSE_CASES = {16384: (3.37, 14.1), 32768: (14.44, 54.8), 65536: (57.38, 221.0), 131072: (244.46, 898.9)}
"""cuDNN, 32 query heads: tokens -> milliseconds of forward, and of forward and backward."""

STAGES = {
    "route": ("rows", "scored"),
    "attend": ("launch", "rows", "listed"),
    "queries": ("launch", "rows", "listed"),
    "router_backward": ("launch", "rows", "listed"),
    "transpose": ("launch",),
    "keys": ("launch", "rows", "listed"),
}
"""What each stage's time is a sum of."""


@dataclass(frozen=True)
class AttentionWork:
    """One rank's share of one layer's attention."""

    rows: float
    """Query tokens of this rank."""
    heads: float
    """Query heads of this rank."""
    kv_heads: float
    """Key/value heads of this rank."""
    pairs: float
    """Causal (query, key) token pairs of one head on this rank: tokens**2 / 2 on one GPU."""
    listed: float
    """Of those, the pairs in chunks that a query tile lists."""
    chunk_size: int = 64
    head_dim: int = 128
    passes: int = 1
    """Times that queries meet a part of the keys: the steps of a ring, each with its own launches."""

    def units(self) -> dict[str, float]:
        """The terms of the model: launches, and 10**12 or 10**6 of what they say."""
        width = self.head_dim / 128
        return {
            "launch": 1.0,
            "rows": self.rows * self.heads * width / 1e6,
            "scored": self.pairs / self.chunk_size * self.heads * width / 1e12,
            "listed": self.listed * self.heads * width / 1e12,
        }


@dataclass(frozen=True)
class AttentionSeconds:
    """Time of one layer's attention."""

    forward: float
    backward: float


@lru_cache(maxsize=1)
def _stage_coefficients() -> dict[str, dict[str, float]]:
    """Milliseconds per unit of every stage's terms."""
    return {
        stage: _fit([case.work.units() for case in CASES], [getattr(case, stage) for case in CASES], terms)
        for stage, terms in STAGES.items()
    }


def _fit(units: list[dict[str, float]], times: list[float], terms: tuple[str, ...]) -> dict[str, float]:
    """Least squares of relative errors with coefficients that are not negative: work never takes time away."""
    active = list(terms)
    while True:
        matrix = np.array([[row[term] for term in active] for row in units]) / np.array(times)[:, None]
        solution = np.linalg.lstsq(matrix, np.ones(len(times)), rcond=None)[0]
        if (solution >= 0).all():
            return dict(zip(active, (float(x) for x in solution), strict=True))
        active.pop(int(solution.argmin()))


@lru_cache(maxsize=64)
def _group_factors(group: float) -> dict[str, float]:
    """What to multiply each stage by: 1 for groups of 16 heads, straight lines in log2(group) between measured ones."""
    known = {16.0: dict.fromkeys(STAGES, 1.0)}
    for case in GROUP_CASES:
        alike = _stage_milliseconds(case.work)
        known[case.heads / case.kv_heads] = {stage: getattr(case, stage) / alike[stage] for stage in STAGES}
    at = sorted(known)
    return {
        stage: float(np.interp(math.log2(group), [math.log2(g) for g in at], [known[g][stage] for g in at]))
        for stage in STAGES
    }


def _stage_milliseconds(work: AttentionWork) -> dict[str, float]:
    once = work.units()
    # the router sees all summaries at once; the other stages begin anew at every pass
    often = once | {term: work.passes * once[term] for term in ("launch", "rows")}
    return {
        stage: sum(factor * (once if "route" in stage else often)[term] for term, factor in terms.items())
        for stage, terms in _stage_coefficients().items()
    }


def dash_stages(work: AttentionWork) -> dict[str, float]:
    """Milliseconds of every stage of DashAttention on one rank."""
    factors = _group_factors(work.heads / work.kv_heads)
    return {stage: time * factors[stage] for stage, time in _stage_milliseconds(work).items()}


def dash_seconds(work: AttentionWork) -> AttentionSeconds:
    """Time of DashAttention on one rank.

    Nothing is added for layout and summaries (0.15 ms at most): the whole took less than the sum of the stages
    timed apart.
    """
    stages = dash_stages(work)
    forward = stages["route"] + stages["attend"]
    backward = sum(stages[stage] for stage in ("queries", "router_backward", "transpose", "keys"))
    return AttentionSeconds(forward / 1e3, backward / 1e3)


@lru_cache(maxsize=1)
def _dense_coefficients() -> tuple[dict[str, float], dict[str, float]]:
    units = [AttentionWork(n, 32, 32, n**2 / 2, n**2 / 2).units() for n in DENSE_CASES]
    forward, total = zip(*DENSE_CASES.values(), strict=True)
    backward = [both - one for one, both in zip(forward, total, strict=True)]
    terms = ("launch", "listed")
    return _fit(units, list(forward), terms), _fit(units, backward, terms)


def dense_seconds(work: AttentionWork) -> AttentionSeconds:
    """Time of causal full attention by cuDNN on one rank; `work.listed` is ignored, all pairs count."""
    units = work.units()
    units["listed"] = work.pairs * work.heads * work.head_dim / 128 / 1e12
    forward, backward = (
        sum(factor * units[term] for term, factor in terms.items()) / 1e3 for terms in _dense_coefficients()
    )
    return AttentionSeconds(forward, backward)
