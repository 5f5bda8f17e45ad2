"""Pictures of results: loss by position, the needle's heat map, scores by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dash_megatron.drawing import GRID, HEAT_MAP, line_widths, plt, save, tokens_axis
from dash_megatron.evaluation.settings import LOSS_TASKS


def draw(results: dict[str, Any], output: Path) -> list[Path]:
    """Draw what `evaluate` gave back, a picture for each kind of result that it has.

    Returns:
        The PNGs' paths, in folder `output`.
    """
    tasks = results["tasks"]
    drawn = []
    for name in LOSS_TASKS:
        if name in tasks:
            drawn.append(_save(_perplexity(tasks[name]), results, output / f"{name}.png"))
    if "needle" in tasks:
        drawn.append(_save(_needle(tasks["needle"]), results, output / "needle.png"))
    scored = {name: by_length for name, by_length in tasks.items() if name not in LOSS_TASKS}
    if scored:
        figure = _scores(scored, results["model"]["trained_length"])
        drawn.append(_save(figure, results, output / "tasks.png"))
    return drawn


def _save(figure: Any, results: dict[str, Any], path: Path) -> Path:
    figure.suptitle(results["model"]["name"])
    return save(figure, path, dpi=150)


def _perplexity(by_length: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    # documents have the same losses up to any length
    widths = line_widths(len(by_length))
    for (length, summary), width in zip(by_length.items(), widths, strict=True):
        ends = [bucket["to"] for bucket in summary["buckets"]]
        axis.plot(
            ends,
            [bucket["nll"] for bucket in summary["buckets"]],
            marker="o",
            ms=3 + width,
            lw=width,
            label=f"{length} tokens: {summary['nll']:.3f} (perplexity {summary['perplexity']:.4g})",
        )
    tokens_axis(axis, sorted({bucket["to"] for each in by_length.values() for bucket in each["buckets"]}))
    axis.set_xlabel("end of the bucket of positions (tokens)")
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=GRID)
    axis.legend()
    return figure


def _needle(by_length: dict[str, Any]) -> Any:
    depths = list(next(iter(by_length.values()))["depths"])
    grid = [[summary["depths"][depth]["score"] for summary in by_length.values()] for depth in depths]
    size = (2.5 + 0.9 * len(by_length), 2 + 0.45 * len(depths))
    figure, axis = plt.subplots(figsize=(max(5, size[0]), max(3.5, size[1])), layout="constrained")
    image = axis.imshow(grid, vmin=0, vmax=1, cmap=HEAT_MAP, aspect="auto")
    axis.set_xticks(range(len(by_length)), list(by_length))
    axis.set_yticks(range(len(depths)), [f"{100 * float(depth):.0f}" for depth in depths])
    axis.set_xlabel("length (tokens)")
    axis.set_ylabel("depth of the needle (%)")
    if len(by_length) * len(depths) <= 200:
        for y, row in enumerate(grid):
            for x, score in enumerate(row):
                color = "white" if score < 0.5 else "black"
                axis.text(x, y, f"{score:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label="score")
    return figure


def _scores(tasks: dict[str, Any], trained_length: int) -> Any:
    """Scores by length and, where answers were read in one pass, their loss: it moves while scores are still 0."""
    panels = {"score": "score, with its standard error"}
    if any(summary.get("nll") is not None for each in tasks.values() for summary in each.values()):
        panels["nll"] = "loss of the answer (nats per token)"
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3 + 6 * len(panels), 5), layout="constrained", squeeze=False
    )
    colors = plt.get_cmap("tab10")
    places = sorted({int(length) for each in tasks.values() for length in each})
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for number, ((name, by_length), width) in enumerate(
            zip(tasks.items(), line_widths(len(tasks)), strict=True)
        ):
            known = {int(length): each for length, each in by_length.items() if each.get(key) is not None}
            errors = [each.get("standard_error", 0.0) for each in known.values()]
            axis.errorbar(
                list(known),
                [each[key] for each in known.values()],
                yerr=errors if key == "score" else None,
                marker="osv^D<>ph*"[number % 10],
                ms=3 + 2 * width,
                lw=width,
                capsize=3,
                color=colors(number % 10),
                label=name,
            )
        axis.axvline(trained_length, color="gray", ls="--", lw=1, label="length of training")
        tokens_axis(axis, places)
        axis.set_xlabel("length (tokens)")
        axis.set_ylabel(label)
        axis.grid(alpha=GRID)
    axes[0][0].set_ylim(-0.05, 1.05)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    return figure
