"""What a plan takes for granted of the router: how much it selects, and how alike neighbouring tokens and ranks select."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dash_megatron.config import Config
from dash_megatron.planning.baseline_times import density_of_lists
from dash_megatron.planning.choices import Choices, Shares, check_choices, shares_of_pairs
from dash_megatron.planning.layout import Layout


@dataclass(frozen=True)
class AssumedRouting:
    """What the router does, as far as time depends on it."""

    density: float = 0.1
    """Pairs of tokens attended over causal pairs, in (0, 1]; a mean over tokens as metrics report it is larger where
    the number of selected chunks does not grow with position."""
    peak_density: float = 1.0
    """Largest density of the run, for which memory must suffice: training from scratch starts at 1."""
    choices: Choices = "trained"
    """How alike neighbouring tokens select, which decides how many pairs tiles visit for each that is selected."""
    locality: float = 0.0
    """Probability that a run of queries wants a topic of its own neighbourhood; decides what `sparse` sends."""
    run_tokens: int = 32
    """Consecutive queries that want the same topic."""
    imbalance: float = 1.0
    """Attention time of the busiest context rank over the mean."""

    def __post_init__(self) -> None:
        for name, zero in (("density", False), ("peak_density", False), ("locality", True)):
            value = getattr(self, name)
            if not (0 < value <= 1 or (zero and value == 0)):
                least = "at least" if zero else "above"
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value} must be {least} 0 and at most 1, such as 0.1 for 10%")
        if not 1 <= self.imbalance < math.inf:
            raise ValueError(f"--imbalance {self.imbalance} must be a number of at least 1")
        check_choices(self.choices)


def effective_routing(config: Config, routing: AssumedRouting) -> AssumedRouting:
    """The routing given, with the density that `attention.kind` fixes if it does."""
    if not config.attention.fixed_lists:
        return routing
    density = density_of_lists(config.attention, (config.data.seq_length + 1) / 2)
    return dataclasses.replace(routing, density=density, peak_density=density)


def sent_coverage(config: Config, layout: Layout, routing: AssumedRouting) -> float:
    """Share of its chunks that the busiest rank sends to each peer under `sparse`: the last ranks' chunks all lie in
    every peer's past, so nothing but selection saves there."""
    tokens = config.data.seq_length // layout.context
    return coverage_of_topics(routing.density, routing.locality, tokens / routing.run_tokens)


def coverage_of_topics(density: float, locality: float, runs: float) -> float:
    """Share of past chunks that the queries of one context rank select between them, on average: what `sparse` must send.

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


def shares_of_work(config: Config, routing: AssumedRouting, density: float) -> Shares:
    """What is selected and visited at a density, of all pairs of a token and a chunk up to its own."""
    model = config.model
    return shares_of_pairs(
        config.attention, model.heads // model.kv_heads, config.data.seq_length, density, routing.choices
    )
