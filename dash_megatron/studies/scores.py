"""What `evaluate` found of a study's runs: scores of tasks and losses of text by length, one line a variant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from dash_megatron.drawing import GRID, line_widths, plt, save_with_legend, tokens_axis
from dash_megatron.evaluation.runner import RESULTS
from dash_megatron.evaluation.settings import LOSS_TASKS

Place = TypeVar("Place", bound=Any)


class TaskLength(NamedTuple):
    """What a score or loss is of."""

    task: str
    stretched: bool
    """Whether RoPE was stretched for the evaluation."""
    length: int


def read_scores(run_dir: Path) -> dict[TaskLength, float]:
    """Scores, and of `LOSS_TASKS` losses, that `evaluate` left in a run's folder `evaluation`; of several for one place the newest.

    Raises:
        ValueError: a file is damaged.
    """
    found: dict[TaskLength, float] = {}
    files = sorted((run_dir / "evaluation").glob(f"*/{RESULTS}"), key=lambda path: path.stat().st_mtime)
    for path in files:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            stretched = bool(results["model"].get("rope_scaling"))
            for task, lengths in results["tasks"].items():
                for length, summary in lengths.items():
                    value = summary["nll" if task in LOSS_TASKS else "score"]
                    if value is not None:  # the loss of a diverged model
                        found[TaskLength(task, stretched, int(length))] = value
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no result of `evaluate` ({error!r}); remove it") from error
    return found


def means_over_runs(runs: Sequence[Mapping[Place, float]]) -> dict[Place, float]:
    """Means over repetitions, such as of scores by task and length, where each has a value, in order of the keys."""
    common = sorted(set.intersection(*map(set, runs))) if runs else []
    return {place: fmean(run[place] for run in runs) for place in common}


def draw_scores(
    scores: Mapping[str, Mapping[TaskLength, float]],
    styles: Mapping[str, tuple[str, str]],
    trained_length: int,
    path: Path,
) -> str:
    """Draw a panel for each task.

    Args:
        scores: by variant, of `LOSS_TASKS` alone or of none of them.
        styles: color and marker of each variant.
        trained_length: where a line stands.
        path: PNG to write.

    Returns:
        A sentence on what it shows.
    """
    tasks = sorted({place.task for found in scores.values() for place in found})
    lengths = sorted({place.length for found in scores.values() for place in found})
    of_text = tasks[0] in LOSS_TASKS
    columns = min(3, len(tasks))
    height = -(-len(tasks) // columns)
    size = (max(6, 4 * columns), 3.2 * height + 0.6)
    figure, axes = plt.subplots(
        height, columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for (variant, found), width in zip(scores.items(), line_widths(len(scores)), strict=True):
            color, marker = styles[variant]
            for stretched in (False, True):
                points = {p.length: score for p, score in found.items() if p[:2] == (task, stretched)}
                if points:
                    label = None if stretched else variant
                    line = {"ls": ":" if stretched else "-", "lw": width, "marker": marker, "ms": 3 + width}
                    axis.plot(list(points), list(points.values()), color=color, label=label, **line)
        axis.axvline(trained_length, color="gray", lw=0.8, ls="--")
        axis.set_title(task, fontsize=9)
        tokens_axis(axis, lengths)
        if not of_text:
            axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("tokens")
        axis.grid(alpha=GRID)
    axes[0][0].set_ylabel("loss (nats)" if of_text else "score")
    save_with_legend(figure, path, f"{'Losses of text' if of_text else 'Scores of tasks'} by length")
    what = (
        "Losses of text by the most tokens of it"
        if of_text
        else "Scores of tasks by the length of prompt and answer"
    )
    text = f"{what}, means over seeds; the dashed line is data.seq_length"
    stretched = any(place.stretched for found in scores.values() for place in found)
    return text + (", dotted lines are with RoPE stretched for the evaluation." if stretched else ".")
