"""One process group owns a run's folder: who trains in it says so in `owner.json`, for as long as it lives.

The file is made by one system call that fails where it exists, which NFS and Lustre keep too, and touched every few seconds, by a
process of its own too: for minutes a library may keep the owner's threads from running, as ordering the rows of large data does.
An owner on this machine is alive while its process is; it does not own copies of the folder. Of an owner on another machine only
the touches tell: whoever finds them to stand still for some time takes the folder over. No two clocks are compared.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dash_megatron.agreement import agreed
from dash_megatron.checkpoint.folder import check_own_folder
from dash_megatron.exit_codes import ExitCode, machine_id
from dash_megatron.retry import retry

logger = logging.getLogger(__name__)

FILE = "owner.json"
_BEAT_SECONDS, _DEAD_SECONDS = 5.0, 30.0
# ends with the process that started it, which holds the other end of its input, as processes do that it forked
_TOUCH = """
import os, select, sys
parent = os.getppid()
while not select.select([0], [], [], float(sys.argv[2]))[0] and os.getppid() == parent:
    try:
        os.utime(sys.argv[1])
    except OSError:
        pass
"""


class Owner:
    """Owns a run's folder until `release`, or until the process ends.

    Args:
        run_dir: the folder, which exists.
        beat_seconds: between two signs of life.
        dead_seconds: how long an owner on another machine may give none.

    Raises:
        ValueError: another process owns it, or it is a folder of `convert from-hf`.
        OSError: the file system has been full, or away, for minutes.
    """

    def __init__(
        self, run_dir: str | Path, beat_seconds: float = _BEAT_SECONDS, dead_seconds: float = _DEAD_SECONDS
    ) -> None:
        self.path = Path(run_dir) / FILE
        check_own_folder(run_dir)
        self._facts = _this_process() | {"file": str(self.path.absolute())}
        self._beat_seconds, self._released = beat_seconds, threading.Event()
        retry(lambda: self._acquire(dead_seconds), f"write {self.path}", path=self.path)
        touching = self._start_touching()
        threading.Thread(target=self._beat, args=(touching,), name="owner of the run", daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the folder up, if it is still this process's."""
        atexit.unregister(self.release)
        if not self._released.is_set():
            self._released.set()
            with contextlib.suppress(OSError):
                if _same(_read(self.path), self._facts):
                    self.path.unlink()

    def _acquire(self, dead_seconds: float) -> None:
        while not self._create():
            other = _read(self.path)
            if _same(other, self._facts):
                return  # an earlier run of this process did not end properly
            if _lives(self.path, other, dead_seconds):
                raise ValueError(
                    f"run_dir={self.path.parent} belongs to process {other.get('process', '?')} on "
                    f"{other.get('host', 'an unknown host')}, which has trained in it since {other.get('since', '?')} and "
                    "is alive; stop that one, or choose another run_dir"
                )
            logger.info(
                "nobody owns %s: process %s on %s has died, or owns what this is a copy of",
                self.path.parent,
                other.get("process", "?"),
                other.get("host", "an unknown host"),
            )
            self._remove(other)

    def _create(self) -> bool:
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with open(file, "w", encoding="utf-8") as opened:
                json.dump(self._facts, opened, indent=1)
        except OSError:  # of a full disk
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _remove(self, dead: dict[str, Any]) -> None:
        """Remove a dead owner's file, and nobody else's, should another process have been quicker."""
        away = self.path.with_name(f"{FILE}.{socket.gethostname()}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, away)
            if not _same(_read(away), dead):
                os.rename(away, self.path)
            away.unlink(missing_ok=True)

    def _start_touching(self) -> subprocess.Popen[bytes] | None:
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _TOUCH,
            str(self.path.absolute()),
            str(self._beat_seconds),
        ]
        quiet = subprocess.DEVNULL
        # what srun or a terminal sends to all processes, to stop a run, is not for this one: it inherits that they are blocked
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
        except OSError as error:  # of a limit of processes or memory
            logger.warning("no process beside this one touches %s: %s", self.path, error.strerror)
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _beat(self, touching: subprocess.Popen[bytes] | None) -> None:
        with touching or contextlib.nullcontext():
            self._watch_file()

    def _watch_file(self) -> None:
        while not self._released.wait(self._beat_seconds):
            try:
                os.utime(self.path)
                owner = _read(self.path)
            except FileNotFoundError:
                if not self._released.is_set():
                    with contextlib.suppress(OSError):
                        self._create()
            except OSError:
                continue  # the file system is away, for others too
            else:
                # one that says nothing is damaged, or was just made by another, whose facts the next look finds
                if owner and not _same(owner, self._facts) and not self._released.is_set():
                    _leave_to(owner, self.path.parent)


def own_run_folder(run_dir: str | Path) -> Owner | None:
    """Make rank 0 the owner of a run's folder; collective. Gives the owner on rank 0, and None elsewhere.

    Raises:
        ValueError, OSError: on all processes, as `Owner`.
    """
    owners: list[Owner] = []
    agreed(lambda: owners.append(Owner(run_dir)))
    return owners[0] if owners else None


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "job": os.environ.get("SLURM_JOB_ID"),
        # machines, and containers in them, count processes each for itself
        "machine": machine_id() + os.readlink("/proc/self/ns/pid"),
        "started": _start_of(os.getpid()),
    }


def _start_of(process: Any) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None where there is none, or one that has ended."""
    try:
        state, *facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else facts[18]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("machine", "process", "started"))


def _read(path: Path) -> dict[str, Any]:
    """The facts of an owner; none where the file was just made, or is damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _lives(path: Path, owner: dict[str, Any], dead_seconds: float) -> bool:
    if owner.get("machine") == _this_process()["machine"]:
        started = _start_of(owner.get("process"))
        return started is not None and started == owner.get("started") and not _is_copied(path, owner)
    first, deadline = _last_touch(path), time.monotonic() + dead_seconds
    logger.info(
        "%s belongs to process %s on %s: waiting up to %.0f s for a sign of life",
        path.parent,
        owner.get("process", "?"),
        owner.get("host", "an unknown host"),
        dead_seconds,
    )
    while time.monotonic() < deadline:
        time.sleep(min(1.0, dead_seconds / 10))
        if _last_touch(path) != first:
            return path.exists()
    return False


def _is_copied(path: Path, owner: dict[str, Any]) -> bool:
    """Whether the file came with a copy of its folder: the owner's own file still stands where the owner made it, and says the same."""
    made = Path(owner.get("file", path))
    try:
        return not made.samefile(path) and _same(_read(made), owner)
    except OSError:
        return False


def _last_touch(path: Path) -> int:
    """When a file was last touched, as its file system counts time; 0 where it is gone."""
    try:
        # opened, because NFS answers a mere question from its memory
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _leave_to(owner: dict[str, Any], run_dir: Path) -> None:
    sys.stderr.write(
        f"error: process {owner.get('process')} on {owner.get('host')} has taken over run_dir={run_dir}, as this one gave no "
        "sign of life: exiting without saving\n"
    )
    sys.stderr.flush()
    os._exit(ExitCode.CONFIG_ERROR)
