"""Arguments of `python -m dash_megatron plan`."""

from __future__ import annotations

import argparse
from typing import Any


def add_plan(tools: Any) -> None:
    """Add `plan` to the front door's subparsers."""
    plan = tools.add_parser("plan", help="layouts of a config on a number of GPUs, ranked by estimated speed")
    plan.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    plan.add_argument("--gpus", required=True, type=int, help="number of GPUs, each with one process")
    plan.add_argument(
        "--density",
        type=float,
        help="pairs attended over causal pairs; default: the config's last attention.target_density, or 0.1",
    )
    plan.add_argument(
        "--peak-density",
        type=float,
        default=1.0,
        help="largest density of the run, for memory; default: 1, that of random weights",
    )
    plan.add_argument(
        "--locality",
        type=float,
        default=0.0,
        help="for parallel.context_comm=sparse only: probability that a run of queries wants what the run before it wanted; default: 0",
    )
    plan.add_argument(
        "--routing",
        default="trained",
        metavar="CHOICES",
        help="how alike neighbouring tokens select: `trained` (default) as models of 62M parameters did after training with the "
        "config's attention.query_pool, `runs` of 32 tokens that select the same (the best case), `independent` (the worst), or "
        "a number of at least 1: pairs that tiles visit over pairs selected, which `python -m dash_megatron study routing RUN_DIR` prints",
    )
    plan.add_argument("--listed", help=argparse.SUPPRESS)
    plan.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        help="attention's time on the busiest context rank over the mean of all; default: 1",
    )
    plan.add_argument(
        "--gpu", default="H200", help="B200, H200, H100, H800, A100 or L40S; default: H200, the one timed"
    )
    plan.add_argument("--memory-gib", type=float, help="memory of a GPU; default: what data sheets say")
    plan.add_argument(
        "--price", type=float, default=3.0, help="price of one GPU for an hour, in any currency; default: 3"
    )
    plan.add_argument(
        "--profile",
        metavar="RUN_DIR",
        help="a short run on such GPUs, by which the speed of compute and the memory of activations are corrected",
    )
    plan.add_argument("--top", type=int, default=10, help="how many layouts to show; default: 10")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the config")
    plan.set_defaults(run=_plan)


def _choices(routing: str) -> Any:
    """The number that the text is, or the text."""
    try:
        return float(routing)
    except ValueError:
        return routing


def _plan(options: argparse.Namespace) -> None:
    # imported late, so that --help is fast
    from dash_megatron.config import load_config
    from dash_megatron.planning.layout import Hardware
    from dash_megatron.planning.routing import AssumedRouting
    from dash_megatron.planning.table import plan

    if options.listed is not None:
        raise ValueError(
            f"--listed was replaced: --routing {options.listed} says the same, and --routing runs says what its default of 1.04 "
            "did; without --routing choices are like those of trained models"
        )
    if options.top < 1:
        raise ValueError(f"--top {options.top} must be at least 1")
    hardware = Hardware.of(options.gpu, options.memory_gib)
    config = load_config(options.config, options.overrides)
    density = options.density
    if density is None:
        density = config.attention.final_density(config.model.layers) or AssumedRouting.density
    routing = AssumedRouting(
        density=density,
        peak_density=options.peak_density,
        locality=options.locality,
        choices=_choices(options.routing),
        imbalance=options.imbalance,
    )
    planned = plan(options.config, config, options.gpus, routing, hardware, options.price, options.profile)
    print(planned.to_json(options.top) if options.json else planned.to_text(options.top))
