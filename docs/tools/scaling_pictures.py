"""The pictures of `docs/scaling.md`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dash_megatron.drawing import GRID, plt, save
from dash_megatron.planning.routing import coverage_of_topics
from dash_megatron.planning.step_time import StepEstimate

RANKS = (2, 4, 8, 16, 32, 64)
LOCALITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
PARTS = {
    "matmul": "matrix products",
    "elementwise": "norms, activations and loss",
    "attention": "attention",
    "tensor": "waiting for tensor links",
    "context": "waiting for context links",
    "zero": "waiting for ZeRO",
}

Curves = dict[str, dict[float, list[tuple[int, StepEstimate]]]]


def _save(figure: plt.Figure, path: Path, legend_of: Any = None, title: str | None = None) -> None:
    """Write the picture; panels that share their curves share the legend below them."""
    bottom = 0.0
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        bottom = 0.13 if title else 0.08
        figure.legend(handles, labels, title=title, loc="lower center", ncols=len(labels))
    figure.tight_layout(rect=(0, bottom, 1, 1))
    save(figure, path, dpi=130)


def draw_throughput(curves: Curves, path: Path) -> None:
    """Tokens/s/GPU against GPUs: one panel a length, one line a density."""
    figure, axes = plt.subplots(1, len(curves), figsize=(13, 4.5), squeeze=False)
    colors = plt.get_cmap("viridis")
    for axis, (length, lines) in zip(axes[0], curves.items(), strict=True):
        for index, (density, points) in enumerate(lines.items()):
            gpus = [count for count, _ in points]
            speed = [estimate.tokens_per_second_per_gpu for _, estimate in points]
            color = colors(index / max(1, len(lines) - 1) * 0.9)
            axis.plot(gpus, speed, marker="o", ms=4, color=color, label=f"{density:.0%}")
        axis.set_xscale("log", base=2)
        axis.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
        axis.set_xlim(7, 1200)
        axis.set_ylim(bottom=0)
        axis.set_title(f"8B, {length} tokens")
        axis.set_xlabel("GPUs")
        axis.grid(alpha=GRID)
    axes[0][0].set_ylabel("tokens per second and GPU (model)")
    _save(figure, path, legend_of=axes[0][0], title="density")


def draw_composition(bars: dict[str, list[tuple[float, StepEstimate]]], path: Path) -> None:
    """What a step's time is made of, one panel a length, one bar a density."""
    figure, axes = plt.subplots(1, len(bars), figsize=(13, 4.5), sharey=True, squeeze=False)
    for axis, (length, estimates) in zip(axes[0], bars.items(), strict=True):
        bottom = np.zeros(len(estimates))
        for name, label in PARTS.items():
            share = np.array([getattr(estimate, name) / estimate.seconds for _, estimate in estimates])
            axis.bar([f"{density:.0%}" for density, _ in estimates], share, bottom=bottom, label=label)
            bottom += share
        for place, (_, estimate) in enumerate(estimates):
            axis.text(place, 1.02, f"{estimate.seconds:.0f} s", ha="center", fontsize=9)
        axis.set_ylim(0, 1.1)
        axis.set_title(f"8B, {length} tokens, 64 GPUs")
        axis.set_xlabel("density")
    axes[0][0].set_ylabel("share of a step (model)")
    _save(figure, path, legend_of=axes[0][0])


def draw_sparse(
    points: dict[int, list[tuple[float, float]]],
    runs: float,
    ratio: Callable[[float, float], float],
    path: Path,
) -> None:
    """Coverage against locality, simulated and by formula; and bytes of sparse over all_gather against density."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    fine = 1 - np.logspace(0, -3, 80)
    for index, (topics, simulated) in enumerate(points.items()):
        color = f"C{index}"
        left.plot(
            [1 - x for x, _ in simulated],
            [y for _, y in simulated],
            "o",
            color=color,
            label=f"{topics} topics",
        )
        left.plot(1 - fine, [coverage_of_topics(1 / topics, x, runs) for x in fine], "-", color=color, lw=1)
    left.set_xscale("log")
    left.invert_xaxis()
    left.set_xlabel("1 - locality: probability that a run of 32 queries wants a new topic")
    left.set_ylabel("past remote chunks that some query of a rank selects")
    left.set_title("32K tokens over 8 ranks: simulated (dots), formula (lines)")
    left.set_ylim(0, 1.05)
    density = np.logspace(-2, 0, 60)
    for index, locality in enumerate((0.0, 0.9, 0.98, 0.99, 0.999)):
        values = [ratio(float(x), locality) for x in density]
        right.plot(100 * density, values, color=f"C{index}", label=f"locality {locality:.1%}")
    right.set_xscale("log")
    right.set_xticks([1, 2, 5, 10, 25, 50, 100], ["1", "2", "5", "10", "25", "50", "100"])
    right.set_xlabel("density (%)")
    right.set_ylabel("bytes of sparse / bytes of all_gather (busiest rank)")
    right.set_title("128K tokens over 8 ranks, by formula")
    right.set_ylim(0, 1.05)
    for axis in (left, right):
        axis.grid(alpha=GRID)
        axis.legend()
    _save(figure, path)


def draw_balance(cases: dict[str, list[float]], path: Path) -> None:
    """The busiest rank's attention over the mean, against ranks."""
    figure, axis = plt.subplots(figsize=(11, 5))
    for index, (name, values) in enumerate(cases.items()):
        style = "--" if name.startswith("packed") else "-"
        label = textwrap.fill(name, 40)
        # the first two lie on top of each other
        width = 4.0 if index == 0 else 1.5
        axis.plot(RANKS, values, style, marker="o", ms=4, lw=width, color=f"C{index}", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
    axis.set_xlabel("context ranks (zigzag)")
    axis.set_ylabel("attention of the busiest rank / mean")
    axis.grid(alpha=GRID)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
