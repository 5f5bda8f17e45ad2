"""`study plot`: loss against compute, quality against density, density by layer and step, speed against context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window
import matplotlib.pyplot as plt
import numpy as np

from dash_megatron.studies.collect import compared
from dash_megatron.studies.fit import frontier
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import Study
from dash_megatron.training.metrics import read_metrics

# colours that colour-blind people tell apart (Okabe and Ito), and markers for those who print
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_MAX_PANELS = 6


def draw_study(
    study: Study, rows: list[dict[str, Any]], fits: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Draw what the runs have data for.

    Args:
        study: whose runs' metrics are read for the density by layer.
        rows, fits: as `collect` and `fit_study` give them.
        folder: where the PNGs go.

    Returns:
        A sentence on what it shows for each file written, in the order of a report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished, quality = compared(rows)
    shown = {"loss_compute.png": _loss_compute(finished, quality, fits, folder / "loss_compute.png")}
    if any(row["density"] is not None for row in finished):
        shown["pareto.png"] = _pareto(finished, quality, folder / "pareto.png")
        text = _density_by_layer(study, rows, folder / "density.png")
        if text:
            shown["density.png"] = text
    shown["throughput.png"] = _throughput(finished, folder / "throughput.png")
    return shown


def _styles(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    variants = dict.fromkeys(row["variant"] for row in rows)
    return {
        variant: (_COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)])
        for index, variant in enumerate(variants)
    }


def _figure(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(8, 5))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    return figure, axis


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _loss_compute(rows: list[dict[str, Any]], quality: str, fits: dict[str, Any], path: Path) -> str:
    figure, axis = _figure("training FLOPs at the measured density", f"{quality} (nats)")
    for variant, (color, marker) in _styles(rows).items():
        own = [row for row in rows if row["variant"] == variant]
        flops = np.array([row["flops"] for row in own])
        axis.plot(flops, [row["quality"] for row in own], marker, color=color, label=variant)
        values = fits["variants"].get(variant, {}).get("compute", {}).get("values")
        if values:
            grid = np.geomspace(flops.min(), flops.max(), 100)
            axis.plot(grid, values["E"] + values["K"] * grid ** -values["c"], color=color, lw=1)
    axis.set_xscale("log")
    axis.legend()
    _save(figure, path)
    return f"{quality[0].upper()}{quality[1:]} against training FLOPs, one point a run; lines are fits to each frontier."


def _pareto(rows: list[dict[str, Any]], quality: str, path: Path) -> str:
    figure, axis = _figure("density (% of available chunks selected)", f"{quality} (nats)")
    # twins of one size differ by the router's few parameters
    sizes = list(dict.fromkeys(row["size"] for row in sorted(rows, key=lambda row: row["parameters"])))
    for variant, (color, marker) in _styles(rows).items():
        own = [row for row in rows if row["variant"] == variant]
        density = [100.0 if row["density"] is None else 100 * row["density"] for row in own]
        area = [30 + 60 * sizes.index(row["size"]) / max(1, len(sizes) - 1) for row in own]
        axis.scatter(
            density, [row["quality"] for row in own], s=area, color=color, marker=marker, label=variant
        )
    for equal in dict.fromkeys((row["size"], row["tokens"]) for row in rows):
        same = [row for row in rows if (row["size"], row["tokens"]) == equal]
        points = [(100.0 if row["density"] is None else 100 * row["density"], row["quality"]) for row in same]
        best = frontier(np.array([point[0] for point in points]), np.array([point[1] for point in points]))
        axis.plot(*zip(*[points[index] for index in best], strict=True), color="gray", lw=0.8, zorder=0)
    axis.set_xlim(0, 105)
    axis.legend()
    _save(figure, path)
    return (
        f"{quality[0].upper()}{quality[1:]} against density, mean over layers that select; larger marks are larger models, "
        "full attention stands at 100%, and lines join, at equal size and tokens, the runs that no other beats at its density or less."
    )


def _density_by_layer(study: Study, rows: list[dict[str, Any]], path: Path) -> str | None:
    started = {row["run"] for row in rows if row["density"] is not None}
    runs = [run for run in expand(study) if run.name in started][:_MAX_PANELS]
    if not runs:
        return None
    columns = min(3, len(runs))
    height = -(-len(runs) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4 * columns, 3.2 * height), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    colors = plt.get_cmap("viridis")
    for axis, run in zip(axes.flat, runs, strict=False):
        metrics = read_metrics(run.folder)
        layers = len(metrics[0]["density_per_layer"])
        for layer in range(layers):
            points = [(line["step"], line["density_per_layer"][layer]) for line in metrics]
            known = [(step, 100 * value) for step, value in points if value is not None]
            if known:
                label = f"layer {layer}" if layer in (0, layers - 1) else None
                axis.plot(
                    *zip(*known, strict=True),
                    color=colors(layer / max(1, layers - 1) * 0.9),
                    lw=1,
                    label=label,
                )
        axis.set_title(run.name, fontsize=8, wrap=True)
        axis.set_ylim(0, 105)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("density (%)")
    _save(figure, path)
    more = f"; the first {len(runs)} of {len(started)} runs" if len(started) > len(runs) else ""
    return f"Density of every layer over steps, from the first layer (dark) to the last (light){more}."


def _throughput(rows: list[dict[str, Any]], path: Path) -> str:
    figure, axis = _figure("tokens in a sequence", "tokens per second (median of logged steps)")
    sizes = list(dict.fromkeys((row["parameters"], row["size"]) for row in rows))
    for variant, (color, marker) in _styles(rows).items():
        label: str | None = variant
        for _, size in sizes:
            own = [row for row in rows if row["variant"] == variant and row["size"] == size]
            if own:
                pairs = sorted((row["seq_length"], row["tokens_per_second"]) for row in own)
                axis.plot(*zip(*pairs, strict=True), marker=marker, color=color, lw=1, label=label)
                label = None
    lengths = sorted({row["seq_length"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.legend()
    _save(figure, path)
    return "Speed of training against context length, one line a size of each variant."
