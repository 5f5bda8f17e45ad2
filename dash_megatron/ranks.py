"""What processes of one run know of each other before they are connected: their ranks, and which of them tells an error."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time

OTHERS_WAIT_SECONDS = 10.0
"""For which ranks other than 0 keep an error to themselves: mostly rank 0 has it too, and its end ends them."""
SAME_ERROR_SECONDS = 1.0
"""For which a rank other than 0 stays behind an error that it has told, so that others see that it is told."""


def launched_rank() -> int | None:
    """Number of this process among those of a run, as the launcher that started it says; None where it was started alone."""
    environment = os.environ
    alone = "RANK" not in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    number = environment.get("RANK", environment.get("SLURM_PROCID", ""))
    return None if alone or not number.isdigit() else int(number)


def print_error_once(reason: str) -> None:
    """Print on standard error why this process ends, which for ranks other than 0 takes a while; see `let_rank_0_print_error`.

    Rank 0 always tells. Of the others that one launcher started on one machine, one tells: the first that has the name in
    Linux's table of sockets, which ends with its process.
    """
    let_rank_0_print_error()
    with socket.socket(socket.AF_UNIX) as claim:
        if launched_rank():
            try:
                claim.bind(f"\0dash-megatron-told-{_digest(reason)}")
            except OSError:
                return
        print(reason, file=sys.stderr, flush=True)
        if launched_rank():
            time.sleep(SAME_ERROR_SECONDS)


def let_rank_0_print_error() -> None:
    """Wait for rank 0 to tell an error and to end, upon which the launcher ends this process, which has nothing to add."""
    if launched_rank():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(OTHERS_WAIT_SECONDS)


def _digest(text: str) -> str:
    """Digest of a text and of what the processes of one launcher on one machine have in common."""
    launcher = (os.getppid(), os.environ.get("MASTER_PORT"), os.environ.get("SLURM_JOB_ID"))
    return hashlib.sha256(f"{launcher} {text}".encode()).hexdigest()[:24]
