"""How long attention kernels take: a model fitted to the tables of `docs/results/kernels.md`.

Measured on NVIDIA H200s in bf16. Every stage's time is a non-negative sum of what it must do (pairs scored or attended,
rows touched, launches); the coefficients are fitted to head dim 128, chunks of 64 tokens and groups of 16 heads. Groups of
4 and of 1 head scale each stage by the one row there is of them, and so do head dim 64 and chunks of 32 by two rows each;
between and beyond, factors follow the logarithm of the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import geometric_mean
from typing import NamedTuple

import numpy as np

TILE_ROWS = 128
"""Rows of a query tile of the fused kernels: tokens times heads of a group."""


class KernelCase(NamedTuple):
    """One row of the tables "Against dense attention" and "By stage"; times in milliseconds."""

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
    chunk_size: int = 64
    head_dim: int = 128

    @property
    def work(self) -> AttentionWork:
        """The case as the model sees it; pairs attended come from rate x time, not from the density."""
        listed = self.attend_tflops * 1e12 * self.attend / 1e3 / (4 * self.head_dim * self.heads)
        pairs = self.tokens**2 / 2
        return AttentionWork(
            self.tokens, self.heads, self.kv_heads, pairs, listed, self.chunk_size, self.head_dim
        )


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

NARROW_CASES = (
    KernelCase(16384, 32, 8, 0.274, 326, 0.34, 0.86, 1.06, 0.24, 0.53, 1.70, 1.36, 4.66, 64, 64),
    KernelCase(65536, 32, 8, 0.110, 370, 3.40, 4.81, 6.15, 1.00, 0.86, 10.36, 8.47, 25.53, 64, 64),
)
"""Head dim 64."""

SMALL_CHUNK_CASES = (
    KernelCase(16384, 32, 8, 0.242, 254, 0.65, 1.05, 1.32, 0.38, 0.83, 3.60, 1.66, 6.83, 32, 64),
    KernelCase(65536, 32, 8, 0.090, 323, 10.05, 4.95, 6.39, 1.16, 0.52, 20.70, 15.37, 43.75, 32, 64),
)
"""Head dim 64 and chunks of 32 tokens."""

DENSE_CASES = {16384: (3.37, 14.1), 32768: (14.44, 54.8), 65536: (57.38, 221.0), 131072: (244.46, 898.9)}
"""cuDNN, 32 query heads of 128: tokens -> milliseconds of forward, and of forward and backward."""

NARROW_DENSE_CASES = {16384: (2.47, 8.70), 65536: (37.79, 138.2)}
"""The same with heads of 64."""

STAGES = {
    "route": ("rows", "scored"),
    "attend": ("launch", "rows", "listed"),
    "queries": ("launch", "rows", "listed"),
    "router_backward": ("launch", "rows", "listed"),
    "transpose": ("launch",),
    "keys": ("launch", "rows", "listed"),
}
"""The units of work (`AttentionWork.units`) that each stage's time is a weighted sum of."""


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
        """The terms of the model: launches, 10**6 rows, and 10**12 pairs scored or listed, for head dim 128."""
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


@lru_cache(maxsize=64)
def _shape_factors(head_dim: int, chunk_size: int) -> dict[str, float]:
    """What to multiply each stage by: 1 for heads of 128 and more and chunks of 64 and more."""
    narrow, small = _excess(NARROW_CASES), _excess(SMALL_CHUNK_CASES)
    halvings = max(0.0, math.log2(64 / chunk_size))
    return {
        stage: narrow[stage] ** _narrowness(head_dim) * (small[stage] / narrow[stage]) ** halvings
        for stage in STAGES
    }


def _excess(cases: tuple[KernelCase, ...]) -> dict[str, float]:
    """Measured over modelled time of every stage; 1 for the transposition, whose time varies by as much as it takes."""
    modelled = [_grouped_milliseconds(case.work) for case in cases]
    excess = {
        stage: geometric_mean(
            [getattr(case, stage) / times[stage] for case, times in zip(cases, modelled, strict=True)]
        )
        for stage in STAGES
    }
    return excess | {"transpose": 1.0}


def _narrowness(head_dim: float) -> float:
    """0 for heads of 128 and more, 1 for 64 and less."""
    return min(1.0, max(0.0, math.log2(128 / head_dim)))


def _stage_milliseconds(work: AttentionWork) -> dict[str, float]:
    once = work.units()
    # the router sees all summaries at once; the other stages begin anew at every pass
    often = once | {term: work.passes * once[term] for term in ("launch", "rows")}
    return {
        stage: _sum(terms, once if "route" in stage else often)
        for stage, terms in _stage_coefficients().items()
    }


def _grouped_milliseconds(work: AttentionWork) -> dict[str, float]:
    factors = _group_factors(work.heads / work.kv_heads)
    return {stage: time * factors[stage] for stage, time in _stage_milliseconds(work).items()}


def dash_stages(work: AttentionWork) -> dict[str, float]:
    """Milliseconds of every stage of DashAttention on one rank."""
    factors = _shape_factors(work.head_dim, work.chunk_size)
    return {stage: time * factors[stage] for stage, time in _grouped_milliseconds(work).items()}


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
    forward, backward = _split(DENSE_CASES)
    terms = ("launch", "listed")
    return _fit(units, forward, terms), _fit(units, backward, terms)


@lru_cache(maxsize=1)
def _narrow_dense_factors() -> tuple[float, float]:
    """Measured over modelled time of forward and of backward with heads of 64."""
    units = [AttentionWork(n, 32, 32, n**2 / 2, n**2 / 2, head_dim=64).units() for n in NARROW_DENSE_CASES]
    forward, backward = (
        geometric_mean([time / _sum(terms, unit) for time, unit in zip(times, units, strict=True)])
        for times, terms in zip(_split(NARROW_DENSE_CASES), _dense_coefficients(), strict=True)
    )
    return forward, backward


def _split(cases: dict[int, tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Milliseconds of forward and of backward."""
    return [forward for forward, _ in cases.values()], [both - forward for forward, both in cases.values()]


def _sum(terms: dict[str, float], units: dict[str, float]) -> float:
    return sum(factor * units[term] for term, factor in terms.items())


def dense_seconds(work: AttentionWork) -> AttentionSeconds:
    """Time of causal full attention by cuDNN on one rank; `work.listed` is ignored, all pairs count."""
    units = work.units()
    units["listed"] = work.pairs * work.heads * work.head_dim / 128 / 1e12
    forward, backward = (
        _sum(terms, units) * factor ** _narrowness(work.head_dim) / 1e3
        for terms, factor in zip(_dense_coefficients(), _narrow_dense_factors(), strict=True)
    )
    return AttentionSeconds(forward, backward)
