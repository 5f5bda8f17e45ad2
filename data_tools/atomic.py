"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".tmp"


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
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove_files(folder: Path, *patterns: str) -> None:
    """Remove a folder's files that match a pattern, and what a killed run left of them."""
    for pattern in patterns:
        for path in [*folder.glob(pattern), *folder.glob(pattern + TEMPORARY_SUFFIX)]:
            path.unlink(missing_ok=True)
