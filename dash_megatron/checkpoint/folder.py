"""A run's folder of checkpoints, `<run>/checkpoints/`: which steps it has, and how a checkpoint comes and goes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path

import yaml

from dash_megatron.agreement import agreed
from dash_megatron.config import Config, ModelConfig
from dash_megatron.files import no_folder, path_for_message
from dash_megatron.retry import retry

logger = logging.getLogger(__name__)

_TAG = re.compile(r"step_(\d{8,})")
_DAMAGED = ".damaged"
DESCRIPTION = "checkpoint.json"
"""Of a checkpoint: the file that describes the others."""
MODEL_SECTIONS = "model.yaml"
"""File of a folder that `convert from-hf` made, with the sections of a config that its weights belong to."""


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def tag_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def finished_steps(run_dir: str | Path) -> list[int]:
    """Steps of which a published checkpoint exists, oldest first.

    Raises:
        FileNotFoundError: the folder is a file, or a link to something that is not there, such as a disk that is not mounted.
    """
    matches = [_TAG.fullmatch(path.name) for path in _entries(checkpoint_folder(run_dir))]
    return sorted(int(match.group(1)) for match in matches if match)


def check_own_folder(run_dir: str | Path) -> None:
    """Refuse to train in a folder of `convert from-hf`, whose weights the run's checkpoints would hide.

    Raises:
        ValueError: it is one.
    """
    if (Path(run_dir) / MODEL_SECTIONS).is_file():
        raise ValueError(
            f"run_dir={run_dir} is a folder of `convert from-hf`, from whose weights runs start; choose another run_dir"
        )


def run_and_step(folder: str | Path) -> tuple[Path, int | None]:
    """Of a checkpoint, `<run>/checkpoints/step_00001000`, the run's folder and the step; of another folder itself and None."""
    folder = Path(folder)
    run, match = folder.parent.parent, _TAG.fullmatch(folder.name)
    return (run, int(match[1])) if match and folder.parent == checkpoint_folder(run) else (folder, None)


def check_initial_folder(folder: str | Path) -> None:
    """Check that a folder is one that weights can come from.

    Raises:
        FileNotFoundError: it is not there, or has neither checkpoints nor an imported model.
    """
    folder = Path(folder)
    run, step = run_and_step(folder)
    steps = finished_steps(run)
    if step in (None, *steps) if steps else (folder / MODEL_SECTIONS).is_file():
        return
    lacks = f"{path_for_message(folder)} has neither checkpoints nor {MODEL_SECTIONS}"
    problem = lacks if folder.is_dir() else no_folder(folder)
    if steps:
        problem += f", but steps {', '.join(map(str, steps))} do"
    raise FileNotFoundError(
        f"training.init_from={problem}; name a run that has saved, a checkpoint of one, or a folder "
        "made with `python -m dash_megatron convert from-hf`"
    )


def check_start_of(config: Config) -> None:
    """Check the initial weights of a run as far as can be told without reading them; one that resumes reads none.

    Raises:
        FileNotFoundError: as `check_initial_folder`.
        ValueError: they are of another model.
    """
    if not config.training.init_from or finished_steps(config.run_dir):
        return
    check_initial_folder(config.training.init_from)
    folder, step = run_and_step(config.training.init_from)
    steps = finished_steps(folder)
    path = folder / MODEL_SECTIONS
    if steps:
        path = checkpoint_folder(folder) / tag_of(step or steps[-1]) / DESCRIPTION
    text = path.read_text(encoding="utf-8")
    try:
        sections = json.loads(text)["config"] if steps else yaml.safe_load(text)
        model = ModelConfig.model_validate(sections["model"])
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"training.init_from={folder}: {path} is damaged ({error}); restore it from a copy"
        ) from error
    check_same_model(config.model, model, folder)


def check_same_model(config: ModelConfig, other: ModelConfig, folder: Path) -> None:
    """Check that constants which no shape shows, such as `rope_theta`, are those of the folder.

    Only `rope_scaling` may be set to another value, to go on with a longer context; left out, it must be left out there too.

    Raises:
        ValueError: they are others.
    """
    differing: list[str] = []
    for name in ModelConfig.model_fields:
        new, old = getattr(config, name), getattr(other, name)
        if name == "head_dim":
            new, old = config.channels_per_head, other.channels_per_head
        # `init_std` only drew weights; a vocabulary size that is null is the tokenizer's, and shapes show whether it fits
        if name == "init_std" or (name == "vocab_size" and None in (new, old)) or new == old:
            continue
        if name == "rope_scaling" and new is not None:
            logger.info("positions are rescaled: model.rope_scaling=%s, not %s as in %s", new, old, folder)
            continue
        differing.append(f"model.{name}={new} differs from {old}")
    if differing:
        remedy = "set it to that" if len(differing) == 1 else "set them to those"
        if config.rope_theta != other.rope_theta:
            remedy += "; for longer contexts set model.rope_scaling, as docs/recipe.md does"
        raise ValueError(f"{', '.join(differing)} in training.init_from={folder}; {remedy}")


def damaged_checkpoints(run_dir: str | Path) -> list[str]:
    """Names of the checkpoints that `set_aside` kept, as rank 0 sees them; collective."""
    return agreed(lambda: sorted(p.name for p in _entries(checkpoint_folder(run_dir)) if _DAMAGED in p.name))


def _entries(folder: Path) -> list[Path]:
    if folder.is_dir():
        return list(folder.iterdir())
    if folder.is_symlink():
        raise FileNotFoundError(
            f"{folder} is a link to {os.readlink(folder)}, which does not exist; mount that, or remove the link to begin from "
            "scratch"
        )
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file, where a run keeps its checkpoints; move it away")
    return []


def agreed_steps(run_dir: str | Path) -> list[int]:
    """As `finished_steps`, on all processes as rank 0 sees the folder, which others may be saving to; collective."""
    return agreed(lambda: finished_steps(run_dir))


def make_empty(folder: Path, seconds: float) -> None:
    """Make a folder, after removing what earlier processes left unfinished beside it.

    Args:
        folder: in a run's folder of checkpoints, which is made too.
        seconds: how long to try again where the file system is full or unavailable.
    """

    def make() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for remains in (*folder.parent.glob("*.partial"), *folder.parent.glob("*.removed")):
            shutil.rmtree(remains, ignore_errors=True)
        folder.mkdir()

    retry(make, f"make {folder}", seconds, folder.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that one removed in part is not taken for a checkpoint."""
    if folder.exists():
        away = folder.with_suffix(".removed")
        shutil.rmtree(away, ignore_errors=True)
        os.rename(folder, away)
        # large folders take a file system seconds, for which nobody should wait
        threading.Thread(
            target=shutil.rmtree, args=(away,), kwargs={"ignore_errors": True}, daemon=True
        ).start()


def set_aside(folder: Path, problem: str) -> None:
    """Rename a damaged checkpoint to `*.damaged`, so that it is kept and no longer found.

    Args:
        folder: the checkpoint.
        problem: what is wrong with it, for the log.

    Raises:
        OSError: it cannot be renamed.
    """
    place = folder.with_name(folder.name + _DAMAGED)
    number = 1
    while place.exists():
        number += 1
        place = place.with_suffix(f"{_DAMAGED}{number}")
    retry(lambda: os.rename(folder, place), f"set {folder.name} aside, which is damaged", 0.0, folder)
    logger.warning("%s is damaged (%s): kept as %s and skipped", folder.name, problem, place.name)
