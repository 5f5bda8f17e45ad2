"""Start a command in several processes on this machine, and end as they do.

They find each other by the variables that torchrun sets. Unlike torchrun this passes orders to stop on and then waits for as
long as saving takes, gives the command's own exit code, and adds nothing to what it printed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from dash_megatron.config import Config
from dash_megatron.exit_codes import ExitCode
from dash_megatron.ranks import launched_rank, read_launch

_POLL_SECONDS = 0.05
_MAX_PROCESSES_PER_CORE = 8
"""More processes are a slip of the finger: they would take a machine's memory before one of them trains."""
_LAST_WORDS_SECONDS = 5.0
"""How long the other processes run on after one was killed or aborted, to write what they know of it."""


def check_processes(config: Config, processes: int | None) -> None:
    """Refuse a number of processes that cannot be started, or that the config cannot use, and variables of a launcher that
    cannot be right, before anything is loaded.

    Args:
        config: of the run.
        processes: how many are to be started; None: this one is alone, or a launcher has started it among others.

    Raises:
        ValueError: it is below 1 or far above the number of CPU cores, a launcher has started this process already, a
            variable of the launcher is missing or no number, or batch and layout do not fit.
    """
    if processes is None:
        config.accumulation_steps(read_launch(os.environ).world_size)
        return
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    cores = os.cpu_count() or 1
    if processes > _MAX_PROCESSES_PER_CORE * cores:
        raise ValueError(
            f"--processes {processes} must be at most {_MAX_PROCESSES_PER_CORE * cores}, {_MAX_PROCESSES_PER_CORE} for each of this machine's {cores} CPU "
            "cores; start one for each GPU, or a few where there are none"
        )
    if launched_rank() is not None:
        raise ValueError(
            "--processes starts processes, but torchrun or srun has started this one already; leave it out"
        )
    config.accumulation_steps(processes)


def launch(command: Sequence[str], processes: int) -> int:
    """Run a command `processes` times at once, as ranks of one run, until all have ended or one has failed.

    SIGINT, SIGTERM and SIGUSR1 are passed on to all. When one fails, the others are killed; which one a signal ended is said
    last, because those that waited for it tell of their connections only. When this process is killed,
    they get SIGTERM.

    Returns:
        The exit code of the first that failed, 128 + its number after a signal; else REQUEUE if one gave that; else 0.
    """
    # imported late, because it takes seconds: a wrong config is told before
    from torch.distributed import TCPStore

    # listens before any process starts: a port that was only found free could be taken by then
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    children: list[subprocess.Popen[bytes]] = []
    try:
        with _passing_orders_on(children):
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(command, env=common | own, preexec_fn=end_with_parent)
                children.append(process)
            return _wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Called in a process that was just started: it gets SIGTERM when the thread that started it ends, killed or not."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _passing_orders_on(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(number)

    orders = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in orders}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all to end, or for one to fail; gives the exit code of `launch`."""
    codes: list[int | None] = [None]
    failed = int(ExitCode.DONE)
    while not failed and None in codes:
        time.sleep(_POLL_SECONDS)
        codes = [child.poll() for child in children]
        failed = next((code for code in codes if code and code != ExitCode.REQUEUE), failed)
    if not failed:
        return int(ExitCode.REQUEUE if ExitCode.REQUEUE in codes else ExitCode.DONE)
    if failed > 0:
        return failed
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_SECONDS)
    word = "; where memory runs out, the system does that" if failed == -signal.SIGKILL else ""
    text = f"error: rank {codes.index(failed)} was ended by {signal.Signals(-failed).name}{word}"
    print(text, file=sys.stderr, flush=True)
    return 128 - failed
