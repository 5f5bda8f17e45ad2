"""Pictures of `study routing`: by head, by position, selected chunks, and how near to the threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dash_megatron.drawing import GRID, HEAT_MAP, layer_colors, plt, save, tokens_axis

# More cells than so many are drawn without their numbers.
_MAX_NUMBERS = 400
_PANELS_A_ROW = 4

_HEADS = {
    "density": "density\n(% of available chunks)",
    "own_share": "attention in the\nown chunk (%)",
    "evenness": "evenness of the router\n(% of the largest entropy)",
    "near_threshold_attention": "attention near the\nthreshold (%)",
}
_POSITIONS = {
    "density": ("selected chunks (% of available)", 100.0),
    "effective_chunks": ("effective past chunks, exp(entropy)", 1.0),
    "own_share": ("attention in the own chunk (%)", 100.0),
    "near_threshold_attention": ("attention near the threshold (%)", 100.0),
}


def draw_routing(report: dict[str, Any], shares: dict[int, np.ndarray], folder: Path) -> list[Path]:
    """Draw what `study_routing` measured.

    Args:
        report: as routing.json has it.
        shares: selected chunks [kv heads, cells, cells] by layer.
        folder: for the PNGs.

    Returns:
        Their paths.
    """
    densities = {
        layer: float(np.mean(record["heads"]["density"])) for layer, record in _routed(report).items()
    }
    figures = {
        "heads.png": ("What the router of each kv head does", _heads(report)),
        "positions.png": ("Routing by position in the document", _positions(report)),
        "chunks.png": (
            "Which chunks the tokens of each chunk select",
            draw_chunks(shares, densities, report["chunks_per_cell"]),
        ),
        "threshold.png": ("How near to the threshold selected chunks are", _threshold(report)),
    }
    for name, (title, figure) in figures.items():
        figure.suptitle(f"{title}\n{report['run']}, one validation document of {report['tokens']:,} tokens")
        save(figure, folder / name)
    return [folder / name for name in figures]


def _routed(report: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {layer: record for layer, record in enumerate(report["layers"]) if record is not None}


def _heads(report: dict[str, Any]) -> Any:
    records = _routed(report)
    count = len(next(iter(records.values()))["heads"]["density"])
    width, height = max(2.6, 0.55 * count + 1.4), max(3.6, 0.3 * len(records) + 1.8)
    figure, axes = plt.subplots(
        1, len(_HEADS), figsize=(width * len(_HEADS), height), sharey=True, layout="constrained"
    )
    for axis, (name, label) in zip(axes, _HEADS.items(), strict=True):
        grid = np.array([record["heads"][name] for record in records.values()], dtype=float) * 100
        image = axis.imshow(grid, cmap=HEAT_MAP, aspect="auto", vmin=0, vmax=max(1.0, np.nanmax(grid)))
        axis.set_xticks(range(count))
        axis.set_yticks(range(len(records)), [str(layer) for layer in records])
        axis.set_xlabel("kv head")
        axis.set_title(label, fontsize=10)
        figure.colorbar(image, ax=axis)
        if grid.size <= _MAX_NUMBERS:
            for (y, x), value in np.ndenumerate(grid):
                dark = value < 0.55 * image.norm.vmax
                text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                axis.text(
                    x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
    axes[0].set_ylabel("layer")
    return figure


def _layer_legend(figure: Any, records: dict[int, Any]) -> None:
    """A few layers from first to last: colours run from dark to light."""
    shown = sorted({list(records)[round(x)] for x in np.linspace(0, len(records) - 1, min(6, len(records)))})
    colors = layer_colors(list(records))
    lines = [plt.Line2D([], [], color=colors[layer], marker="o", ms=4) for layer in shown]
    figure.legend(
        lines,
        [f"layer {layer}" for layer in shown],
        loc="outside lower center",
        ncols=len(shown),
        frameon=False,
    )


def _positions(report: dict[str, Any]) -> Any:
    records, ends = _routed(report), np.array(report["edges"][1:])
    colors = layer_colors(list(records))
    banded = len(records) <= 8 and len(next(iter(records.values()))["heads"]["density"]) > 1
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharex=True, layout="constrained")
    for axis, (name, (label, factor)) in zip(axes.flat, _POSITIONS.items(), strict=True):
        for layer, record in records.items():
            heads = np.array(record["buckets"][name], dtype=float) * factor
            known = np.flatnonzero(np.isfinite(heads).all(0))
            axis.plot(ends[known], heads.mean(0)[known], marker="o", ms=4, lw=1.3, color=colors[layer])
            if banded:
                axis.fill_between(
                    ends[known],
                    heads.min(0)[known],
                    heads.max(0)[known],
                    color=colors[layer],
                    alpha=0.12,
                    linewidth=0,
                )
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        tokens_axis(axis, report["edges"][1:])
        axis.grid(alpha=GRID)
    kind = "means, and bands over all kv heads" if banded else "means over kv heads"
    for axis in axes[1]:
        axis.set_xlabel(f"end of the bucket of positions (tokens)\n{kind}")
    _layer_legend(figure, records)
    return figure


def draw_chunks(shares: dict[int, np.ndarray], densities: dict[int, float], chunks_per_cell: int) -> Any:
    """A figure with a map for each layer: which chunks the tokens of each chunk select.

    Args:
        shares: of tokens, [kv heads, cells, cells] by layer: rows are those of queries, columns those of keys; NaN stays white.
        densities: by layer, for its title.
        chunks_per_cell: along each side.
    """
    columns = min(_PANELS_A_ROW, len(shares))
    rows = -(-len(shares) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.3 * columns + 1.2, 3.3 * rows + 0.9),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="compressed",
    )
    for axis in axes.flat[len(shares) :]:
        axis.set_visible(False)
    size = next(iter(shares.values())).shape[-1] * chunks_per_cell
    colors = plt.get_cmap(HEAT_MAP).with_extremes(bad="white")
    for axis, (layer, share) in zip(axes.flat, shares.items(), strict=False):
        image = axis.imshow(
            100 * share.mean(0),
            cmap=colors,
            vmin=0,
            vmax=100,
            extent=(0, size, size, 0),
            interpolation="nearest",
        )
        axis.set_title(f"layer {layer}, density {densities[layer]:.0%}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("key chunk")
    for axis in axes[:, 0]:
        axis.set_ylabel("query chunk")
    cells = f", cells of {chunks_per_cell} x {chunks_per_cell} chunks" if chunks_per_cell > 1 else ""
    figure.colorbar(
        image,
        ax=axes,
        shrink=0.9 if rows == 1 else 0.6,
        label=f"tokens that select the chunk (%)\nmean over kv heads{cells}",
    )
    return figure


def _threshold(report: dict[str, Any]) -> Any:
    records = _routed(report)
    colors, near = layer_colors(list(records)), report["near_threshold"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1.1, 1))
    middle = [
        10 ** ((a + b) / 2) for a, b in zip(report["weight_bins"], report["weight_bins"][1:], strict=False)
    ]
    for layer, record in records.items():
        left.plot(middle, 100 * np.mean(record["weights"], axis=0), color=colors[layer], lw=1.3)
    left.axvspan(middle[0], near, color="#D55E00", alpha=0.12, linewidth=0)
    left.axvline(near, color="#D55E00", lw=1, ls="--")
    left.annotate(
        "near the threshold",
        (near, 1),
        xycoords=left.get_xaxis_transform(),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#A04000",
        fontsize=9,
    )
    left.set_xscale("log")
    left.set_xlim(middle[0], middle[-1])
    left.set_ylim(bottom=0)
    left.set_xlabel("router's weight of a selected past chunk over the mean of its query's")
    left.set_ylabel("selected past chunks (%, bins of 0.1 decade)")
    left.grid(alpha=GRID)
    _near_bars(right, records)
    spread = [np.nanmean(np.array(r["heads"]["prior_spread"], dtype=float)) for r in records.values()]
    right.set_title(
        f"log prior spreads by {min(spread):.2g} to {max(spread):.2g} nats (standard deviation, by layer)",
        fontsize=9,
    )
    _layer_legend(figure, records)
    return figure


def _near_bars(axis: Any, records: dict[int, Any]) -> None:
    kinds = {
        "near_threshold_chunks": ("selected past chunks", "#0072B2"),
        "near_threshold_mass": ("router's probability", "#E69F00"),
        "near_threshold_attention": ("attention", "#009E73"),
    }
    places = np.arange(len(records))
    for index, (name, (label, color)) in enumerate(kinds.items()):
        values = [
            100 * np.nanmean(np.array(record["heads"][name], dtype=float)) for record in records.values()
        ]
        axis.bar(places + 0.27 * (index - 1), values, 0.27, color=color, label=label)
    step = math.ceil(len(records) / 16)
    axis.set_xticks(places[::step], [str(layer) for layer in list(records)[::step]])
    axis.set_xlabel("layer")
    axis.set_ylabel("near the threshold (%), mean of heads")
    axis.set_ylim(top=1.3 * max(axis.get_ylim()[1], 0.1))
    axis.grid(alpha=GRID, axis="y")
    axis.legend(title="share of", ncols=3, fontsize=8, columnspacing=1, loc="upper center")
