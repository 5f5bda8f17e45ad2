"""Checkpoints of a run: `<run>/checkpoints/step_00000100/`, published by a rename, so that none is ever half there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from dash_megatron.config import Config
from dash_megatron.config_loading import config_from_dict
from dash_megatron.layers.sharding import Split, splits
from dash_megatron.training.engine import CheckpointWeights, Engine

logger = logging.getLogger(__name__)

_TAG = re.compile(r"step_(\d{8,})")


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def finished_steps(run_dir: str | Path) -> list[int]:
    """Steps of which a whole checkpoint exists, oldest first."""
    folder = checkpoint_folder(run_dir)
    names = [_TAG.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match.group(1)) for match in names if match)


def tag_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def save_checkpoint(engine: Engine, config: Config, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint beside its place and publish it by a rename; collective.

    Args:
        engine: weights and optimizer.
        config: the run; its `checkpoint.keep` newest checkpoints stay.
        step: finished optimizer steps.
        state: what the trainer needs to go on, the same on every process.

    Returns:
        The published folder.
    """
    folder, tag = checkpoint_folder(config.run_dir), tag_of(step)
    partial = f"{tag}.partial"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(folder / partial, ignore_errors=True)  # of a run that was killed while it saved
    dist.barrier()
    engine.save(folder, partial, {"trainer": state})
    torch.save(_random_state(), folder / partial / f"random_state_{rank:05d}.pt")
    dist.barrier()
    if rank == 0:
        facts = {
            "step": step,
            "zero_stage": config.zero.stage,
            "data_parallel_size": config.data_parallel_size(dist.get_world_size()),
            # weights split over tensor-parallel ranks: [dimension, number of blocks] of each
            "splits": splits(engine.module),
            "config": config.model_dump(mode="json"),
        }
        (folder / partial / "checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(folder / tag, ignore_errors=True)
        os.rename(folder / partial, folder / tag)
        for old in (
            finished_steps(config.run_dir)[: -config.checkpoint.keep] if config.checkpoint.keep else []
        ):
            shutil.rmtree(folder / tag_of(old))
    dist.barrier()
    return folder / tag


def load_checkpoint(engine: Engine, config: Config) -> dict[str, Any] | None:
    """Load the run's newest checkpoint, all of it, and give back the trainer's state; None without one; collective.

    Raises:
        ValueError: the checkpoint is of another model or layout than this run's.
    """
    # the launch may read the folder while rank 0 of another start changes it: let one process decide
    newest: list[Any] = [finished_steps(config.run_dir)[-1:]]
    dist.broadcast_object_list(newest)
    if not newest[0]:
        return None
    folder, tag = checkpoint_folder(config.run_dir), tag_of(newest[0][0])
    _check_same_run(folder / tag, config)
    state = engine.load(folder, tag)
    _set_random_state(torch.load(folder / tag / f"random_state_{dist.get_rank():05d}.pt", weights_only=False))
    return state["trainer"]


def open_weights(run_dir: str | Path, step: int | None = None) -> tuple[Config, int, CheckpointWeights]:
    """Read a run's config and step, and open its whole weights on CPU, without process groups.

    Args:
        run_dir: the run's folder.
        step: which checkpoint; None: the newest.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
    """
    steps = finished_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        wanted = "any step" if step is None else f"step {step}"
        raise FileNotFoundError(f"{run_dir} has no checkpoint of {wanted}; it has {steps or 'none'}")
    step = steps[-1] if step is None else step
    folder, tag = checkpoint_folder(run_dir), tag_of(step)
    facts = json.loads((folder / tag / "checkpoint.json").read_text())
    config = config_from_dict({**facts["config"], "run_dir": str(run_dir)})
    # a checkpoint written before there was tensor parallelism names no splits
    layout = {name: Split(*values) for name, values in facts.get("splits", {}).items()}
    weights = CheckpointWeights(folder, tag, facts["zero_stage"], layout, config.parallel.tensor)
    return config, step, weights


def load_weights(run_dir: str | Path, step: int | None = None) -> tuple[Config, int, dict[str, torch.Tensor]]:
    """As `open_weights`, with all weights read."""
    config, step, weights = open_weights(run_dir, step)
    return config, step, dict(weights)


def write_config(config: Config, commit: str) -> None:
    """Write `<run>/config.yaml`: the resolved config, with the code's commit in its first line."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path = Path(config.run_dir) / "config.yaml"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"# commit: {commit}\n{text}")
    os.replace(temporary, path)


def _check_same_run(path: Path, config: Config) -> None:
    facts = json.loads((path / "checkpoint.json").read_text())
    saved = config_from_dict(facts["config"])
    for name, old in saved.model:
        new = getattr(config.model, name)
        if old != new:
            raise ValueError(
                f"model.{name}={new} differs from {old} in {path}; restore it, or choose a new run_dir"
            )
    order = {
        "data.train": (saved.data.train, config.data.train),
        "data.seq_length": (saved.data.seq_length, config.data.seq_length),
        "training.seed": (saved.training.seed, config.training.seed),
    }
    for name, (before, now) in order.items():
        if before != now:
            logger.warning(
                "%s was %s and is now %s: the run goes on at its sample number, yet in another order of samples, "
                "so that some are read twice and others never",
                name,
                before,
                now,
            )
    layout = {
        "zero.stage": (facts["zero_stage"], config.zero.stage),
        "parallel.tensor": (saved.parallel.tensor, config.parallel.tensor),
        "parallel.context": (saved.parallel.context, config.parallel.context),
        "data_parallel_size": (
            facts["data_parallel_size"],
            config.data_parallel_size(dist.get_world_size()),
        ),
    }
    for name, (before, now) in layout.items():
        if before != now:
            raise ValueError(
                f"{name}={now} differs from {before} in {path}: optimizer shards belong to the layout that wrote "
                "them; start with that layout, or choose a new run_dir"
            )


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
