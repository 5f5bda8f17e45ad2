"""The arms of a study of branches against its reference: losses of documents by position, of training, and scores of tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dash_megatron.evaluation.buckets import buckets
from dash_megatron.evaluation.runner import RESULTS, read_lines
from dash_megatron.evaluation.settings import DOCUMENTS, LOSS_TASKS
from dash_megatron.studies.collect import write_rows
from dash_megatron.studies.jobs import missing_evaluations
from dash_megatron.studies.paired import Comparison, Item, Measured, Ratio, compare
from dash_megatron.studies.runs import StudyRun, expand
from dash_megatron.studies.study_file import Branches, Study, StudyError
from dash_megatron.training.metrics import StepMetrics, read_metrics

TRAINING = "training"
LAST_SHARE = 0.25
"""Share of the steps, the last ones, that the training loss is taken over: there the learning rate has fallen."""


class Measure(NamedTuple):
    """What arms are compared on."""

    evaluation: str
    """Name of the evaluation in `branches.evaluate`; `training` for losses of training."""
    task: str
    """Name of a task of `evaluate`, or `loss` or `valid_loss` for losses of training."""
    length: int
    """Most tokens of a document or sample; for losses of training `data.seq_length`."""
    begin: int | None = None
    end: int | None = None
    """Positions [begin, end) alone; None: all."""
    step: int | None = None
    """Step of a validation during training; None: after or at the end of training."""

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss in nats, where less is better, and no score."""
        return self.evaluation == TRAINING or self.task in LOSS_TASKS


@dataclass(frozen=True)
class ArmComparison:
    """An arm of a base, compared on one measure; the reference too, with itself."""

    base: str
    size: str
    arm: str
    measure: Measure
    found: Comparison
    is_reference: bool


def compare_branches(study: Study) -> list[ArmComparison]:
    """Compare the arms of each base with its reference, on all that branches were evaluated on.

    A pair of branches enters where both are trained in the same order of the data and evaluated as the study says; where an
    evaluation is missing, with the others.

    Raises:
        ValueError: no pair has losses of documents yet, or a file is damaged.
    """
    branches = _branches(study)
    runs = [run for run in expand(study) if run.base]
    measured = {run.name: _measured(study, branches, run) for run in runs}
    compared: list[ArmComparison] = []
    for base in dict.fromkeys(run.base for run in runs if run.base):
        by_arm: dict[str, dict[int, dict[Measure, Measured]]] = {}
        for run in runs:
            if run.base == base and measured[run.name]:
                by_arm.setdefault(run.variant, {})[run.config.training.seed] = measured[run.name]
        size = next(run.size for run in runs if run.base == base)
        reference = by_arm.get(branches.reference, {})
        for arm, of_arm in by_arm.items():
            compared += [
                ArmComparison(base, size, arm, measure, found, arm == branches.reference)
                for measure, found in _compare_arm(f"{arm} of {base}", of_arm, reference)
            ]
    if not any(each.measure.task == DOCUMENTS and not each.is_reference for each in compared):
        raise StudyError(
            f"no arm and {branches.reference} are trained and evaluated in one order of the data; `study submit` goes on"
        )
    return compared


def _branches(study: Study) -> Branches:
    if study.branches is None:
        raise StudyError("the study has no branches to compare; add `branches`, see docs/studies.md")
    return study.branches


def _compare_arm(
    name: str, arm: dict[int, dict[Measure, Measured]], reference: dict[int, dict[Measure, Measured]]
) -> Iterator[tuple[Measure, Comparison]]:
    for measure in dict.fromkeys(measure for found in arm.values() for measure in found):
        sides = [
            {order: found[measure] for order, found in side.items() if measure in found}
            for side in (arm, reference)
        ]
        forms = {len(item) for side in sides for items in side.values() for item in items}
        if measure.task in LOSS_TASKS and len(forms) > 1:
            raise StudyError(
                f"{name}, {measure.evaluation}: some lines of {measure.task}.jsonl say which `document` they are of, and those of "
                f"an older release do not; remove evaluation/{measure.evaluation} of branches where they do not, and `study "
                "submit` evaluates them again"
            )
        try:
            found = compare(*sides)
        except ValueError as error:
            raise StudyError(f"{name}, {measure.evaluation}, {measure.task}: {error}") from error
        if found is not None:
            yield measure, found


def _measured(study: Study, branches: Branches, run: StudyRun) -> dict[Measure, Measured]:
    """All that a branch was measured on since it is trained, which its metrics tell: results are read without checkpoints."""
    try:
        metrics = read_metrics(run.folder)
    except FileNotFoundError:
        return {}
    if not metrics or metrics[-1]["step"] < run.config.training.steps:
        return {}
    found: dict[Measure, Measured] = {}
    missing = missing_evaluations(study, run)
    for name in (name for name in branches.evaluate if name not in missing):
        folder = run.folder / "evaluation" / name
        try:
            tasks = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["tasks"]
            for task, lengths in tasks.items():
                lines = read_lines(folder / f"{task}.jsonl")
                for length, summary in lengths.items():
                    own = [line for line in lines if line["key"] == summary["key"]]
                    found |= _of_lines(Measure(name, task, int(length)), own)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StudyError(f"{folder} has no results of `evaluate` ({error!r}); remove it") from error
    return {**found, **dict(_of_training(run, metrics))}


def _of_lines(measure: Measure, lines: list[dict[str, Any]]) -> Mapping[Measure, Measured]:
    """What lines of `<task>.jsonl` say: scores, or losses over all positions and by bucket of positions.

    Losses are summed over the lines of a document: what is predicted in one window of it tells of the others.
    """
    items = {(line["index"], line["depth"]): line for line in lines}
    if not measure.is_loss:
        return {measure: {item: (line["score"], 1.0) for item, line in items.items()}}
    found: dict[Measure, dict[Item, tuple[float, float]]] = {}
    spans = buckets(measure.length)
    for item, line in items.items():
        # `documents` has a line a document; of windows, older files do not say where they are from
        document = (line["document"],) if "document" in line else item
        tokens, sums = line.get("tokens", measure.length), line["nll_sums"]
        there = {measure: (sum(sums), tokens)}
        for (begin, end), nll in zip(spans, sums, strict=False):
            there[measure._replace(begin=begin, end=end)] = nll, min(end, tokens) - begin
        for part, (nll, size) in there.items():
            of_part = found.setdefault(part, {})
            before = of_part.get(document, (0.0, 0.0))
            of_part[document] = before[0] + nll, before[1] + size
    return found


def _of_training(run: StudyRun, lines: list[StepMetrics]) -> Iterator[tuple[Measure, Measured]]:
    """Losses of the last batches, which are the same for all arms of an order, and of each validation."""
    length, training = run.config.data.seq_length, run.config.training
    # a step of another batch reads other samples
    last: dict[Item, tuple[float, float]] = {
        (line["step"], training.global_batch): (line["loss"], 1.0)
        for line in lines
        if line["step"] > (1 - LAST_SHARE) * training.steps and math.isfinite(line["loss"])
    }
    yield Measure(TRAINING, "loss", length), last
    for line in lines:
        if line["valid_loss"] is not None:
            yield (
                Measure(TRAINING, "valid_loss", length, step=line["step"]),
                {("all",): (line["valid_loss"], 1.0)},
            )


def headline(study: Study, compared: list[ArmComparison]) -> Measure:
    """The measure that arms are compared by first: loss on the first held-out documents that `branches.evaluate` names."""
    names = list(_branches(study).evaluate)
    found = [each.measure for each in compared if each.measure.task == DOCUMENTS and each.measure.end is None]
    return min(found, key=lambda measure: (names.index(measure.evaluation), -measure.length))


def as_rows(study: Study, compared: list[ArmComparison]) -> list[dict[str, Any]]:
    """A flat row for each comparison, as `comparisons.json` and `comparisons.csv` hold them."""
    reference = _branches(study).reference
    return [
        {
            "base": each.base,
            "size": each.size,
            "arm": each.arm,
            "reference": reference,
            "evaluation": each.measure.evaluation,
            "task": each.measure.task,
            "length": each.measure.length,
            "from": each.measure.begin,
            "to": each.measure.end,
            "step": each.measure.step,
            "unit": "nats" if each.measure.is_loss else "score",
            "orders": list(each.found.orders),
            "items": each.found.items,
            **_numbers("value", each.found.value),
            "reference_value": each.found.reference,
            **_numbers("difference", each.found.difference),
            **_numbers("relative", each.found.relative),
            **_numbers("median", each.found.median if each.measure.is_loss else None),
            "verdict": "reference" if each.is_reference else each.found.verdict,
        }
        for each in compared
    ]


def _numbers(name: str, found: Ratio | None) -> Mapping[str, float | None]:
    return {
        name: found.value if found else None,
        f"{name}_error_items": found.error_items if found else None,
        f"{name}_error_orders": found.error_orders if found else None,
    }


def write_comparisons(study: Study, compared: list[ArmComparison], folder: Path) -> tuple[Path, Path]:
    """Write `comparisons.json` and `comparisons.csv` into a folder, each whole or not at all."""
    rows = as_rows(study, compared)
    cells = [{**row, "orders": " ".join(map(str, row["orders"]))} for row in rows]
    return write_rows(folder / "comparisons", rows, cells)
