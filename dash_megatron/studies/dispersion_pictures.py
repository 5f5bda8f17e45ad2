"""The picture of `study dispersion`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dash_megatron.drawing import COLORS, GRID, plt, save

_COLORS = {"softmax": COLORS[6], "1.5-entmax": COLORS[0], "2-entmax": COLORS[1]}
# lines and marks tell groups apart
_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_LABELS = {
    "effective_chunks": "effective chunks, exp(entropy)",
    "largest": "largest probability",
    "density": "chunks with any probability (%)",
}
_TITLES = {
    "random": "random: no chunk matters",
    "needle": "needle: one chunk matters",
    "topics": "topics: a tenth of the chunks matters",
    "run": "a run's own queries",
}


def draw_dispersion(report: dict[str, Any], path: Path) -> Path:
    """Draw what `study_dispersion` measured: a row for each input, a column for each measure."""
    inputs = report["inputs"]
    groups = sorted({int(group) for found in inputs.values() for group in found["curves"]["softmax"]})
    styles = {group: _LINES[index % len(_LINES)] for index, group in enumerate(groups)}
    figure, axes = plt.subplots(
        len(inputs), 3, figsize=(11, 2.7 * len(inputs) + 0.8), squeeze=False, layout="constrained"
    )
    for row, (name, found) in zip(axes, inputs.items(), strict=True):
        for axis, (measure, label) in zip(row, _LABELS.items(), strict=True):
            _draw(axis, found, measure, styles)
            axis.set_ylabel(label, fontsize=9)
        row[1].set_title(_TITLES[name], fontsize=11)
        effective = row[0]
        effective.plot(found["chunks"], found["chunks"], color="gray", lw=0.8, zorder=0)
        effective.set_yscale("log", base=2)
        middle = found["chunks"][len(found["chunks"]) // 2]
        effective.annotate(
            "all alike",
            (middle, middle),
            xytext=(-8, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="gray",
        )
        row[1].set_ylim(-0.03, 1.03)
        row[2].set_ylim(-3, 103)
    for axis in axes[-1]:
        axis.set_xlabel("past chunks")
    _legend(figure, styles)
    return save(figure, path, dpi=80)


def _draw(axis: Any, found: dict[str, Any], measure: str, styles: dict[int, tuple[str, str]]) -> None:
    factor = 100 if measure == "density" else 1
    for mapping, by_group in found["curves"].items():
        for group, values in by_group.items():
            line, mark = styles[int(group)]
            points = [factor * value for value in values[measure]]
            axis.plot(found["chunks"], points, line, marker=mark, ms=3.5, lw=1.2, color=_COLORS[mapping])
    axis.set_xscale("log", base=2)
    axis.set_xticks(found["chunks"][::2], [str(count) for count in found["chunks"][::2]])
    axis.minorticks_off()
    axis.grid(alpha=GRID)


def _legend(figure: Any, styles: dict[int, tuple[str, str]]) -> None:
    lines = [plt.Line2D([], [], color=color, lw=2) for color in _COLORS.values()]
    lines += [plt.Line2D([], [], color="gray", ls=line, marker=mark, ms=4) for line, mark in styles.values()]
    labels = [*_COLORS, *(f"mean over {group} head{'s' * (group > 1)}" for group in styles)]
    figure.legend(
        lines, labels, loc="outside lower center", ncols=len(labels) if len(labels) < 7 else 4, frameon=False
    )
