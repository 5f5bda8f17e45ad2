"""How many remote chunks the queries of one context rank select between them: what a `sparse` exchange must send."""

from __future__ import annotations


def coverage_of_topics(density: float, locality: float, runs: float) -> float:
    """Share of past chunks that the queries of one context rank select between them, on average over ranks.

    The model is that of `docs/tools/simulation.py`: every chunk is about one of 1 / density topics, and every run of
    consecutive queries selects the chunks of one topic. A chunk whose topic no later run draws is not needed. Each of
    the rank's two pieces of the sequence draws a topic at its beginning, and one whenever a run does not repeat the one
    before it. On average over ranks a third of what lies before the later piece lies before the earlier one too and meets
    the draws of both.

    Args:
        density: share of its past chunks that a query selects, in (0, 1].
        locality: probability that a run wants the topic of the run before it, in [0, 1].
        runs: runs of queries of the rank, both its pieces together.
    """
    if density >= 1:
        return 1.0
    half = runs / 2
    draws = min(half, 1 + (1 - locality) * max(0.0, half - 1))
    missed = (1 - density) ** draws
    return 1 - 2 / 3 * missed - 1 / 3 * missed**2
