"""The number of files that this process may have open, of which a blend of many data sets needs many."""

from __future__ import annotations

import os
import resource

_OTHER_FILES = 256
"""Room for what a process opens beside its data: sockets, checkpoints, logs, libraries."""


def allow_open_files(count: int, what: str) -> None:
    """Raise this process's limit of open files, if it must be, to leave room for some more.

    Args:
        count: files to be opened, beside those that are open.
        what: names what they are for, in the error.

    Raises:
        ValueError: the system does not allow as many.
    """
    needed = len(os.listdir("/proc/self/fd")) + count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ValueError(
            f"{what}: this process needs {needed} open files and may have {hard} (`ulimit -Hn`); ask for a higher limit, "
            "or tokenize several data sets into one"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
