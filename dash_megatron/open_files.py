"""The number of files that this process may have open: a blend of many data sets needs many, and so do many processes."""

from __future__ import annotations

import os
import resource

_OTHER_FILES = 256
"""Room for what a process opens beside: checkpoints, logs, libraries."""


def allow_open_files(count: int, what: str, remedy: str) -> None:
    """Raise this process's limit of open files, if it must be, to twice what is needed or as far as the system lets it.

    Args:
        count: files to be opened, beside those that are open.
        what: names what they are for, in the error.
        remedy: what to do where the system does not allow as many.

    Raises:
        ValueError: the system does not allow as many.
    """
    needed = len(os.listdir("/proc/self/fd")) + count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    most = 2 * needed if hard == resource.RLIM_INFINITY else min(2 * needed, hard)
    if needed > most:
        raise ValueError(
            f"{what}: this process needs {needed} open files and may have {hard} (`ulimit -Hn`); {remedy}"
        )
    # NCCL, for one, opens more than can be told beforehand
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
