"""The best layouts of a config on a number of GPUs, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from dash_megatron.config import Config, load_config
from dash_megatron.planning.baseline_times import BASELINES, NOTE
from dash_megatron.planning.layout import Hardware
from dash_megatron.planning.profile import read_profile
from dash_megatron.planning.search import estimate_configured, search
from dash_megatron.planning.step_time import Routing, StepEstimate, effective_routing

COLUMNS = (
    "tensor",
    "context",
    "data",
    "ZeRO",
    "exchange",
    "recompute",
    "sequence",
    "GiB/GPU",
    "NVLink GB",
    "IB GB",
    "s/step",
    "tokens/s/GPU",
    "bound by",
)
RUN_COLUMNS = (*COLUMNS, "days", "cost")


def plan(
    path: str,
    gpus: int,
    overrides: Sequence[str] = (),
    routing: Routing | None = None,
    hardware: Hardware | None = None,
    price: float = 3.0,
    profile: str | None = None,
    top: int = 10,
    as_json: bool = False,
) -> str:
    """Text that `plan` prints.

    Args:
        path: YAML config; its layout is shown beside the found ones.
        gpus: processes, one a GPU.
        overrides: `section.key=value`, as `train.py` takes them.
        routing: density and structure of the router.
        hardware: speeds and memory.
        price: of one GPU for an hour.
        profile: folder of a short run on such GPUs, by which the speed of compute and the memory of activations are corrected; see `read_profile`.
        top: layouts to show.
        as_json: JSON instead of a table.

    Raises:
        ValueError, FileNotFoundError: a wrong config or argument, or nothing fits.
    """
    routing, hardware = routing or Routing(), hardware or Hardware()
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    if not 0 <= price < math.inf:
        raise ValueError(f"price={price} must be a number of at least 0")
    measured = None if profile is None else read_profile(profile, hardware)
    if measured is not None:
        hardware = dataclasses.replace(
            hardware.slowed(measured.factor), activation_factor=measured.activation_factor
        )
    config = load_config(path, overrides)
    routing = effective_routing(config, routing)
    found = search(config, gpus, routing, hardware)
    own: StepEstimate | None = None
    problem = ""
    try:
        own = estimate_configured(config, gpus, routing, hardware)
    except ValueError as error:
        problem = str(error)
    if as_json:
        document = {
            "config": str(path),
            "gpus": gpus,
            "routing": dataclasses.asdict(routing),
            "hardware": dataclasses.asdict(hardware),
            "profile": None if measured is None else dataclasses.asdict(measured),
            "configured": None if own is None else as_dict(own, hardware) | whole_run(config, own, price),
            "layouts": [as_dict(each, hardware) | whole_run(config, each, price) for each in found[:top]],
        }
        return json.dumps(document, indent=2)

    def run_row(estimate: StepEstimate) -> list[str]:
        run = whole_run(config, estimate, price)
        return [*row(estimate), f"{run['days']:,.1f}", f"{run['cost']:,.0f}"]

    lines = [_heading(path, config, gpus, routing, hardware, len(found)), ""]
    if measured is not None:
        lines[1:1] = [str(measured)]
    lines += table([run_row(estimate) for estimate in found[:top]], RUN_COLUMNS)
    lines += ["", "the config's own layout:"]
    lines += table([run_row(own)], RUN_COLUMNS) if own else [f"does not run on {gpus} GPUs: {problem}"]
    if own and own.memory.total > hardware.budget_bytes:
        lines.append(f"needs more than the {hardware.budget_bytes / 2**30:.0f} GiB that a plan may fill")
    if config.attention.kind in BASELINES:
        lines += ["", NOTE]
    lines += [
        "",
        f"days and cost: of training.steps={config.training.steps:,} without faults, at {price:g} an hour and GPU.",
        "A model, not a measurement: docs/scaling.md says what it assumes.",
    ]
    return "\n".join(lines)


def _heading(path: str, config: Config, gpus: int, routing: Routing, hardware: Hardware, count: int) -> str:
    batch, length = config.training.global_batch, config.data.seq_length
    router = "full attention"
    if config.attention.kind != "full":
        router = f"density {routing.density:.0%} (memory for {routing.peak_density:.0%})"
    return (
        f"{path} on {gpus} {hardware.gpu} GPUs: {length:,} tokens x {batch} sequences = {length * batch:,} tokens a step, {router}; "
        f"{count} layouts fit into {hardware.budget_bytes / 2**30:.0f} of {hardware.memory_gib:.0f} GiB"
    )


def whole_run(config: Config, estimate: StepEstimate, price: float) -> dict[str, float]:
    """Days and cost of all steps, validation, checkpoints and faults left out."""
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
        f"{estimate.seconds:.2f}",
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
