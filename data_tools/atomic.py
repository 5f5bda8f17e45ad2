"""Files that appear whole or not at all, in folders into which one process writes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dash_megatron.files import lock, sync

TEMPORARY_SUFFIX = ".tmp"
MANIFEST = "manifest.json"


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes its name when the block ends without an error; otherwise nothing is left.

    Args:
        path: its folder has to exist.
        mode: "w" for UTF-8 text with newlines as they are, "wb" for bytes.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_and_rename(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    sync(temporary)
    os.replace(temporary, path)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make a folder, and hold it against other processes that would write into it too, whose files would mix.

    File systems without locks hold nothing, see `lock`. A killed process holds nothing either.

    Raises:
        ValueError: another process writes into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".writing"
    with open(path, "a", encoding="utf-8") as file:
        held = ValueError(
            f"--output={folder} must be written by one process at a time, and another is writing it; wait for that one, stop it, "
            "or give another folder"
        )
        lock(file.fileno(), held)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_no_other_manifest(folder: Path, key: str) -> None:
    """Refuse a folder whose manifest lacks a key that all have of the tool that is to write there: it is another's, and would be lost.

    Raises:
        ValueError: naming the folder and the remedy.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict) and key not in manifest:
        raise ValueError(
            f"--output={folder} must not be the folder of another tool, whose {MANIFEST} it would overwrite; give another folder"
        )


def remove_files(folder: Path, *patterns: str) -> None:
    """Remove a folder's files that match a pattern, and what a killed run left of them."""
    for pattern in patterns:
        for path in [*folder.glob(pattern), *folder.glob(pattern + TEMPORARY_SUFFIX)]:
            path.unlink(missing_ok=True)
