"""The best layouts of a config on a number of GPUs, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dash_megatron.config import Config
from dash_megatron.planning.baseline_times import NOTE
from dash_megatron.planning.layout import Hardware
from dash_megatron.planning.profile import Profile, read_profile
from dash_megatron.planning.routing import AssumedRouting, effective_routing, shares_of_work
from dash_megatron.planning.search import estimate_configured, search
from dash_megatron.planning.step_time import StepEstimate

COLUMNS = (
    "tensor", "context", "data", "ZeRO", "exchange", "recompute", "sequence", "GiB/GPU", "NVLink GB", "IB GB", "s/step",
    "tokens/s/GPU", "bound by",
)  # fmt: skip
RUN_COLUMNS = (*COLUMNS, "days", "cost")


@dataclass(frozen=True)
class Plan:
    """The layouts that a config could have on a number of GPUs, and the one that it asks for."""

    name: str
    """What the plan is called: the config's path."""
    config: Config
    gpus: int
    routing: AssumedRouting
    hardware: Hardware
    price: float
    """Price of one GPU for an hour."""
    profile: Profile | None
    """The short run by which `hardware` was corrected; None: it was not."""
    found: list[StepEstimate]
    """Every layout that fits, fastest first."""
    own: StepEstimate | None
    """The config's own layout; None: it breaks a rule."""
    problem: str
    """The rule that the own layout breaks."""

    def to_json(self, top: int) -> str:
        """A JSON document of the `top` best layouts and the config's own."""

        def estimated(estimate: StepEstimate) -> dict[str, Any]:
            return as_dict(estimate, self.hardware) | whole_run(self.config, estimate, self.price)

        document = {
            "config": self.name,
            "gpus": self.gpus,
            "routing": dataclasses.asdict(self.routing),
            "hardware": dataclasses.asdict(self.hardware),
            "profile": None if self.profile is None else dataclasses.asdict(self.profile),
            "configured": None if self.own is None else estimated(self.own),
            "layouts": [estimated(estimate) for estimate in self.found[:top]],
        }
        return json.dumps(document, indent=2)

    def to_text(self, top: int) -> str:
        """A table of the `top` best layouts and the config's own, for a terminal."""
        config, budget = self.config, self.hardware.budget_bytes
        lines = [self._heading(), *([] if self.profile is None else [str(self.profile)]), ""]
        lines += table([self._row(estimate) for estimate in self.found[:top]], RUN_COLUMNS)
        lines += ["", "the config's own layout:"]
        if self.own is None:
            lines.append(f"does not run on {self.gpus} GPUs: {self.problem}")
        else:
            lines += table([self._row(self.own)], RUN_COLUMNS)
            if self.own.memory.total > budget:
                lines.append(f"needs more than the {budget / 2**30:.0f} GiB that a plan may fill")
        if config.attention.fixed_lists:
            lines += ["", NOTE]
        lines += [
            "",
            f"days and cost: of training.steps={config.training.steps:,} without faults, at {self.price:g} an hour and GPU.",
            "A model, not a measurement: docs/scaling.md says what it assumes.",
        ]
        return "\n".join(lines)

    def _row(self, estimate: StepEstimate) -> list[str]:
        run = whole_run(self.config, estimate, self.price)
        return [*row(estimate), f"{run['days']:,.2f}", f"{run['cost']:,.0f}"]

    def _heading(self) -> str:
        batch, length = self.config.training.global_batch, self.config.data.seq_length
        router = "full attention"
        if self.config.attention.kind != "full":
            shares = shares_of_work(self.config, self.routing, self.routing.density)
            router = (
                f"density {self.routing.density:.0%} (memory for {self.routing.peak_density:.0%}), kernels visit "
                f"{shares.visited / shares.selected:.2f} times the pairs selected (--routing {self.routing.choices})"
            )
        hardware = self.hardware
        return (
            f"{self.name} on {self.gpus} {hardware.gpu} GPUs: {length:,} tokens x {batch} sequences = {length * batch:,} "
            f"tokens a step, {router}; {len(self.found)} layouts fit into {hardware.budget_bytes / 2**30:.0f} of "
            f"{hardware.memory_gib:.0f} GiB"
        )


def plan(
    name: str,
    config: Config,
    gpus: int,
    routing: AssumedRouting | None = None,
    hardware: Hardware | None = None,
    price: float = 3.0,
    profile: str | None = None,
) -> Plan:
    """Estimate every layout that a config could have on a number of GPUs.

    Args:
        name: of the config, such as its path.
        config: what is to be trained.
        gpus: processes, one a GPU.
        routing: density and structure of the router.
        hardware: speeds and memory.
        price: of one GPU for an hour.
        profile: folder of a short run on such GPUs, by which the speed of compute and the memory of activations are
            corrected; see `read_profile`.

    Raises:
        ValueError, FileNotFoundError: a wrong argument or profile, or nothing fits.
    """
    hardware = hardware or Hardware()
    if not 0 <= price < math.inf:
        raise ValueError(f"--price {price} must be a number of at least 0")
    measured = None if profile is None else read_profile(profile, hardware)
    if measured is not None:
        hardware = dataclasses.replace(
            hardware.slowed(measured.factor), activation_factor=measured.activation_factor
        )
    routing = effective_routing(config, routing or AssumedRouting())
    found = search(config, gpus, routing, hardware)
    own: StepEstimate | None = None
    problem = ""
    try:
        own = estimate_configured(config, gpus, routing, hardware)
    except ValueError as error:
        problem = str(error)
    return Plan(name, config, gpus, routing, hardware, price, measured, found, own, problem)


def whole_run(config: Config, estimate: StepEstimate, price: float) -> dict[str, float]:
    """Days and cost of all steps, validation, without checkpoints and faults."""
    hours = config.training.steps * estimate.seconds / 3600
    return {"days": hours / 24, "cost": hours * estimate.layout.gpus * price}


def row(estimate: StepEstimate) -> list[str]:
    """One line of the table; GB are 10**9 bytes that one GPU sends in a step."""
    layout = estimate.layout
    return [
        str(layout.tensor),
        str(layout.context),
        str(layout.data),
        str(layout.zero_stage),
        layout.context_comm if layout.context > 1 else "-",
        layout.recompute,
        "yes" if layout.sequence else "-",
        f"{estimate.memory.total / 2**30:.0f}",
        f"{estimate.nvlink_bytes / 1e9:.1f}",
        f"{estimate.infiniband_bytes / 1e9:.1f}",
        f"{estimate.seconds:#.3g}" if estimate.seconds < 1 else f"{estimate.seconds:.2f}",
        f"{estimate.tokens_per_second_per_gpu:,.0f}",
        estimate.bound,
    ]


def table(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> list[str]:
    """Lines of a table aligned for a terminal."""
    everything = [list(columns), *rows]
    widths = [max(len(line[index]) for line in everything) for index in range(len(columns))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in everything
    ]


def as_dict(estimate: StepEstimate, hardware: Hardware) -> dict[str, Any]:
    """One layout for JSON: seconds, bytes, GiB."""
    return {
        **dataclasses.asdict(estimate.layout),
        "fits": estimate.memory.total <= hardware.budget_bytes,
        "memory_gib": estimate.memory.total / 2**30,
        "memory_parts_gib": {
            name: value / 2**30 for name, value in dataclasses.asdict(estimate.memory).items()
        },
        "nvlink_bytes": estimate.nvlink_bytes,
        "infiniband_bytes": estimate.infiniband_bytes,
        "seconds": estimate.seconds,
        "seconds_parts": estimate.parts,
        "tokens_per_second_per_gpu": estimate.tokens_per_second_per_gpu,
        "bound": estimate.bound,
    }
