"""Draw attention's time against density, whatever queries select alike:

    python -m docs.tools.kernel_picture --output docs/results/

From the rows of `docs/results/kernel_stages.csv` that have times of whole passes.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np

from dash_megatron.command_line import ending_with_reader
from dash_megatron.drawing import GRID, line_style, plt, save

TABLE = Path(__file__).resolve().parents[1] / "results" / "kernel_stages.csv"
PICTURE = "kernel_routings.png"
PASSES = {
    "forward": ("forward", "dense_forward", ("route",)),
    "forward and backward": ("total", "dense_total", ("route", "router_backward")),
}
"""By title: columns of our time and of dense attention's, and the router's stages."""


def density(row: dict[str, str]) -> float:
    """Pairs of a token and a chunk selected over those available, own chunks included."""
    tokens, size = int(row["tokens"]), int(row["chunk_size"])
    available = int(row["batch"]) * int(row["kv_heads"]) * tokens * (tokens / size + 1) / 2
    return 1e6 * float(row["selected"]) / available


def label(row: dict[str, str]) -> str:
    """Routing and shape: what a line of the picture has in common."""
    routing = {"independent": "each query for itself", "runs of 32": "runs of 32 queries"}.get(row["routing"])
    if routing is None:
        routing = "like a trained router" if row["routing"].startswith("like") else "trained routers"
    shape = f"{row['heads']}/{row['kv_heads']}, D = {row['head_dim']}, C = {row['chunk_size']}"
    rows = "" if row["batch"] == "1" else f"{row['batch']} x "
    return f"{routing}, {rows}{int(row['tokens']) // 1024}K, {shape}"


@ending_with_reader()
def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the picture")
    options = parser.parse_args(arguments)
    with TABLE.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["forward"]]
    labels = list(dict.fromkeys(label(row) for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.6))
    for axis, (title, columns) in zip(axes, PASSES.items(), strict=True):
        for index, name in enumerate(labels):
            _draw(axis, [row for row in rows if label(row) == name], columns, name, index)
        axis.plot([0, 60], [0, 0.6], ":", color="gray", label="density x cuDNN's time")
        axis.plot([], [], "o", color="gray", mfc="none", label="the router alone")
        axis.axhline(1, ls="--", lw=1, color="gray")
        axis.set_title(title)
        axis.set_xlabel("density (% of causal chunks)")
        axis.set_ylabel("time over that of cuDNN's dense attention")
        axis.set_xlim(0, 60)
        axis.set_ylim(0, 1.25)
        axis.grid(alpha=GRID)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    save(figure, options.output / PICTURE, dpi=130)


def _draw(
    axis: Any, rows: list[dict[str, str]], columns: tuple[str, str, tuple[str, ...]], name: str, index: int
) -> None:
    """Points of one routing and shape, the line through them, and what the router alone takes."""
    whole, dense, router = columns
    color, marker = line_style(index)
    axis.plot([], [], marker, color=color, label=name)
    # some have the forward alone
    rows = sorted((row for row in rows if row[whole]), key=density)
    if not rows:
        return
    x = np.array([100 * density(row) for row in rows])
    y = np.array([float(row[whole]) / float(row[dense]) for row in rows])
    axis.plot(x, y, marker, color=color)
    # not everywhere were the router's stages timed alone
    alone = [row for row in rows if all(row[stage] for stage in router)]
    routed = [sum(float(row[stage]) for stage in router) / float(row[dense]) for row in alone]
    if routed:
        axis.plot(0, np.mean(routed), marker, color=color, mfc="none", clip_on=False)
    if len(rows) > 1:
        slope, offset = np.polyfit(x, y, 1)
        axis.plot([0, x.max()], [offset, offset + slope * x.max()], "-", lw=1, color=color)


if __name__ == "__main__":
    main()
