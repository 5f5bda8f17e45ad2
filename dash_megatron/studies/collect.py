"""`study collect`: what all runs of a study came to, in one table."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dash_megatron.config.flops import training_flops_per_token
from dash_megatron.data.vocabulary import vocabulary_rows
from dash_megatron.files import write_whole
from dash_megatron.json_lines import strict_json
from dash_megatron.studies.jobs import check_same
from dash_megatron.studies.plan import as_row
from dash_megatron.studies.runs import StudyRun, expand
from dash_megatron.studies.study_file import Study, StudyError
from dash_megatron.training.metrics import StepMetrics, read_metrics

_NEAR = 0.1
"""How far a density may be from its target, as a share of it."""


def collect(study: Study) -> list[dict[str, Any]]:
    """A row for every run that has logged a step: what the plan knows, and what was measured (`results_of`).

    `flops` are those of the tokens read, attention counted at the density of each logged step; `dense_flops` those of the
    same tokens with full attention. What a run was trained with other than the study says is told on standard error.

    Raises:
        ValueError: a wrong study, or no run that has logged a step.
    """
    rows = []
    for run in expand(study):
        try:
            metrics = read_metrics(run.folder)
        except FileNotFoundError:
            continue
        if not metrics:
            continue
        try:
            check_same(run)
        except StudyError as error:
            print(f"warning: {error}", file=sys.stderr)
        rows.append(_row(run, metrics))
    if not rows:
        raise StudyError(
            f"no run of the study has logged a step in {study.output}/runs; `study submit` it first"
        )
    return rows


def _row(run: StudyRun, metrics: list[StepMetrics]) -> dict[str, Any]:
    results, vocab_size = results_of(metrics), vocabulary_rows(run.config)
    dense = training_flops_per_token(run.config, vocab_size, run.context)
    return {
        **as_row(run),
        "finished": results["step"] >= run.config.training.steps,
        **results,
        "dense_flops": dense * results["tokens"],
        "flops": _measured_flops(run, metrics, vocab_size),
    }


def missed_targets(runs: Sequence[StudyRun], rows: list[dict[str, Any]]) -> list[str]:
    """A sentence that names the runs which select otherwise than they were asked to; none where all come near."""
    measured = {row["run"]: row["density"] for row in rows if row["finished"]}
    missed = []
    for run in runs:
        asked, density = run.config.attention.final_density(run.config.model.layers), measured.get(run.name)
        if asked and density and abs(density / asked - 1) > _NEAR:
            missed.append(f"{run.name} ({density:.1%} for {asked:.1%})")
    far = (
        f"Density further than {_NEAR:.0%} from attention.target_density at the end, so compare these by the density that "
        "they have, or train them for more steps"
    )
    return [f"{far}: {', '.join(missed)}."] if missed else []


def results_of(metrics: Sequence[StepMetrics]) -> dict[str, Any]:
    """What a run came to by its last logged step.

    `loss` is the mean training loss of the last tenth of the steps, of those where it is finite, `valid_loss` the last
    validation's, `density` the mean over the last tenth, `tokens_per_second` the median, `gpu_memory_gib` the peak; None
    where nothing was measured. Where no such loss is finite, `loss` is NaN.
    """
    last = metrics[-1]
    tail = [line for line in metrics if line["step"] > 0.9 * last["step"]]
    losses = [line["loss"] for line in tail if math.isfinite(line["loss"])]
    densities = [line["density"] for line in tail if line["density"] is not None]
    validated = [line["valid_loss"] for line in metrics if line["valid_loss"] is not None]
    return {
        "step": last["step"],
        "tokens": last["tokens"],
        "loss": fmean(losses) if losses else math.nan,
        "valid_loss": validated[-1] if validated else None,
        "density": fmean(densities) if densities else None,
        "tokens_per_second": median(line["tokens_per_second"] for line in metrics),
        "gpu_memory_gib": max((line.get("gpu_memory_gib") or 0.0 for line in metrics), default=0.0) or None,
        "skipped": last["skipped"],
    }


def _measured_flops(run: StudyRun, metrics: list[StepMetrics], vocab_size: int) -> float:
    """FLOPs of all tokens; those between two logged steps count at the density of the later one."""
    total, before = 0.0, 0
    for line in metrics:
        chunks = {
            layer: value for layer, value in enumerate(line["chunks_selected_per_layer"]) if value is not None
        }
        each = training_flops_per_token(run.config, vocab_size, run.context, chunks)
        total += each * (line["tokens"] - before)
        before = line["tokens"]
    return total


def write_table(study: Study, rows: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Write `<output>/results.json` and `results.csv`, each whole or not at all."""
    cells = [
        {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in row.items()}
        for row in rows
    ]
    return write_rows(Path(study.output) / "results", rows, cells)


def write_rows(
    path: Path, rows: Sequence[dict[str, Any]], cells: Sequence[dict[str, Any]]
) -> tuple[Path, Path]:
    """Write rows as JSON and as CSV, each file whole or not at all; gives both paths.

    Args:
        path: of the files, but for `.json` and `.csv`.
        rows: what the JSON holds, with null for numbers that are not finite.
        cells: the same as the CSV holds it, of texts and numbers only.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(cells[0]))
    writer.writeheader()
    writer.writerows(cells)
    paths = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.csv")
    write_whole(paths[0], strict_json(rows, indent=2) + "\n", make_folder=True)
    write_whole(paths[1], text.getvalue(), make_folder=True)
    return paths


def rows_with_quality(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Finished rows with `quality`, the loss that they are compared by, and its name.

    Raises:
        ValueError: none is finished.
    """
    finished = [row for row in rows if row["finished"]]
    if not finished:
        raise StudyError(
            f"none of the {len(rows)} runs with metrics is finished; wait, or `study submit` again"
        )
    # either everywhere or nowhere: training loss is measured on other text
    key = "valid_loss" if all(row["valid_loss"] is not None for row in finished) else "loss"
    name = "validation loss" if key == "valid_loss" else "training loss, mean of the last tenth"
    return [{**row, "quality": row[key]} for row in finished], name


def dense_twins(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of its full-attention twin for every run that has one; runs of one twin family share it."""
    dense = [row for row in rows if row["kind"] == "full"]
    return {
        row["run"]: twin
        for row in rows
        if row["kind"] != "full"
        for twin in dense
        if not {row["run"], *row["twin_of"]}.isdisjoint(twin["twin_of"])
    }
