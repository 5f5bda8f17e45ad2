"""Pictures of a study of branches: differences by position and over steps, and scores by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dash_megatron.drawing import COLORS, GRID, line_style, plt, save_with_legend, tokens_axis
from dash_megatron.studies.branches import TRAINING, ArmComparison, headline
from dash_megatron.studies.paired import Ratio
from dash_megatron.studies.study_file import Study

_BAND = "Bands and bars are a standard error, the larger of that over items and that over orders; with one order there is none."


def draw_branches(study: Study, compared: list[ArmComparison], folder: Path) -> dict[str, str]:
    """Draw what there is to draw.

    Args:
        study: the study.
        compared: as `compare_branches` gives them.
        folder: where the PNGs go.

    Returns:
        A sentence on what it shows for each file written.
    """
    assert study.branches
    folder.mkdir(parents=True, exist_ok=True)
    reference = study.branches.reference
    others = [str(arm["name"]) for arm in study.branches.arms if arm["name"] != reference]
    styles = {arm: line_style(index) for index, arm in enumerate(others)} | {reference: (COLORS[-1], "o")}
    first = headline(study, compared)
    shown = {}
    by_position = [
        each
        for each in compared
        if each.measure[:3] == first[:3] and each.measure.end and not each.is_reference
    ]
    figure = _differences(by_position, styles, lambda each: each.measure.end)
    for axis in figure.axes:
        tokens_axis(axis, sorted({each.measure.end for each in by_position if each.measure.end}))
        axis.set_xlabel("position in the document, up to (tokens)")
    save_with_legend(
        figure, folder / "position.png", f"Loss against {reference}, by position in held-out documents"
    )
    shown["position.png"] = (
        f"Loss on held-out documents against {reference}, by position in the document; below 0 is better. {_BAND}"
    )
    over_steps = [each for each in compared if each.measure.evaluation == TRAINING and each.measure.step]
    over_steps = [each for each in over_steps if not each.is_reference]
    if over_steps:
        figure = _differences(over_steps, styles, lambda each: each.measure.step)
        for axis in figure.axes:
            axis.set_xlabel("optimizer step of the branch")
            axis.set_xlim(left=0)
        save_with_legend(figure, folder / "steps.png", f"Validation loss against {reference}, over training")
        shown["steps.png"] = (
            f"Validation loss against {reference} at the same step in the same order; below 0 is better. The last point "
            f"counts: before it the learning rate is high. {_BAND}"
        )
    scores = [each for each in compared if not each.measure.is_loss]
    for evaluation in dict.fromkeys(each.measure.evaluation for each in scores):
        name = f"scores_{evaluation}.png"
        figure = _scores([each for each in scores if each.measure.evaluation == evaluation], styles)
        save_with_legend(figure, folder / name, f"Scores by length of the prompt: {evaluation}")
        shown[name] = f"Scores of the tasks of `{evaluation}` by the length of prompt and answer. {_BAND}"
    return shown


def _panels(rows: Sequence[Any], columns: Sequence[Any]) -> tuple[Any, Any]:
    size = (max(7.0, 4.6 * len(columns)), 1.2 + 3.4 * len(rows))
    return plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )


def _differences(
    shown: list[ArmComparison],
    styles: dict[str, tuple[str, str]],
    place: Callable[[ArmComparison], int | None],
) -> Any:
    """A panel for each base: percent of the reference's loss, by place."""
    bases = list(dict.fromkeys(each.base for each in shown))
    figure, axes = _panels([0], bases)
    for axis, base in zip(axes[0], bases, strict=True):
        own = [each for each in shown if each.base == base]
        for arm, style in styles.items():
            points = {place(each): each.found.relative for each in own if each.arm == arm}
            _line(axis, points, style, arm, 100.0)
        axis.axhline(0, color="gray", lw=1)
        axis.set_title(f"branches of {base}", fontsize=9)
    axes[0][0].set_ylabel("above the reference's loss (%)")
    return figure


def _scores(shown: list[ArmComparison], styles: dict[str, tuple[str, str]]) -> Any:
    """A row of panels for each base, a panel for each task."""
    bases = list(dict.fromkeys(each.base for each in shown))
    tasks = list(dict.fromkeys(each.measure.task for each in shown))
    figure, axes = _panels(bases, tasks)
    places = sorted({each.measure.length for each in shown})
    for base, row in zip(bases, axes, strict=True):
        for task, axis in zip(tasks, row, strict=True):
            for number, (arm, style) in enumerate(styles.items()):
                # side by side, since many scores are equal
                shift = 2 ** (0.06 * (number - (len(styles) - 1) / 2))
                points = {
                    each.measure.length * shift: each.found.value
                    for each in shown
                    if (each.base, each.measure.task, each.arm) == (base, task, arm)
                }
                _line(axis, points, style, arm, 1.0, band=False)
            tokens_axis(axis, places)
            # arms at one length would else stand at both ends, as if of two
            axis.set_xlim(places[0] / 1.4, places[-1] * 1.4)
            axis.set_ylim(-0.03, 1.03)
            axis.set_title(f"{task}, branches of {base}", fontsize=9)
            axis.set_xlabel("length (tokens)")
        row[0].set_ylabel("score")
    return figure


def _line(
    axis: Any,
    points: Mapping[Any, Ratio | None],
    style: tuple[str, str],
    label: str,
    scale: float,
    band: bool = True,
) -> None:
    """A line with bars, and a band, through what is known; nothing where nothing is."""
    known = sorted((at, found) for at, found in points.items() if at is not None and found is not None)
    axis.grid(alpha=GRID)
    if not known:
        return
    color, marker = style
    at = [place for place, _ in known]
    middle = [scale * found.value for _, found in known]
    axis.plot(at, middle, color=color, marker=marker, ms=4, lw=1.2, label=label)
    errors = [scale * (found.error or 0.0) for _, found in known]
    if any(errors):
        if band:
            low = [value - error for value, error in zip(middle, errors, strict=True)]
            high = [value + error for value, error in zip(middle, errors, strict=True)]
            axis.fill_between(at, low, high, color=color, alpha=0.15, lw=0)
        axis.errorbar(at, middle, yerr=errors, color=color, fmt="none", lw=0.8, capsize=2)
