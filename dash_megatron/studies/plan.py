"""`study plan`: every run of a study with its size, length and price."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dash_megatron.planning.baseline_times import NOTE
from dash_megatron.planning.table import table
from dash_megatron.studies.cost import mean_context
from dash_megatron.studies.runs import StudyRun, check_samples, expand
from dash_megatron.studies.study_file import Study, check_evaluations, load_study

COLUMNS = (
    "run", "parameters", "tokens", "steps", "density", "FLOPs", "dense FLOPs", "GPU-hours", "cost", "saved", "twin of",
)  # fmt: skip


def plan_study(path: str | Path, as_json: bool = False) -> str:
    """Text that `study plan` prints.

    Raises:
        ValueError: a wrong study.
    """
    study = load_study(path)
    check_evaluations(study)
    runs = expand(study)
    check_samples((study, run) for run in runs)
    if as_json:
        document = {
            "study": str(path),
            "assume": study.assume.model_dump(),
            "runs": [as_row(run) for run in runs],
        }
        return json.dumps(document, indent=2)
    return "\n".join([*table([cells(run, study) for run in runs], COLUMNS), "", *assumptions(study, runs)])


def as_row(run: StudyRun) -> dict[str, Any]:
    """What a study knows of a run before it trains, for JSON and tables."""
    return {
        "run": run.name,
        "variant": run.variant,
        "kind": run.config.attention.kind,
        "size": run.size,
        "settings": run.settings,
        "seed": run.config.training.seed,
        "twin_of": list(run.twin_of),
        "base": run.base,
        "parameters": run.parameters,
        "budget": run.budget,
        "tokens": run.tokens,
        "steps": run.config.training.steps,
        "seq_length": run.config.data.seq_length,
        "assumed_density": run.density,
        "assumed_flops": run.cost.flops,
        "dense_flops": run.cost.dense_flops,
        "gpu_hours": run.cost.gpu_hours,
        "dense_gpu_hours": run.cost.dense_gpu_hours,
        "cost": run.cost.price,
        "saving": run.cost.saving,
    }


def cells(run: StudyRun, study: Study) -> list[str]:
    """One line of the table, a cell for each of `COLUMNS`."""
    twins = (
        run.twin_of[0] + (f" and {len(run.twin_of) - 1} more" if len(run.twin_of) > 1 else "")
        if run.twin_of
        else ""
    )
    return [
        run.name,
        human(run.parameters),
        human(run.tokens),
        f"{run.config.training.steps:,}",
        f"{run.density:.0%}",
        f"{run.cost.flops:.2e}",
        f"{run.cost.dense_flops:.2e}",
        _few_digits(run.cost.gpu_hours),
        study.assume.currency + _few_digits(run.cost.price),
        f"{run.cost.saving:.0%}" if run.cost.saving else "-",
        twins,
    ]


def human(number: float) -> str:
    """1234567 as 1.23M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def _few_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.1e}"


def assumptions(study: Study, runs: Sequence[StudyRun]) -> list[str]:
    """Totals, and what they take for granted."""
    assume = study.assume
    hours, dense = sum(run.cost.gpu_hours for run in runs), sum(run.cost.dense_gpu_hours for run in runs)
    price = assume.currency + _few_digits(hours * assume.price)
    speed = (
        f"the step time that `plan` models on {assume.gpus} GPU(s)"
        if assume.utilization is None
        else f"{assume.utilization:.0%} of the {assume.gpu}'s bf16 peak, at every density alike"
    )
    lines = [
        f"{len(runs)} runs: {_few_digits(hours)} GPU-hours, {price} at {assume.currency}{assume.price:g} an hour; "
        f"all of them dense: {_few_digits(dense)} GPU-hours",
        f"assumed: {speed}; the densities of the table; FLOPs without recomputation; the column saved compares GPU-hours with "
        "the same run at full attention",
    ]
    if assume.utilization is None and any(run.config.attention.fixed_lists for run in runs):
        lines.append(NOTE)
    whole = (assume.context, "as assume.context says")
    data = {
        run.config.data.seq_length: whole
        if assume.context
        else mean_context(run.config.data.train, run.config.data.seq_length, run.config.data.pack_documents)
        for run in runs
    }
    lines += [
        f"at {length:,} tokens a token may attend to {context:,.0f} on average ({source})"
        for length, (context, source) in data.items()
    ]
    if any(run.config.data.seq_length_curriculum for run in runs):
        lines.append("data.seq_length_curriculum is counted: FLOPs are those of the mean over all steps")
    return lines
