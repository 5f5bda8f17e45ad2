"""Try file operations again while a file system is away or full, for a bounded time; needs nothing but Python."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Errors that waiting does not mend; a missing file is not among them, because an unmounted file system looks like one
PERMANENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EBADF,
    errno.EFBIG,
    errno.EMFILE,
}
_FIRST_PAUSE, _MAX_PAUSE = 0.2, 10.0


def retry(
    function: Callable[[], T], what: str, seconds: float = 120.0, path: str | os.PathLike[str] | None = None
) -> T:
    """Call a function until it raises no OSError, with growing pauses, for about `seconds`.

    Args:
        function: does one whole piece of work and may be called again after it failed half-way.
        what: completes "cannot ...", such as "write metrics.jsonl".
        seconds: how long to try; 0 tries once.
        path: where the work is done: its free space is named when the disk is full.

    Returns:
        What the function gave.

    Raises:
        OSError: as at the last attempt, of the same errno, with `what` and the remedy in its text. Errors that waiting
            cannot mend (no permission, read-only file system) are raised at once.
    """
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            return function()
        except OSError as error:
            left = deadline - time.monotonic()
            reason = explain_os_error(error, path)
            if error.errno in PERMANENT or left <= 0:
                raise OSError(error.errno, f"cannot {what}: {reason}") from error
            logger.warning("cannot %s: %s; trying again for %.0f s", what, reason, left)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _MAX_PAUSE)


def make_writable_folder(path: str | os.PathLike[str], field: str) -> None:
    """Make a folder and see that this process may write to it.

    Args:
        path: the folder.
        field: of the config, that names it.

    Raises:
        ValueError: it may not be written to, or is no folder.
        OSError: the file system is full or away.
    """
    trial = Path(path) / f".trial-{socket.gethostname()}-{os.getpid()}"

    def write() -> None:
        trial.parent.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_text("may be removed")
        finally:
            trial.unlink(missing_ok=True)

    try:
        retry(write, f"write to {field}={path}", path=path)
    except OSError as error:
        if error.errno in PERMANENT:
            raise ValueError(f"{error.strerror}; give a folder that this user may write to") from error
        raise


def explain_os_error(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """One line for people: a full disk is called so, with the bytes that are free on it."""
    where = path if path is not None else error.filename
    text = error.strerror or str(error)
    if error.errno not in _FULL:
        return f"{text} ({where})" if where is not None else text
    free = _free_bytes(where)
    space = f", {free:,} bytes are free" if free is not None else ""
    return f"disk full: {text} ({where}{space}); free some space, or keep fewer checkpoints (checkpoint.keep; 0 keeps all)"


def _free_bytes(path: str | os.PathLike[str] | int | None) -> int | None:
    if path is None or isinstance(path, int):
        return None
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None
