"""How many pairs of tokens and chunks kernels visit for each that was selected: tiles of neighbouring tokens visit what any of them selected."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import numpy as np

from dash_megatron.config import AttentionConfig

Choices = Literal["trained", "runs", "independent"] | float
"""How alike neighbouring tokens select: as in trained models, in runs of 32 that select the same (the best case), each token
for itself (the worst), or a number, visited over selected pairs as `study routing` measures them."""

RUN_TOKENS = {"runs": 32, "independent": 1}
"""Consecutive tokens that select the same chunks, where choices are made rather than measured."""


def check_choices(choices: Choices) -> None:
    """Refuse what is neither a name nor a ratio.

    Raises:
        ValueError: naming the rule and what may be given.
    """
    known = choices in ("trained", *RUN_TOKENS) if isinstance(choices, str) else 1 <= choices < math.inf
    if not known:
        raise ValueError(
            f"--routing {choices} must be trained, runs, independent, or a number of at least 1, such as 1.7: pairs visited over "
            "pairs selected"
        )


class Curve(NamedTuple):
    """Visited over selected chunks of one trained model, all layers of its file together; local chunks are left out."""

    density: float
    """Chunks that the router selected over those it may select."""
    ratios: tuple[float, ...]
    """For tiles of 1, 2, 4, 8, 16 and 32 tokens."""


TRAINED = {
    "d11": Curve(0.080, (1.0, 1.46, 2.05, 2.89, 3.48, 4.08)),
    "d25": Curve(0.154, (1.0, 1.32, 1.70, 2.21, 2.53, 2.87)),
    "d11_c32_w4m16g": Curve(0.068, (1.0, 1.06, 1.16, 1.29, 1.44, 1.66)),
    "d25_c32_w4m16g": Curve(0.214, (1.0, 1.03, 1.07, 1.12, 1.17, 1.25)),
}
"""By file in `benchmarks/choices`: models of 62M parameters at 16K, whose routers see one query or, by the recipe, the mean of 16."""
POOLS = {1: ("d11", "d25"), 16: ("d11_c32_w4m16g", "d25_c32_w4m16g")}
"""Which of them have which `attention.query_pool`."""


@functools.lru_cache
def _trained_ratio(density: float, tile_tokens: int, query_pool: int) -> float:
    """Straight lines in the logarithms of density, tile and pool; below the measured densities as at the least of them."""
    by_pool = []
    for names in POOLS.values():
        densities, ratios = [], []
        for curve in (TRAINED[name] for name in names):
            place = math.log2(tile_tokens)
            beyond = max(0.0, place - len(curve.ratios) + 1) * (curve.ratios[-1] - curve.ratios[-2])
            densities.append(math.log(curve.density))
            ratios.append(float(np.interp(place, range(len(curve.ratios)), curve.ratios)) + beyond)
        by_pool.append(float(np.interp(math.log(density), [*densities, 0.0], [*ratios, 1.0])))
    return float(np.interp(math.log2(query_pool), [math.log2(pool) for pool in POOLS], by_pool))


def visited_over_selected(choices: Choices, density: float, tile_tokens: int, query_pool: int = 1) -> float:
    """Chunks that tiles visit over chunks that their tokens selected.

    Args:
        choices: how alike neighbouring tokens select.
        density: chunks selected over those available, in (0, 1].
        tile_tokens: neighbouring tokens of a tile.
        query_pool: tokens whose mean the router sees; matters to trained choices.
    """
    if choices == "trained":
        ratio = _trained_ratio(density, tile_tokens, query_pool)
    elif isinstance(choices, str):
        draws = max(1.0, tile_tokens / RUN_TOKENS[choices])
        ratio = (1 - (1 - density) ** draws) / density
    else:
        ratio = choices
    return min(ratio, 1 / density)


def tile_tokens(group: int, chunk_size: int) -> int:
    """Tokens of a query tile of the kernels: 128 rows of tokens times heads of a group, within a chunk."""
    return max(1, min(chunk_size, 128 >> (group - 1).bit_length()))


class Shares(NamedTuple):
    """Parts of the pairs of a token and a chunk up to its own."""

    selected: float
    visited: float


def shares_of_pairs(
    attention: AttentionConfig, group: int, length: int, density: float, choices: Choices
) -> Shares:
    """What is selected and visited in sequences of `length` tokens at a density.

    The own chunk and `local_chunks` are selected by every token whatever the density, and visited once.

    Args:
        attention: chunk size and, of a router, local chunks and query pool.
        group: query heads that share a key/value head.
        length: tokens of a sequence.
        density: pairs selected over pairs available, the own chunk included, in (0, 1].
        choices: how alike neighbouring tokens select the other chunks.
    """
    routes = attention.kind == "dash"
    chunks = max(1.0, length / attention.chunk_size)
    always = min(1.0, 2 * (1 + routes * attention.local_chunks) / (chunks + 1))
    routed = max(0.0, density - always)
    if routed == 0:
        return Shares(always, always)
    tile = tile_tokens(group, attention.chunk_size)
    pool = attention.query_pool if routes else 1
    ratio = visited_over_selected(choices, routed / (1 - always), tile, pool)
    return Shares(density, always + ratio * routed)
