"""Which of how many processes this is, read from the environment of torchrun, srun, or nobody."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass


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
        # steps of one job may run side by side on the same host
        job, step = (_number(environment, name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = environment.get("MASTER_PORT") or str(20_000 + (job * 31 + step) % 20_000)
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
