"""Indices of samples that are built once, by one process, and read by the others and by later starts."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dash_megatron.files import sync
from dash_megatron.retry import retry

logger = logging.getLogger(__name__)

T = TypeVar("T")

_count = itertools.count()
_FIRST_PAUSE, _MAX_PAUSE = 0.01, 1.0


def cached_index(build: Callable[[str], T], folder: Path, name: str, num_files: int) -> T:
    """What `build` makes, or reads from a folder where it made it before; collective.

    Args:
        build: given a folder, reads the index from there, or writes it there where it is missing; given "", makes it in memory.
        folder: whose name says all that the index depends on. It appears when the index is complete: no process sees half an index,
            and a killed process leaves none. An index that lost a file, or its end with the machine that wrote it, is made anew,
            and takes the old one's place when it is complete.
        name: of what the index is of, for the log.
        num_files: of a whole index.

    Raises:
        OSError: the disk has been full, or away, for minutes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return _open_or_make_index(build, folder, name, num_files)
    store, made = torch.distributed.distributed_c10d._get_default_store(), f"index {next(_count)}"
    if torch.distributed.get_rank() == 0:
        try:
            return _open_or_make_index(build, folder, name, num_files)
        finally:
            # in `finally`, so that an error on rank 0 does not leave the others waiting
            store.set(made, "")
    pause = _FIRST_PAUSE
    # in no collective, which would end the run after a while: a billion documents take a quarter of an hour, and more
    while not store.check([made]):
        time.sleep(pause)
        pause = min(2 * pause, _MAX_PAUSE)
    if not _has_all(folder, num_files):
        # another node with a disk of its own; its processes would write all at once
        logger.warning(
            "data cache %s is not shared with rank 0: building the index of %s in memory", folder, name
        )
        return build("")
    return build(str(folder))


def _has_all(folder: Path, num_files: int) -> bool:
    return sum(1 for _ in folder.glob("[!.]*")) >= num_files


def _open_or_make_index(build: Callable[[str], T], folder: Path, name: str, num_files: int) -> T:
    """The index in a folder, which is made where it is not there, or not whole."""
    if folder.is_dir():
        try:
            if not _has_all(folder, num_files):
                raise ValueError("a file of it is missing")
            return build(str(folder))
        except (ValueError, EOFError) as error:
            logger.warning("%s, the order of the rows of %s, is damaged (%s)", folder, name, error)
            shutil.rmtree(folder)
    logger.info("ordering the rows of %s, once: later starts read the order from %s", name, folder)
    retry(lambda: _build_in_temporary_folder(build, folder), f"write {folder}", path=folder.parent)
    return build(str(folder))


def _build_in_temporary_folder(build: Callable[[str], T], folder: Path) -> None:
    temporary = folder.parent / f".building-{folder.name}-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        build(str(temporary))
        for file in temporary.iterdir():
            sync(file)
        os.rename(temporary, folder)
    except OSError as error:
        # another process was first: its index is the same
        if folder.is_dir():
            return
        if error.errno is None:  # numpy tells in words only that a disk is full
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
