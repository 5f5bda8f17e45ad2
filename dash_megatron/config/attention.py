"""Section `attention`."""

from __future__ import annotations

import bisect
import math
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from dash_megatron.config.baselines import InfLLMv2Config, NSAConfig, check_baseline
from dash_megatron.config.section import Section


class AttentionConfig(Section):
    """Which core attention runs in which layer, and the constants of DashAttention (arXiv 2605.18753)."""

    kind: Literal["dash", "full", "infllmv2", "nsa"] = "dash"
    """`dash` is DashAttention; `full` trains the dense twin of the same config, `infllmv2` and `nsa` twins that attend to
    a fixed number of chunks. These two run without context parallelism and have no Hugging Face export."""
    chunk_size: Literal[16, 32, 64, 128] = 64
    """Tokens summarised into one routing key. One token stands out from the mean of C by about sqrt(head_dim / C): with heads
    of 64 dimensions, chunks of 32 found more needles than chunks of 64, learned better in models of 16M parameters, in those of
    62M not beyond chance, and take attention 1.5 to 1.7 times as long (docs/results/quality.md)."""
    scaling_factor: float | tuple[float, ...] = 1.0
    """Multiplies routing scores before entmax, above 0; larger values select fewer chunks. A list has one for each
    layer."""
    length_scaling: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Above 0, routing scores of a token with n past chunks are also multiplied by `1 + length_scaling * ln(n)`: of
    adaptive-scalable entmax (arXiv 2506.16640) the growth with length, which works against selecting more and more
    chunks as documents grow. Try it where density rises at late positions, or beyond the lengths trained on; at 1000
    chunks, 0.1 makes a factor of 1.7."""
    learned_scaling: bool = False
    """Learn a factor on the routing scores for each kv head of each layer, beginning at 1; it multiplies
    `scaling_factor`. Try it where the heads of a layer differ in density, or no single factor suits them."""
    target_density: float | tuple[float, ...] | dict[int, float | tuple[float, ...]] | None = None
    """Share of the available chunks to be selected, of all tokens together, above 0 and up to 1: about the share of full
    attention's pairs that is attended to. Each layer's scaling factor is moved, from `scaling_factor` on, until its router
    selects that much. A list has one for each layer. A schedule, such as `{0: 1.0, 2000: 0.25}`, says from which step on,
    with straight lines between, and starts dense for a warm-up. Each query head of a group selects at least one past chunk,
    and all attend to what any selects: targets near (1 + heads / kv_heads) chunks a token leave nothing to choose."""
    sigma: float = Field(default=2.0, gt=0)
    """Flattens the router's prior on the softmax; 2 is the flattest whose router gradient is bounded."""
    estimate_diagonal: bool = True
    """Centre the log prior on its mean over selected past chunks, so that the token's own chunk has prior 0."""
    alpha: float = Field(default=1.5, gt=1, le=2)
    """Entmax exponent: near 1 is close to softmax (dense), 2 is sparsemax; 1.5 is the fast path."""
    full_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that use full attention although `kind` is another."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Implementation of sparse attention: Triton kernels on CUDA where present (`auto`), pure torch, or Triton."""
    infllmv2: InfLLMv2Config = Field(default_factory=InfLLMv2Config)
    """What `kind: infllmv2` chooses. Its fields are below."""
    nsa: NSAConfig = Field(default_factory=NSAConfig)
    """What `kind: nsa` chooses. Its fields are below."""

    def layer_scaling_factor(self, layer: int) -> float:
        """`scaling_factor` of a layer, counted from 0."""
        return self.scaling_factor[layer] if isinstance(self.scaling_factor, tuple) else self.scaling_factor

    def target_density_at(self, step: int, layer: int) -> float | None:
        """`target_density` of a layer, counted from 0, after some steps."""
        if not isinstance(self.target_density, dict):
            return _of_layer(self.target_density, layer)
        steps = sorted(self.target_density)
        after = bisect.bisect_right(steps, step)
        before = steps[max(0, after - 1)]
        first = _of_layer(self.target_density[before], layer)
        if first is None or after in (0, len(steps)):
            return first
        second = _of_layer(self.target_density[steps[after]], layer)
        assert second is not None
        return first + (second - first) * (step - before) / (steps[after] - before)

    def final_density(self, layers: int) -> float | None:
        """The last `target_density`, mean over the layers that select among so many; None: no target."""
        last = max(self.target_density, default=0) if isinstance(self.target_density, dict) else 0
        selecting = (layer for layer in range(layers) if layer not in self.full_layers)
        targets = [self.target_density_at(last, layer) for layer in selecting]
        known = [target for target in targets if target is not None]
        return fmean(known) if known else None

    @property
    def target_density_lists(self) -> list[tuple[float, ...]]:
        """All lists of targets by layer."""
        target = self.target_density
        values = target.values() if isinstance(target, dict) else [target]
        return [value for value in values if isinstance(value, tuple)]

    def _check_target(self) -> None:
        target = self.target_density
        values: list[Any] = list(target.values()) if isinstance(target, dict) else [target]
        numbers = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
        if isinstance(target, dict) and (not target or min(target) < 0):
            raise ValueError(
                f"attention.target_density={target} must name steps from 0 on, such as {{0: 1.0, 2000: 0.25}}"
            )
        if target is not None and not all(0 < number <= 1 for number in numbers):
            raise ValueError(
                f"attention.target_density={target} must be above 0 and at most 1, such as 0.25; null leaves densities alone"
            )
        if target is not None and self.kind != "dash":
            raise ValueError(
                f"attention.target_density={target} needs a router: set attention.kind=dash, or "
                "attention.target_density=null"
            )

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        self._check_target()
        factors = self.scaling_factor if isinstance(self.scaling_factor, tuple) else (self.scaling_factor,)
        if not all(0 < factor < math.inf for factor in factors):
            raise ValueError(f"attention.scaling_factor={self.scaling_factor} must be above 0, such as 1.0")
        if self.kind in ("infllmv2", "nsa"):
            check_baseline(self.kind, self.nsa if self.kind == "nsa" else self.infllmv2, self.chunk_size)
        return self


def _of_layer(value: float | tuple[float, ...] | None, layer: int) -> float | None:
    return value[layer] if isinstance(value, tuple) else value
