"""Control of density: scaling factors are moved until the routers select the share of chunks asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dash_megatron.config import AttentionConfig
from dash_megatron.layers import DashCoreAttention

logger = logging.getLogger(__name__)

# Share of a step's measurement in the running mean of a layer's density: batches differ by several points.
_RUNNING_MEAN_WEIGHT = 0.1
# How far the logarithm of a factor moves per step and unit of error. The log-odds of density fall by about one for each unit of
# the logarithm, so that with the mean above the loop is damped, settles within about 100 steps, and is slow beside the
# optimizer.
_GAIN = 0.05
# The most that one step moves it, and how far from 1 factors may go: a target can be out of reach.
_MAX_MOVE_PER_STEP, _MAX_LOG_FACTOR = 0.1, math.log(1e6)
# Settings that change what trained weights compute, but not their shapes.
_SAME_WEIGHTS = (
    "chunk_size",
    "local_chunks",
    "query_pool",
    "pool_heads",
    "sigma",
    "estimate_diagonal",
    "alpha",
)
# Densities of 0 and 1 have no log-odds.
_MIN_DENSITY = 1e-3


class DensityController:
    """Moves scaling factors towards `attention.target_density`; without a target it does nothing.

    An integral controller on the log-odds of a running mean of the measured density: of each layer alone, or of all layers
    together, whose factors then move in proportion (`attention.density_budget`). Every process computes the same factors from
    the same measurements.

    Args:
        attention: section of the config.
        layers: core attentions with a router by layer, counted from 0; their `scaling_factor` is what moves.
    """

    def __init__(self, attention: AttentionConfig, layers: Mapping[int, DashCoreAttention]) -> None:
        self._attention = attention
        self._cores = layers
        self._means: dict[str, float] = {}

    def update(self, step: int, densities: Sequence[float | None]) -> None:
        """Take in a step's measurement and set the factors of the next.

        Args:
            step: number of finished steps.
            densities: selected over available chunks of all processes, for each layer; None without a router.
        """
        for name, layers in self._groups().items():
            found = [densities[layer] for layer in layers]
            targets = [self._attention.target_density_at(step, layer) for layer in layers]
            known = [density for density in found if density is not None and math.isfinite(density)]
            asked = [target for target in targets if target is not None]
            if not layers or len(known) < len(layers) or len(asked) < len(layers):
                continue
            density, target = fmean(known), fmean(asked)
            mean = self._means.get(name, density)
            self._means[name] = mean = mean + _RUNNING_MEAN_WEIGHT * (density - mean)
            move = _GAIN * (_log_odds(mean) - _log_odds(target))
            move = max(-_MAX_MOVE_PER_STEP, min(_MAX_MOVE_PER_STEP, move))
            if any([self._move(layer, move) for layer in layers]):
                logger.warning(
                    "step %d: the density of %s is %.1f%%, and no scaling factor brings it to attention.target_density=%g: "
                    "attention.local_chunks are always on, each query head (with attention.pool_heads each group) selects one "
                    "more, and documents may be short; ask for more",
                    step,
                    name,
                    100 * mean,
                    target,
                )

    def _groups(self) -> dict[str, list[int]]:
        """The layers whose mean density is held, by a name of theirs."""
        if self._attention.density_budget == "model":
            return {"all layers": list(self._cores)}
        return {f"layer {layer}": [layer] for layer in self._cores}

    def _move(self, layer: int, move: float) -> bool:
        """Move the logarithm of a layer's factor; tell whether it has just come to its limit."""
        before = math.log(self._cores[layer].scaling_factor)
        after = max(-_MAX_LOG_FACTOR, min(_MAX_LOG_FACTOR, before + move))
        self._cores[layer].scaling_factor = math.exp(after)
        return after != before + move and abs(before) < _MAX_LOG_FACTOR - 1e-9

    def begin_as(self, earlier: AttentionConfig) -> None:
        """Take over the scaling factors of the run whose weights, exported or not, this one starts from.

        Without a target of its own, this run keeps the factors of its config, and is warned where they differ by more than a
        tenth. It is warned of other chunks or another router as well, which no weight shows.

        Args:
            earlier: the attention section of that run, with the factors it ended with.
        """
        if earlier.kind != "dash" or not self._cores:
            return
        pairs = ((name, getattr(self._attention, name), getattr(earlier, name)) for name in _SAME_WEIGHTS)
        if other := [f"attention.{name}={new}, not {old}" for name, new, old in pairs if new != old]:
            logger.warning("%s as in the run of training.init_from", "; ".join(other))
        factors = {layer: earlier.layer_scaling_factor(layer) for layer in self._cores}
        own = {layer: core.scaling_factor for layer, core in self._cores.items()}
        if self._attention.target_density is not None:
            for layer, core in self._cores.items():
                core.scaling_factor = factors[layer]
        elif not all(math.isclose(own[layer], factor, rel_tol=0.1) for layer, factor in factors.items()):
            logger.warning(
                "the run of training.init_from ended with scaling factors %s, and this one goes on with %s of "
                "attention.scaling_factor; give it those, or a target_density",
                [float(f"{factor:.4g}") for factor in factors.values()],
                [float(f"{factor:.4g}") for factor in own.values()],
            )

    def factors(self, layers: int) -> list[float | None]:
        """The scaling factor of each layer; None for layers without a router."""
        return [self._cores[i].scaling_factor if i in self._cores else None for i in range(layers)]

    def state_dict(self) -> dict[str, Any]:
        """Factors and running means, as JSON holds them in a checkpoint; empty where no target has ever moved a factor."""
        factors = {str(layer): core.scaling_factor for layer, core in self._cores.items()}
        own = {str(layer): self._attention.layer_scaling_factor(layer) for layer in self._cores}
        if self._attention.target_density is None and factors == own:
            return {}
        return {"factors": factors, "means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave. Without a target now, factors stay where an earlier target had moved them."""
        for layer, core in self._cores.items():
            core.scaling_factor = state.get("factors", {}).get(str(layer), core.scaling_factor)
        # earlier releases wrote the layer's number alone
        means = state.get("means", {})
        self._means = {f"layer {name}" if name.isdigit() else name: mean for name, mean in means.items()}


def _log_odds(density: float) -> float:
    density = max(_MIN_DENSITY, min(1 - _MIN_DENSITY, density))
    return math.log(density / (1 - density))
