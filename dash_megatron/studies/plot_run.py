"""One picture of one run: losses and per-layer density over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dash_megatron.config import Config, load_config
from dash_megatron.data.blend import unigram_entropy
from dash_megatron.drawing import GRID, layer_colors, line_widths, plt, save
from dash_megatron.training.metrics import StepMetrics, read_metrics


def plot_run(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Draw `metrics.jsonl` of a run; lines mark the target density, and the unigram entropy of its corpus where that is still there.

    Args:
        run_dir: the run's folder.
        output: PNG to write; None: `<run_dir>/training.png`.

    Returns:
        The PNG's path.

    Raises:
        FileNotFoundError: the run has no metrics.
        ValueError: it has logged no step yet.
    """
    metrics = read_metrics(run_dir)
    if not metrics:
        raise ValueError(f"{run_dir}/metrics.jsonl has no steps; wait for the run's first logged step")
    routed = any(line["density"] is not None for line in metrics)
    figure, axes = plt.subplots(
        2 if routed else 1, 1, figsize=(8, 8 if routed else 4.5), sharex=True, squeeze=False
    )
    config = _config_of(run_dir)
    _plot_losses(axes[0][0], metrics, None if config is None else _corpus_entropy(config))
    if routed:
        draw_densities(axes[1][0], metrics, all_labels=len(metrics[0]["density_per_layer"]) <= 16)
        if config is not None:
            _draw_target(axes[1][0], metrics, config)
        axes[1][0].set_ylabel("density (% of available chunks selected)")
        axes[1][0].legend(ncols=2)
    axes[-1][0].set_xlabel("optimizer step")
    figure.suptitle(Path(run_dir).name)
    figure.tight_layout()
    path = Path(output) if output else Path(run_dir) / "training.png"
    return save(figure, path, dpi=150)


def _config_of(run_dir: str | Path) -> Config | None:
    try:
        # the data matters, not the layout, which may be one that is refused today
        return load_config(Path(run_dir) / "config.yaml", ["parallel={}"])
    except (ValueError, FileNotFoundError):
        return None


def _corpus_entropy(config: Config) -> float | None:
    try:
        return unigram_entropy(config.data.train)
    except (ValueError, FileNotFoundError):
        return None  # metrics can be drawn far from the data


def _plot_losses(axis: Any, metrics: Sequence[StepMetrics], entropy: float | None) -> None:
    axis.plot(
        [m["step"] for m in metrics],
        [m["loss"] for m in metrics],
        color="tab:blue",
        lw=1,
        label="training loss",
    )
    validated = [(m["step"], m["valid_loss"]) for m in metrics if m["valid_loss"] is not None]
    if validated:
        steps, losses = zip(*validated, strict=True)
        axis.plot(steps, losses, color="tab:orange", marker="o", ms=4, label="validation loss")
        # behind the line's end, which is at the right edge: it covers nothing there
        axis.set_xlim(right=max(m["step"] for m in metrics))
        axis.annotate(
            f"{losses[-1]:.2f}",
            (1, losses[-1]),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(5, 0),
            va="center",
            annotation_clip=False,
        )
    if entropy is not None:
        axis.axhline(
            entropy, color="gray", ls="--", lw=1, label=f"unigram entropy of the corpus, {entropy:.2f}"
        )
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=GRID)
    axis.legend()


def _draw_target(axis: Any, metrics: Sequence[StepMetrics], config: Config) -> None:
    """Draw the density asked for, where there is one: the mean over layers that route."""
    points = []
    for step in (m["step"] for m in metrics):
        target = config.attention.mean_target_density(step, config.model.layers)
        if target is not None:
            points.append((step, 100 * target))
    if points:
        axis.plot(
            *zip(*points, strict=True), color="gray", ls="--", lw=1, label=f"target, {points[-1][1]:.3g}%"
        )


def draw_densities(axis: Any, metrics: Sequence[StepMetrics], all_labels: bool) -> None:
    """Draw the density of every layer over steps, in percent; the first and the last layer are labelled, or all are."""
    num_layers = len(metrics[0]["density_per_layer"])
    widths = line_widths(num_layers)
    for layer, color in layer_colors(range(num_layers)).items():
        points = [(m["step"], m["density_per_layer"][layer]) for m in metrics]
        points = [(step, density) for step, density in points if density is not None]
        if points:
            steps, density = zip(*points, strict=True)
            label = f"layer {layer}" if all_labels or layer in (0, num_layers - 1) else None
            axis.plot(steps, [100 * value for value in density], color=color, lw=widths[layer], label=label)
    axis.set_ylim(0, 105)
    axis.grid(alpha=GRID)
