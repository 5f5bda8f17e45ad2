"""What a study of branches came to, as tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from dash_megatron.evaluation.settings import LOSS_TASKS
from dash_megatron.planning.table import table
from dash_megatron.studies.branches import TRAINING, ArmComparison, Measure, headline
from dash_megatron.studies.collect import missed_targets
from dash_megatron.studies.jobs import missing_evaluations
from dash_megatron.studies.runs import StudyRun, expand
from dash_megatron.studies.study_file import Study

VERDICT_WORDS = {
    "above": "higher",
    "below": "lower",
    "within": "not told apart",
    "unknown": "unknown",
}
VERDICT_HEADINGS = {
    "above": "Beyond two standard errors",
    "below": "Beyond two standard errors",
    "within": "Not told apart by two standard errors",
    "unknown": "Unknown: in one order of the data, or of one document, sample or step, which does not say how others scatter; or not finite",
}
NOTE = (
    "Differences are paired: of the same documents, samples or steps, in the same order of the data. The first ± is the standard "
    "error over these, the second over orders. What is called higher or lower is further from 0 than two of the larger error. Errors "
    "over documents alone mislead: with the data in another order, an arm ended by up to ten times as much elsewhere. With three "
    "orders two standard errors are exceeded by chance 18 times in 100, with two 30 times: repeat what matters with more. The median "
    "is over documents, each of which counts once. A few long or repetitive documents can make up the total, but cannot move it."
)


class Table(NamedTuple):
    """A table as text."""

    caption: str
    columns: Sequence[str]
    lines: list[list[str]]


def tables(study: Study, rows: list[dict[str, Any]], compared: list[ArmComparison]) -> list[Table]:
    """The arms of each base, then everything else that was measured: other losses, and scores.

    Args:
        study: the study.
        rows: as `collect` gives them, of density, speed and memory.
        compared: as `compare_branches` gives them.
    """
    found = []
    first = headline(study, compared)
    for base in dict.fromkeys(each.base for each in compared):
        own = [each for each in compared if each.base == base and is_whole_and_final(each.measure)]
        found.append(_arms_table(base, first, [row for row in rows if row["base"] == base], own))
        losses = [
            each for each in own if each.measure.is_loss and each.measure not in (first, *_training(own))
        ]
        if losses:
            found.append(_comparisons_table(f"Other losses of the branches of {base}, nats a token", losses))
        scores = [each for each in own if not each.measure.is_loss]
        if scores:
            found.append(_comparisons_table(f"Scores of the branches of {base}", scores))
    return found


def remarks(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    """What to know before the comparisons are read: runs that they lack, and branches far from the density asked for.

    Args:
        study: the study.
        rows: as `collect` gives them.
    """
    runs = expand(study)
    branches = [row for row in rows if row["base"]]
    return [*_missing_runs(study, runs, rows), *missed_targets(runs, branches)]


def _missing_runs(study: Study, runs: list[StudyRun], rows: list[dict[str, Any]]) -> list[str]:
    """A sentence that names the runs which the comparisons lack; none where they have all."""
    trained = {row["run"] for row in rows if row["finished"]}
    names = [run.name for run in runs if run.name not in trained or missing_evaluations(study, run)]
    return [f"Not trained, or not evaluated as the study says: {', '.join(names)}."] if names else []


def is_whole_and_final(measure: Measure) -> bool:
    """Whether a measure is over all positions, and of the branch at its end."""
    return measure.end is None and measure.step is None


def _training(own: list[ArmComparison]) -> list[Measure]:
    return [each.measure for each in own if each.measure.evaluation == TRAINING]


def _arms_table(base: str, first: Measure, rows: list[dict[str, Any]], own: list[ArmComparison]) -> Table:
    reference = next(each.arm for each in own if each.is_reference)
    columns = (
        "arm", "orders", "density", "tokens/s", "GiB", "loss", f"to {reference}", "± documents", "± orders", "verdict",
        "median", "± documents", "± orders", "training loss", "± steps", "± orders",
    )  # fmt: skip
    lines = []
    for each in own:
        if each.measure != first:
            continue
        training = [x for x in own if x.arm == each.arm and x.measure in _training(own)]
        of_arm = [row for row in rows if row["variant"] == each.arm and row["seed"] in each.found.orders]
        lines.append(
            [
                each.arm,
                " ".join(map(str, each.found.orders)),
                _mean([row["density"] for row in of_arm], "{:.1%}"),
                _mean([row["tokens_per_second"] for row in of_arm], "{:,.0f}"),
                _mean([row["gpu_memory_gib"] for row in of_arm], "{:.1f}"),
                f"{each.found.value.value:.4f}",
                *difference_and_errors(each),
                verdict_word(each),
                *median_and_errors(each),
                *(difference_and_errors(training[0]) if training else ("", "", "")),
            ]
        )
    caption = (
        f"Branches of {base}: {name_of(first)} in nats a token; it and the training loss against {reference}"
    )
    return Table(caption, columns, lines)


def _comparisons_table(caption: str, shown: list[ArmComparison]) -> Table:
    """A line for each comparison, by measure."""
    reference = next(each.arm for each in shown if each.is_reference)
    to = f"to {reference}" if shown[0].measure.is_loss else f"of {reference}'s"
    columns = ("measure", "arm", "value", "± items", "± orders", to, "± items", "± orders", "verdict")
    lines = [
        [
            name_of(each.measure),
            each.arm,
            f"{each.found.value.value:.4f}",
            _error(each.found.value.error_items, "{:.4f}"),
            _error(each.found.value.error_orders, "{:.4f}"),
            *difference_and_errors(each),
            verdict_word(each),
        ]
        for each in sorted(shown, key=lambda each: each.measure[:3])
    ]
    return Table(caption, columns, lines)


def name_of(measure: Measure) -> str:
    """What a measure is called in tables and sentences."""
    if measure.evaluation == TRAINING:
        return "training loss"
    if measure.is_loss:
        return f"loss on {measure.evaluation} ({measure.task} up to {measure.length:,})"
    return f"{measure.task} at {measure.length:,} ({measure.evaluation})"


def verdict_word(each: ArmComparison) -> str:
    """The verdict as tables write it."""
    if each.is_reference:
        return "reference"
    word = VERDICT_WORDS[each.found.verdict]
    if each.found.verdict != "unknown":
        return word
    if not math.isfinite(each.found.difference.value):
        return f"not finite, {word}"
    return f"one {'order' if len(each.found.orders) < 2 else 'item'}, {word}"


def difference_and_errors(each: ArmComparison) -> tuple[str, str, str]:
    """How an arm stands to the reference, and the errors over items and over orders; empty for the reference itself.

    Losses differ by percents; a score is a share of the reference's, or differs from it where that is 0.
    """
    if each.is_reference:
        return "", "", ""
    found, shift, form, error_form = each.found.relative, 0.0, "{:+.2%}", "{:.2%}"
    if found is None:
        found, form, error_form = each.found.difference, "{:+.3f}", "{:.3f}"
    elif not each.measure.is_loss:
        shift, form, error_form = 1.0, "{:.3f}", "{:.3f}"
    errors = _error(found.error_items, error_form), _error(found.error_orders, error_form)
    return form.format(found.value + shift), *errors


def median_and_errors(each: ArmComparison) -> tuple[str, str, str]:
    """How the median document stands to the reference, and the errors over documents and over orders, as above."""
    found = each.found.median
    if each.is_reference or found is None:
        return "", "", ""
    return f"{found.value:+.2%}", _error(found.error_items, "{:.2%}"), _error(found.error_orders, "{:.2%}")


def _error(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(fmean(known)) if known else ""


def as_text(found: Table) -> list[str]:
    """Lines for a terminal."""
    return [found.caption, *table(found.lines, found.columns)]


def as_markdown(found: Table) -> list[str]:
    """Lines to paste into a page."""
    rows = [found.columns, ["---"] * len(found.columns), *found.lines]
    return [f"{found.caption}.", "", *("| " + " | ".join(row) + " |" for row in rows)]


def sentences(study: Study, compared: list[ArmComparison]) -> dict[str, dict[str, list[str]]]:
    """For each base a sentence for every arm and measure, by whether the difference is beyond two standard errors.

    Scores that are 0 for an arm and for the reference share a sentence.
    """
    assert study.branches
    reference = study.branches.reference
    found: dict[str, dict[str, list[str]]] = {}
    zero: dict[tuple[str, str, str], list[str]] = {}
    first = headline(study, compared)
    for each in sorted(compared, key=lambda each: each.measure != first):
        if each.is_reference or not is_whole_and_final(each.measure):
            continue
        groups = found.setdefault(
            each.base, {group: [] for group in dict.fromkeys(VERDICT_HEADINGS.values())}
        )
        group = VERDICT_HEADINGS[each.found.verdict]
        if each.found.value.value == each.found.reference == 0:
            zero.setdefault((each.base, group, each.arm), []).append(name_of(each.measure))
        else:
            groups[group].append(_sentence(each, reference))
    for (base, group, arm), names in zero.items():
        found[base][group].append(f"{arm}: {', '.join(names)}: 0, as {reference}.")
    return found


def _sentence(each: ArmComparison, reference: str) -> str:
    of_text = each.measure.task in LOSS_TASKS
    counted = "documents" if of_text else "steps" if each.measure.task == "loss" else "samples"
    by, *errors = difference_and_errors(each)
    within = _in_brackets(each, counted, *errors)
    what = f"{each.arm}: {name_of(each.measure)}: {by}"
    if of_text:
        middle, *errors = median_and_errors(each)
        return f"{what} against {reference}{within}, of the median document {middle}{_in_brackets(each, counted, *errors)}."
    if each.measure.is_loss:
        return f"{what} against {reference}{within}."
    if each.found.relative is None:
        return f"{what} against {reference}, which has 0{within}."
    return f"{what} of {reference}'s score{within}."


def _in_brackets(each: ArmComparison, counted: str, items: str, orders: str) -> str:
    """Errors for a sentence; nothing where there are none."""
    parts = [f"± {items} over {each.found.items} {counted}"] if items else []
    parts += [f"± {orders} over {len(each.found.orders)} orders"] if orders else []
    return f" ({', '.join(parts)})" if parts else ""
