"""What a training process tells its scheduler by its exit code; every code without a name is a fault."""

import contextlib
import enum
import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path


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


def machine_name() -> str:
    """Name of this machine: SLURM's own where it has one, as its commands take no other."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def machine_id() -> str:
    """What tells this machine from others, which may have its name: the kernel's number of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def tell_scheduler(code: ExitCode, reason: str, machines: Collection[str] = ()) -> None:
    """Tell the batch script, which may not see this process's exit code, why it ends, and which machines are at fault."""
    _append(_lines(code, reason, machines))


def tell_bad_machine(reason: str) -> None:
    """Tell the batch script that this machine is at fault; where few are, the next start does without it."""
    _append(_bad_machine(machine_name(), reason))


@contextlib.contextmanager
def naming_this_machine() -> Iterator[None]:
    """What goes wrong within is this machine's: no other has come into it."""
    try:
        yield
    except Exception as error:
        tell_bad_machine(str(error))
        raise


def _append(lines: str) -> None:
    if path := os.environ.get("DASH_EXIT_FILE"):
        # where even this cannot be written, the exit code still tells
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(lines)


def take_back(code: ExitCode, reason: str, machines: Collection[str] = ()) -> None:
    """Take back what `tell_scheduler` told, since this process goes on."""
    if path := os.environ.get("DASH_EXIT_FILE"):
        with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as file:
            text = file.read().replace(_lines(code, reason, machines), "")
            file.seek(0)
            file.truncate()
            file.write(text)


def _lines(code: ExitCode, reason: str, machines: Collection[str]) -> str:
    line = f"{int(code)}\t{' '.join(reason.splitlines())}\n"
    return line + "".join(_bad_machine(machine, reason) for machine in machines)


def _bad_machine(machine: str, reason: str) -> str:
    return f"bad\t{machine}\t{' '.join(reason.split())}\n"
