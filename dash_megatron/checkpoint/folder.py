"""A run's folder of checkpoints, `<run>/checkpoints/`: which steps it has, and how a checkpoint comes and goes."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dash_megatron.config import Config
from dash_megatron.files import path_for_message
from dash_megatron.retry import retry

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TAG = re.compile(r"step_(\d{8,})")
_DAMAGED = ".damaged"
MODEL_SECTIONS = "model.yaml"
"""File of a folder that `convert from-hf` made, with the sections of a config that its weights belong to."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or moved; those published before are whole."""


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


def check_initial_folder(folder: str | Path) -> None:
    """Check that a folder is one that weights can come from.

    Raises:
        FileNotFoundError: it is not there, or has neither checkpoints nor an imported model.
    """
    folder = Path(folder)
    if finished_steps(folder) or (folder / MODEL_SECTIONS).is_file():
        return
    problem = f"has neither checkpoints nor {MODEL_SECTIONS}" if folder.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"training.init_from={path_for_message(folder)} {problem}; name a run that has saved, or a folder made with "
        "`python -m dash_megatron convert from-hf`"
    )


def check_start_of(config: Config) -> None:
    """Check the initial weights of a run as far as their folder goes; one that resumes reads none.

    Raises:
        FileNotFoundError: as `check_initial_folder`.
    """
    if config.training.init_from and not finished_steps(config.run_dir):
        check_initial_folder(config.training.init_from)


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


def agreed(function: Callable[[], T]) -> T:
    """Call a function on rank 0; return its result, or raise its OSError, on all processes. Collective."""
    # imported late, as a machine that only submits runs may lack it
    import torch.distributed as dist

    if not dist.is_initialized():
        return function()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [function()]
        except OSError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], OSError):
        raise found[0]
    result: T = found[0]
    return result


def on_main(function: Callable[[], None]) -> str | None:
    """Call a function on rank 0 and give the text of its OSError, or None, to all processes; collective."""
    try:
        agreed(function)
    except OSError as error:
        return error.strerror or str(error)
    return None


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
    """
    place = folder.with_name(folder.name + _DAMAGED)
    number = 1
    while place.exists():
        number += 1
        place = place.with_suffix(f"{_DAMAGED}{number}")
    os.rename(folder, place)
    logger.warning("%s is damaged (%s): kept as %s and skipped", folder.name, problem, place.name)
