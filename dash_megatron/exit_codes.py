"""What a training process tells its scheduler by its exit code; every code without a name is a fault."""

import contextlib
import enum
import os


class ExitCode(enum.IntEnum):
    """Exit codes of `train.py`."""

    DONE = 0
    """The last step was saved."""
    FAULT = 1
    """A disk, a file system or a process failed: starting again may help."""
    CONFIG_ERROR = 2
    """A setting, a file or the machine is wrong: starting again would fail again."""
    HALTED = 3
    """The run stopped itself, for example after too many non-finite losses: a person must look."""
    REQUEUE = 75
    """The run was asked to stop and has saved: start it again to continue. (EX_TEMPFAIL of sysexits.h.)"""


def tell_scheduler(code: ExitCode, reason: str) -> None:
    """Tell the batch script, which may not see this process's exit code, why it ends."""
    if path := os.environ.get("DASH_EXIT_FILE"):
        # where even this cannot be written, the exit code still tells
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(_line(code, reason))


def take_back(code: ExitCode, reason: str) -> None:
    """Take back what `tell_scheduler` told, since this process goes on."""
    if path := os.environ.get("DASH_EXIT_FILE"):
        with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as file:
            text = file.read().replace(_line(code, reason), "")
            file.seek(0)
            file.truncate()
            file.write(text)


def _line(code: ExitCode, reason: str) -> str:
    return f"{int(code)}\t{' '.join(reason.splitlines())}\n"
