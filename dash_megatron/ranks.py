"""What processes of one run know of each other before they are connected: how they were launched, and which tells an error."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

OTHERS_WAIT_SECONDS = 10.0
"""How long ranks other than 0 hold an error back: rank 0 mostly has the same one, and when it exits, they are ended."""
SAME_ERROR_SECONDS = 1.0
"""How long a rank other than 0 stays alive after it has printed an error, so that others find it printed already."""


@dataclass(frozen=True)
class Launch:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its machine: the GPU it takes, of those that it sees."""
    master_address: str | None = None
    """Where rank 0 listens; None for a single process, which needs no network."""
    master_port: int | None = None


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Find out how the process was started.

    `torchrun` sets RANK; `srun` sets SLURM_STEP_NUM_TASKS (a batch script outside `srun` does not, and runs alone).
    Under `srun` the first host of the step is the rendezvous, at a port derived from job and step id; MASTER_ADDR and
    MASTER_PORT override both.

    Raises:
        ValueError: a variable of the launcher is missing or not a number.
    """
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        if not address or not port:
            raise ValueError(
                "RANK is set but MASTER_ADDR or MASTER_PORT is not; start with torchrun, or set both"
            )
    elif _number(environment, "SLURM_STEP_NUM_TASKS", "1") > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        address = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
        # steps of one job may run side by side on the same host; from 32768 on Linux gives ports to connections, which processes of
        # an earlier start had by the thousand, and keeps each for a minute after they ended
        job, step = (_number(environment, name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = environment.get("MASTER_PORT") or str(20_000 + (job * 31 + step) % 12_000)
    else:
        return Launch(rank=0, world_size=1, local_rank=0)
    rank, world_size, local_rank = (_number(environment, name) for name in names)
    return Launch(rank, world_size, local_rank, address, _port(port))


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environment.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} must be a number; start with torchrun or srun") from error


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise ValueError(
            f"MASTER_PORT={text!r} must be a number from 1 to 65535, the port where rank 0 listens; under srun it may be "
            "left out"
        )
    return int(text)


def _first_host(node_list: str) -> str:
    """First machine of a SLURM node list such as gpu[07-09,12]."""
    if not node_list:
        raise ValueError("SLURM_STEP_NODELIST is empty, so the rendezvous host is unknown; set MASTER_ADDR")
    if "[" not in node_list:
        return node_list.split(",")[0]
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[
            0
        ]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ValueError(
            f"SLURM_STEP_NODELIST={node_list}: `scontrol` cannot expand it; set MASTER_ADDR"
        ) from error


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
    """Wait until rank 0 has printed an error and ended: the launcher then ends this process, which has nothing to add."""
    if launched_rank():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(OTHERS_WAIT_SECONDS)


def _digest(text: str) -> str:
    """Digest of a text and of what the processes of one launcher on one machine have in common."""
    launcher = (os.getppid(), os.environ.get("MASTER_PORT"), os.environ.get("SLURM_JOB_ID"))
    return hashlib.sha256(f"{launcher} {text}".encode()).hexdigest()[:24]
