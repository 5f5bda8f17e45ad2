"""The whole weights of a run's checkpoint, saved by any layout, read on CPU without process groups."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dash_megatron.config import Config
from dash_megatron.config_loading import config_from_dict
from dash_megatron.training.checkpoint import checkpoint_folder, finished_steps, tag_of
from dash_megatron.training.checkpoint_files import CheckpointWeights, StoredState, damage
from dash_megatron.training.density import moved_factors


def open_weights(run_dir: str | Path, step: int | None = None) -> tuple[Config, int, CheckpointWeights]:
    """Read a run's config and step, and open its whole weights on CPU, without process groups.

    Args:
        run_dir: the run's folder.
        step: which checkpoint; None: the newest.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
        ValueError: it is damaged.
    """
    steps = finished_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        wanted = "any step" if step is None else f"step {step}"
        raise FileNotFoundError(f"{run_dir} has no checkpoint of {wanted}; it has {steps or 'none'}")
    step = steps[-1] if step is None else step
    folder = checkpoint_folder(run_dir) / tag_of(step)
    problem = damage(folder)
    if problem is not None:
        raise ValueError(f"{folder} is damaged: {problem}; name an earlier step")
    stored = StoredState(folder)
    config = config_from_dict({**stored.facts["config"], "run_dir": str(run_dir)})
    # what the weights were trained with last
    attention = moved_factors(
        config.attention, config.model.layers, stored.facts.get("trainer", {}).get("density", {})
    )
    return config.model_copy(update={"attention": attention}), step, CheckpointWeights(stored)


def load_weights(run_dir: str | Path, step: int | None = None) -> tuple[Config, int, dict[str, Tensor]]:
    """As `open_weights`, with all weights read."""
    config, step, weights = open_weights(run_dir, step)
    return config, step, dict(weights)
