"""Load a run's newest checkpoint into an engine, in whatever layout it was saved."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from dash_megatron.agreement import agreed
from dash_megatron.checkpoint.files import agreed_damage
from dash_megatron.checkpoint.folder import (
    agreed_steps,
    checkpoint_folder,
    damaged_checkpoints,
    set_aside,
    tag_of,
)
from dash_megatron.checkpoint.state import TrainingState, set_random_state
from dash_megatron.checkpoint.stored import StoredState
from dash_megatron.config import Config, Section, config_of_stored_run, differences
from dash_megatron.layers.sharding import shard, split_of, whole_shape
from dash_megatron.parallel import tensor_group

logger = logging.getLogger(__name__)


def load_newest(engine: TrainingState, config: Config) -> StoredState | None:
    """Load the newest checkpoint that is undamaged; collective.

    Args:
        engine: whose weights, moments and count of updates are set.
        config: the run.

    Returns:
        What was stored, of which weights, optimizer and random state are set already. None without checkpoints.

    Raises:
        ValueError: the checkpoint is of another model or has more steps than the run is to have, or there are only damaged
            ones.
        OSError: a damaged one could not be set aside, or files cannot be read.
    """
    step = _newest_undamaged(config)
    if step is None:
        return None
    stored = StoredState(checkpoint_folder(config.run_dir) / tag_of(step))
    _check_same_run(stored, config)
    _check_shapes(stored, engine, config)
    engine.load_state(_reader(stored, engine), stored.facts["adam_steps"])
    layout = config.layout(dist.get_world_size())
    if stored.facts["layout"] == layout:
        set_random_state(stored.random_state(dist.get_rank()))
    else:
        logger.info("%s was saved by %s and goes on as %s", stored.folder, stored.facts["layout"], layout)
    return stored


def _newest_undamaged(config: Config) -> int | None:
    """The newest step whose files are as they were written; damaged ones are set aside. Collective."""
    folder, steps = checkpoint_folder(config.run_dir), agreed_steps(config.run_dir)
    for step in reversed(steps):
        place = folder / tag_of(step)
        problem = agreed_damage(place, config.checkpoint.retry_seconds)
        if problem is None:
            return step
        agreed(functools.partial(set_aside, place, problem))
    if damaged := damaged_checkpoints(config.run_dir):
        raise ValueError(
            f"{folder} has no undamaged checkpoint, but {', '.join(damaged)}, set aside; restore one from a copy, or remove "
            "them all to begin from scratch"
        )
    return None


def _reader(stored: StoredState, engine: TrainingState) -> Callable[[str, str, int, int], Tensor]:
    """Reads this tensor-parallel rank's elements, from whatever tensor-parallel size."""
    group = tensor_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = {name: split_of(parameter) for name, parameter in engine.model.named_parameters()}

    def read(kind: str, name: str, start: int, numel: int) -> Tensor:
        if stored.tensor_size == size or own[name] is None:
            source = rank if stored.tensor_size == size else 0
            return stored.read(kind, name, source, start, numel)
        part = shard(stored.whole(kind, name), own[name], rank, size)
        return part.flatten()[start : start + numel]

    return read


def _check_shapes(stored: StoredState, engine: TrainingState, config: Config) -> None:
    size = dist.get_world_size(tensor_group())
    shapes = {
        name: whole_shape(shape, split_of(engine.model.get_parameter(name)), size)
        for name, shape in engine.local_shapes().items()
    }
    for name in sorted(shapes.keys() | stored.shapes.keys()):
        before = stored.whole_shape(name) if name in stored.shapes else None
        if shapes.get(name) == before:
            continue
        here, there = (
            f"has shape {shape}" if shape else "is missing" for shape in (shapes.get(name), before)
        )
        told = f"{name} {here} in this run and {there} in {stored.folder}"
        attention = config_of_stored_run(stored.facts["config"]).attention
        changed = _differences("attention", attention, config.attention)
        if changed:
            raise ValueError(
                f"{'; '.join(changed)}, whose weights it cannot use: {told}; restore it, or choose a new run_dir"
            )
        raise ValueError(
            f"{told}; restore the config (model, attention, parallel.tensor pads the vocabulary), or choose a new run_dir"
        )


def _check_same_run(stored: StoredState, config: Config) -> None:
    step, steps = stored.facts["step"], config.training.steps
    if steps < step:
        raise ValueError(
            f"training.steps={steps} is below {step}, the steps that {stored.folder} has finished; set training.steps={step} "
            "or more, or choose a new run_dir"
        )
    saved = config_of_stored_run(stored.facts["config"])
    changed = _differences(
        "model", saved.model, config.model.model_copy(update={"init_std": saved.model.init_std})
    )
    if changed:
        raise ValueError(f"{'; '.join(changed)} in {stored.folder}; restore it, or choose a new run_dir")


def _differences(section: str, saved: Section, now: Section) -> list[str]:
    """What differs, as "model.layers=3 differs from 2"."""
    return [
        f"{key}={new} differs from {old}"
        for key, old, new in differences(saved, now, section)
        if key != "attention.backend"
    ]
