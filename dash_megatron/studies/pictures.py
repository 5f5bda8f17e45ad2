"""`study plot`: loss against compute, tokens, position and density, density by layer and step, speed against context."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

from dash_megatron.drawing import GRID, line_style, line_widths, plt, save, tokens_axis
from dash_megatron.evaluation.settings import LOSS_TASKS
from dash_megatron.studies.collect import dense_twins, rows_with_quality
from dash_megatron.studies.fit import frontier
from dash_megatron.studies.plan import human
from dash_megatron.studies.plot_run import draw_densities
from dash_megatron.studies.runs import expand
from dash_megatron.studies.scores import TaskLength, draw_scores, means_over_runs, read_scores
from dash_megatron.studies.study_file import Study
from dash_megatron.training.metrics import read_metrics

_MAX_PANELS = 6
_MIN_VALIDATIONS = 3
_MAX_MARKS = 100
_LENGTH = re.compile(r" seq_length=\S+")


def draw_study(
    study: Study, rows: list[dict[str, Any]], fits: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Draw what the runs have data for.

    Args:
        study: whose runs' metrics and scores are read.
        rows, fits: as `collect` and `fit_study` give them.
        folder: where the PNGs go.

    Returns:
        A sentence on what it shows for each file written, in the order of a report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished, quality = rows_with_quality(rows)
    folders = {run.name: run.folder for run in expand(study)}
    found = {row["run"]: read_scores(folders[row["run"]]) for row in finished}
    shown = {
        "loss_compute.png": _loss_compute(finished, quality, fits, folder / "loss_compute.png"),
        "curves.png": _loss_over_tokens(folders, finished, quality, folder / "curves.png"),
        "position.png": _loss_by_position(folders, finished, folder / "position.png"),
        "scores.png": _task_scores(found, finished, False, folder / "scores.png"),
        "losses.png": _task_scores(found, finished, True, folder / "losses.png"),
    }
    if any(row["density"] is not None for row in finished):
        shown["pareto.png"] = _pareto(finished, quality, folder / "pareto.png")
        shown["density.png"] = _density_by_layer(folders, rows, folder / "density.png")
    shown["throughput.png"] = _throughput(finished, folder / "throughput.png")
    return {name: text for name, text in shown.items() if text}


def _styles(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    variants = dict.fromkeys(row["variant"] for row in rows)
    return {variant: line_style(index) for index, variant in enumerate(variants)}


def _figure(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(8, 5))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=GRID)
    return figure, axis


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save(figure, path)


def _save_beside_twins(figure: Any, axes: Any, path: Path, title: str) -> None:
    """Save quality and, if there are two axes, its difference to the dense twin's."""
    for axis in axes[1:]:
        axis.axhline(0, color="gray", lw=1)
    axes[0].legend(fontsize="small", framealpha=0.6)
    _save(figure, path, title)


def _loss_compute(rows: list[dict[str, Any]], quality: str, fits: dict[str, Any], path: Path) -> str:
    figure, axis = _figure("training FLOPs at the measured density", f"{quality} (nats)")
    fitted = False
    for variant, (color, marker) in _styles(rows).items():
        own = [row for row in rows if row["variant"] == variant]
        flops = np.array([row["flops"] for row in own])
        axis.plot(flops, [row["quality"] for row in own], marker, color=color, label=variant)
        values = fits["variants"].get(variant, {}).get("compute", {}).get("values")
        if values:
            grid = np.geomspace(flops.min(), flops.max(), 100)
            axis.plot(grid, values["E"] + values["K"] * grid ** -values["c"], color=color, lw=1)
            fitted = True
    axis.set_xscale("log")
    spent = [row["flops"] for row in rows]
    wide = max(spent) / min(spent)
    # two ticks or more, and as many digits as tell them apart
    axis.xaxis.set_major_locator(
        AutoLocator() if wide < 3 else LogLocator(subs=(1, 2, 5) if wide < 100 else (1,))
    )
    axis.xaxis.set_major_formatter("{x:.4g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(fontsize="small")
    _save(figure, path, f"{quality[0].upper()}{quality[1:]} against compute")
    text = f"{quality[0].upper()}{quality[1:]} against training FLOPs, one point a run"
    return text + ("; lines are fits to each frontier." if fitted else ".")


def _loss_over_tokens(folders: dict[str, Path], rows: list[dict[str, Any]], quality: str, path: Path) -> str:
    shown = _largest(rows)
    metrics = {row["run"]: read_metrics(folders[row["run"]]) for row in shown}
    # fewer points would be no curve
    validated = all(
        sum(line["valid_loss"] is not None for line in lines) >= _MIN_VALIDATIONS
        for lines in metrics.values()
    )
    key: Literal["valid_loss", "loss"] = (
        "valid_loss" if quality.startswith("validation loss") and validated else "loss"
    )
    name = "validation loss" if key == "valid_loss" else "training loss"
    figure, axis = _figure("training tokens", f"{name} (nats)")
    styles = _styles(shown)
    for (variant, (color, marker)), width in zip(styles.items(), line_widths(len(styles)), strict=True):
        label: str | None = variant
        for run in [row["run"] for row in shown if row["variant"] == variant]:
            lines = [line for line in metrics[run] if line[key] is not None]
            tokens, losses = [line["tokens"] for line in lines], [line[key] for line in lines]
            mark = "" if len(lines) > _MAX_MARKS else marker
            axis.plot(tokens, losses, mark, ls="-", lw=width, ms=3 + width, color=color, label=label)
            label = None
    axis.xaxis.set_major_formatter(lambda tokens, _: human(tokens))
    axis.legend(fontsize="small")
    _save(figure, path, f"{name.capitalize()} over training")
    return f"{name.capitalize()} over training, a line for each of the largest runs."


def _loss_by_position(folders: dict[str, Path], rows: list[dict[str, Any]], path: Path) -> str | None:
    losses = {row["run"]: _last_positions(folders[row["run"]]) for row in rows}
    shown = _largest([row for row in rows if losses[row["run"]]])
    if not shown:
        return None
    twins = {run: losses[twin["run"]] for run, twin in dense_twins(rows).items() if losses[twin["run"]]}
    names = {row["run"]: row["variant"] for row in shown}
    panels = [({run: losses[run] for run in names}, "validation loss")]
    if twins:
        above = {
            run: {end: loss - twins[run][end] for end, loss in losses[run].items() if end in twins[run]}
            for run in names
            if run in twins
        }
        panels.append((above, "validation loss above the dense twin's"))
    figure, axes = plt.subplots(1, len(panels), figsize=(12 if twins else 8, 5), squeeze=False)
    for axis, (values, label) in zip(axes[0], panels, strict=True):
        styles = _styles(shown)
        for (name, (color, marker)), width in zip(styles.items(), line_widths(len(styles)), strict=True):
            points = means_over_runs([part for run, part in values.items() if names[run] == name])
            axis.plot(list(points), list(points.values()), color=color, marker=marker, lw=width, label=name)
        tokens_axis(axis, sorted({end for points in values.values() for end in points}))
        axis.set_xlabel("position in the document, up to (tokens)")
        axis.set_ylabel(f"{label} (nats)")
        axis.grid(alpha=GRID)
    _save_beside_twins(figure, axes[0], path, "Loss by position in the document")
    text = "Loss of the last validation by position in the document, of the largest runs; means over seeds."
    return text + (" On the right, less that of the full-attention twin: below 0 is better." if twins else "")


def _largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the largest size that trained longest; variants of several sizes get the size into their name."""
    if not rows:
        return []
    # kinds of one size differ by a few parameters
    largest = max(row["parameters"] for row in rows)
    of_size = [row for row in rows if row["parameters"] > 0.9 * largest]
    # a budget of FLOPs gives larger models fewer tokens, and denser ones too where it is counted at the assumed density
    lengths = [row["budget"] or row["tokens"] for row in of_size]
    shown = [row for row, length in zip(of_size, lengths, strict=True) if length == max(lengths)]
    if len({row["size"] for row in shown}) > 1:
        shown = [{**row, "variant": f"{row['size']} ({row['variant']})"} for row in shown]
    return shown


def _task_scores(
    scores: dict[str, dict[TaskLength, float]], rows: list[dict[str, Any]], of_text: bool, path: Path
) -> str | None:
    """Scores by length, or losses of text where `of_text`."""
    found = {
        run: {place: value for place, value in of_run.items() if (place.task in LOSS_TASKS) == of_text}
        for run, of_run in scores.items()
    }
    shown = _largest([row for row in rows if found[row["run"]]])
    if not shown:
        return None
    styles = _styles(shown)
    means = {
        name: means_over_runs([found[row["run"]] for row in shown if row["variant"] == name])
        for name in styles
    }
    return draw_scores(means, styles, shown[0]["seq_length"], path)


def _last_positions(folder: Path) -> dict[int, float]:
    """Loss by the end of the bucket of positions, of the last validation that says so."""
    found = [parts for line in read_metrics(folder) if (parts := line.get("valid_loss_by_position"))]
    return {part["to"]: part["loss"] for part in found[-1]} if found else {}


def _pareto(rows: list[dict[str, Any]], quality: str, path: Path) -> str:
    twins = dense_twins(rows)
    figure, axes = plt.subplots(1, 1 + bool(twins), figsize=(12 if twins else 8, 5), squeeze=False)
    # twins of one size differ by the router's few parameters
    sizes = list(dict.fromkeys(row["size"] for row in sorted(rows, key=lambda row: row["parameters"])))
    density = {row["run"]: 100.0 if row["density"] is None else 100 * row["density"] for row in rows}
    for variant, (color, marker) in _styles(rows).items():
        own = [row for row in rows if row["variant"] == variant]
        for axis, reference in zip(axes[0], (None, twins), strict=False):
            shown = [row for row in own if reference is None or row["run"] in reference]
            axis.scatter(
                [density[row["run"]] for row in shown],
                [row["quality"] - (reference[row["run"]]["quality"] if reference else 0) for row in shown],
                s=[30 + 60 * sizes.index(row["size"]) / max(1, len(sizes) - 1) for row in shown],
                color=color,
                marker=marker,
                label=variant,
            )
    for equal in _grouped(rows, "size", "tokens").values():
        seeds = [
            [(density[row["run"]], row["quality"]) for row in own]
            for own in _grouped(equal, "variant").values()
        ]
        points = np.array([np.mean(each, axis=0) for each in seeds])
        best = frontier(points[:, 0], points[:, 1])
        axes[0][0].plot(*points[best].T, color="gray", lw=0.8, zorder=0)
    for axis, label in zip(axes[0], (quality, f"{quality},\nabove the dense twin's"), strict=False):
        axis.set_xlim(0, 105)
        axis.set_xlabel("density (% of available chunks selected)")
        axis.set_ylabel(f"{label} (nats)")
        axis.grid(alpha=GRID)
    _save_beside_twins(figure, axes[0], path, f"{quality[0].upper()}{quality[1:]} against density")
    text = (
        f"{quality[0].upper()}{quality[1:]} against density, mean over layers that select; larger marks are larger models, "
        "full attention stands at 100%, and lines join, at equal size and tokens, the means over seeds that no other beats at its density or less."
    )
    return text + (" On the right, less that of the full-attention twin: below 0 is better." if twins else "")


def _density_by_layer(folders: dict[str, Path], rows: list[dict[str, Any]], path: Path) -> str | None:
    started = {row["run"]: row["tokens"] for row in rows if row["density"] is not None}
    longest = sorted(started, key=started.__getitem__, reverse=True)[:_MAX_PANELS]
    runs = [name for name in folders if name in longest]
    if not runs:
        return None
    columns = min(3, len(runs))
    height = -(-len(runs) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4 * columns, 3.2 * height), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis, run in zip(axes.flat, runs, strict=False):
        metrics = read_metrics(folders[run])
        draw_densities(axis, metrics, all_labels=False)
        axis.set_title(run, fontsize=8, wrap=True)
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("density (%)")
    _save(figure, path, "Density of every layer over training")
    more = (
        f"; the {len(runs)} of {len(started)} runs that read most tokens" if len(started) > len(runs) else ""
    )
    return f"Density of every layer over steps, from the first layer (dark) to the last (light){more}."


def _grouped(rows: list[dict[str, Any]], *columns: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows by what they have in some columns."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def _throughput(rows: list[dict[str, Any]], path: Path) -> str:
    rows = [{**row, "variant": _LENGTH.sub("", row["variant"])} for row in rows]
    lengths = sorted({row["seq_length"] for row in rows})
    # one length alone would be a column of marks
    column, across = ("seq_length", "size") if len(lengths) > 1 else ("parameters", "seq_length")
    names = {"seq_length": "tokens in a sequence", "parameters": f"parameters, at {lengths[0]:,} tokens"}
    figure, axis = _figure(names[column], "tokens per second (median of logged steps)")
    for variant, (color, marker) in _styles(rows).items():
        label: str | None = variant
        own = [row for row in rows if row["variant"] == variant]
        for line in _grouped(own, across).values():
            alike = sorted(_grouped(line, column).items())
            points = [(at, median(row["tokens_per_second"] for row in each)) for (at,), each in alike]
            axis.plot(*zip(*points, strict=True), marker=marker, color=color, lw=1, label=label)
            label = None
    if column == "seq_length":
        tokens_axis(axis, lengths)
    else:
        axis.set_xscale("log")
        known = sorted(
            {row["parameters"] for row in rows if row["kind"] == "full"}
            or {row["parameters"] for row in rows}
        )
        axis.set_xticks(known, [human(number) for number in known])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.margins(x=0.1, y=0.2)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize="small", framealpha=0.6)
    _save(figure, path, "Speed of training")
    if column == "seq_length":
        return "Speed of training against context length, one line a size of each variant; medians of runs alike."
    return "Speed of training against parameters, at the study's one context length; medians of runs alike."
