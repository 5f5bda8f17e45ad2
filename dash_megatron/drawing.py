"""Matplotlib, set up once for all pictures: they are files, never windows, and share colours, markers and token axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = [
    "COLORS",
    "GRID",
    "HEAT_MAP",
    "layer_colors",
    "line_style",
    "line_widths",
    "plt",
    "save",
    "save_with_legend",
    "tokens_axis",
]

# values that differ little are written out on an axis, not as differences from a number in its corner
matplotlib.rcParams["axes.formatter.useoffset"] = False

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind people tell apart."""
MARKERS = "osD^vPX"
HEAT_MAP = "cividis"
"""From dark to light for all eyes, and on paper."""
GRID = 0.3
"""Opacity of grid lines."""


def line_style(index: int) -> tuple[str, str]:
    """Colour and marker of a line; the second time round, a colour comes with the next marker."""
    return COLORS[index % len(COLORS)], MARKERS[(index + index // len(COLORS)) % len(MARKERS)]


def layer_colors(layers: Sequence[int]) -> dict[int, Any]:
    """A colour for each layer, from dark to light; the brightest end is too pale for lines."""
    colors = plt.get_cmap("viridis")
    return {layer: colors(0.9 * index / max(1, len(layers) - 1)) for index, layer in enumerate(layers)}


def line_widths(count: int) -> list[float]:
    """A width for each of some lines, in the order in which they are drawn, from wide to thin.

    Lines at the same values then show beside each other, not only the last one.
    """
    return [1.0 + 1.5 * (count - 1 - index) / max(1, count - 1) for index in range(count)]


def tokens_axis(axis: Any, places: Sequence[int]) -> None:
    """Make the horizontal axis logarithmic, with a number of tokens at each place instead of powers of 2."""
    axis.set_xscale("log", base=2)
    crowded = len(places) > 6
    axis.set_xticks(places, [f"{place:,}" for place in places], rotation=45 if crowded else 0)
    axis.minorticks_off()


def save_with_legend(figure: Any, path: Path, title: str) -> None:
    """Write a figure of several panels, of constrained layout, with one legend below them, where it covers no line."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def save(figure: Any, path: Path, dpi: int = 110) -> Path:
    """Write a figure as PNG and forget it; gives the path."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path
