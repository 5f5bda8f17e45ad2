"""Arrays that take long to make: they are made once, and mapped into memory by all processes and by later starts."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dash_megatron.agreement import agreed, once_a_machine
from dash_megatron.files import sync
from dash_megatron.retry import make_writable_folder, retry

logger = logging.getLogger(__name__)

_BUILDING = ".building-"
_DEAD_SECONDS = 24 * 3600.0
_SECONDS_EACH = 2e-7
"""How long a document, or a row of a blend of 20 data sets, takes to be ordered."""


@dataclass(frozen=True)
class Index:
    """Arrays in a folder, or how to make them."""

    make: Callable[[], dict[str, np.ndarray]]
    """Makes the arrays, by name."""
    folder: Path
    """Its name says all that the arrays depend on."""
    arrays: tuple[str, ...]
    """Their names."""
    name: str
    """Of what they are of, for the log."""
    size: int
    """How many documents or rows are ordered: the largest are made first, as they take longest."""


def cached_indices(indices: Sequence[Index]) -> list[list[np.ndarray]]:
    """The arrays of each index, mapped into memory, from folders where they were made before, or are made now; collective.

    Those that are missing are made by the processes of rank 0's machine, side by side, and once more on each machine that does not
    see rank 0's disk. A folder appears when it is complete: no process sees half an index. An index that lost a file, or its
    end with the machine that wrote it, is made anew, and takes the old one's place when it is complete.

    Raises:
        ValueError: the folders' folder may not be written to.
        OSError: the disk has been full, or away, for minutes.
    """
    different = list({index.folder: index for index in indices}.values())
    # only rank 0 looks: what NFS once did not find, it may tell to be missing for a minute
    if missing := agreed(lambda: [n for n, index in enumerate(different) if not index.folder.is_dir()]):
        made = [different[n] for n in missing]
        minutes = sum(index.size for index in made) * _SECONDS_EACH / 60
        logger.info(
            "ordering the rows of %s, once: later starts read it from %s%s",
            ", ".join(index.name for index in made),
            made[0].folder.parent,
            f"; one process needs about {minutes:.0f} minutes" if minutes > 1 else "",
        )
    largest_first = sorted(different, key=lambda index: index.size, reverse=True)
    once_a_machine("order data sets", [functools.partial(_open_or_make, index) for index in largest_first])
    return [_open_or_make(index) for index in indices]


def _open_or_make(index: Index) -> list[np.ndarray]:
    if index.folder.is_dir():
        try:
            return _open(index)
        except (ValueError, EOFError) as error:
            logger.warning(
                "%s, the order of the rows of %s, is damaged (%s)", index.folder, index.name, error
            )
            shutil.rmtree(index.folder)
    make_writable_folder(index.folder.parent, "data.cache_dir")  # known before what takes minutes
    arrays = index.make()
    retry(lambda: _write(index, arrays), f"write {index.folder}", path=index.folder.parent)
    _remove_remains(index.folder)
    return _open(index)


def _open(index: Index) -> list[np.ndarray]:
    # in the names that Megatron gives, and older starts left, the array's stands last
    files = {file.stem.rpartition("-")[2]: file for file in index.folder.glob("*.npy")}
    if missing := [name for name in index.arrays if name not in files]:
        raise ValueError(f"{missing[0]}.npy is missing")
    return [np.load(files[name], mmap_mode="r") for name in index.arrays]


def _write(index: Index, arrays: dict[str, np.ndarray]) -> None:
    folder = index.folder
    temporary = folder.parent / f"{_BUILDING}{folder.name}-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            # opened to be read too, as numpy then writes by Python: what it writes to others may lose its end on a full disk, untold
            with open(temporary / f"{name}.npy", "w+b") as file:
                np.save(file, array)
            sync(temporary / f"{name}.npy")
        # earlier releases, which may share the folder, remove an index that has fewer files than Megatron's
        (temporary / "description.txt").write_text(index.name)
        os.rename(temporary, folder)
    except OSError:
        # another process was first: its index is the same
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_remains(folder: Path) -> None:
    """Remove what killed processes left: parts of an index that is complete now, which nobody needs, and of any nobody has written to for a day."""
    for remains in folder.parent.glob(f"{_BUILDING}*"):
        try:
            written = max(path.stat().st_mtime for path in (remains, *remains.iterdir()))
        except OSError:
            continue  # another process removes it
        if remains.name.startswith(f"{_BUILDING}{folder.name}-") or time.time() - written > _DEAD_SECONDS:
            shutil.rmtree(remains, ignore_errors=True)
