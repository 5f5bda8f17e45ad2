"""Make and destroy the process groups: NCCL where there are GPUs, gloo elsewhere; Megatron-core splits them."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from dash_megatron.config import ParallelConfig
from dash_megatron.exit_codes import machine_name, naming_this_machine
from dash_megatron.open_files import allow_open_files
from dash_megatron.ranks import Launch

_SOCKETS_PER_PROCESS = 9
"""Connections to each other process, at most: one for each group that both are in, each of which gloo connects whole, and on rank
0 one of the rendezvous."""


_OWN_GROUPS = ("DATA_PARALLEL", "CONTEXT_PARALLEL", "TENSOR_MODEL_PARALLEL")
"""Megatron's names of groups over which training communicates, at times over several at once."""


def init_process_groups(
    launch: Launch, parallel: ParallelConfig, timeout_minutes: float = 30
) -> torch.device:
    """Join the other processes and make Megatron's groups.

    Returns:
        The device this process computes on.

    Raises:
        ValueError: there are GPUs, but fewer on this machine than processes; on all processes, where two share one; or the
            system does not allow as many open files as so many processes need.
    """
    device = join_processes(launch, timeout_minutes)
    make_model_groups(parallel, timeout_minutes)
    return device


def join_processes(launch: Launch, timeout_minutes: float = 30) -> torch.device:
    """Join the other processes, without Megatron's groups; returns and raises as `init_process_groups`."""
    device = pick_device(launch)
    if device.type == "cuda":
        with naming_this_machine():
            torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes the GPU of that number
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        # what is above a limit ends in an error of the rendezvous, which does not say so
        allow_open_files(
            _SOCKETS_PER_PROCESS * launch.world_size,
            f"{launch.world_size} processes",
            "ask for a higher limit",
        )
        # torch and DeepSpeed read what torchrun sets; srun sets other names
        os.environ.update(
            RANK=str(launch.rank),
            WORLD_SIZE=str(launch.world_size),
            MASTER_ADDR=str(launch.master_address),
            MASTER_PORT=str(launch.master_port),
        )
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
        if device.type == "cuda":
            check_own_gpus(f"{machine_name()} {torch.cuda.get_device_properties(device).uuid}")
    return device


@naming_this_machine()
def pick_device(launch: Launch) -> torch.device:
    """The GPU of this process, or the CPU where it sees none.

    A process that sees one GPU takes it: `srun --gpus-per-task=1` shows each process its own, which is number 0 to all.

    Raises:
        ValueError: several GPUs are visible, but fewer than processes of this machine; or none of those that SLURM gave the job.
    """
    if not torch.cuda.is_available():
        given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
        if given != "0" and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise ValueError(
                f"SLURM_GPUS_ON_NODE={given}, but torch {torch.__version__} sees no GPU; if it is built without CUDA, as `make env` "
                "installs it where there is no GPU, make .venv anew with `make env NUM_GPUS=1`; let a container see the GPUs "
                "(apptainer exec --nv); or hide them with CUDA_VISIBLE_DEVICES= to train on CPU"
            )
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if 1 < visible <= launch.local_rank:
        raise ValueError(
            f"process {launch.local_rank} of this machine has no GPU: {visible} are visible; "
            "start one process per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPU"
        )
    return torch.device("cuda", 0 if visible == 1 else launch.local_rank)


def check_own_gpus(gpu: str) -> None:
    """Compare the GPUs of all processes; collective.

    Args:
        gpu: names the GPU of this process, among those of all machines.

    Raises:
        ValueError: two processes have the same.
    """
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, gpu)
    ranks = next((group for other in found if len(group := _places(found, other)) > 1), None)
    if ranks is not None:
        raise ValueError(
            f"processes {ranks} see one and the same GPU ({found[ranks[0]]}); start one process per GPU, such as with "
            "srun --gpus-per-task=1, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPU"
        )


def _places(values: list[str], value: str) -> list[int]:
    return [place for place, other in enumerate(values) if other == value]


def make_model_groups(parallel: ParallelConfig, timeout_minutes: float = 30) -> None:
    """Make Megatron's groups of the processes that joined; collective."""
    with _sharing_the_group_of_all():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            context_parallel_size=parallel.context,
            # copies of groups for an optimizer of Megatron's, each of which would connect all processes once more
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_minutes,  # type: ignore[arg-type]
        )
    # sequence parallel regions fork a random state for dropout, of which there is none: this kind forks nothing
    initialize_rng_tracker(inference_rng_tracker=True)
    if parallel.tensor > 1 and not torch.cuda.is_available():
        _let_megatron_allocate_on_cpu()


@contextlib.contextmanager
def _sharing_the_group_of_all() -> Iterator[None]:
    """Meanwhile Megatron makes no group of all processes but those that training communicates over.

    Others are the one that there is. Gloo connects each group whole: 512 processes send half a million messages to the store for
    each of all.
    """
    create = parallel_state.create_group

    def create_or_share(ranks: list[int], *arguments: Any, group_desc: str, **options: Any) -> Any:
        if len(ranks) == dist.get_world_size() and not group_desc.startswith(_OWN_GROUPS):
            return dist.group.WORLD
        return create(ranks, *arguments, group_desc=group_desc, **options)

    parallel_state.create_group = create_or_share
    try:
        yield
    finally:
        parallel_state.create_group = create


def destroy_model_groups() -> None:
    """Destroy Megatron's groups alone, so that those of another layout can be made; collective."""
    for group in (parallel_state._global_process_group_list or [])[1:]:  # the first is that of all processes
        dist.destroy_process_group(group)
    forget_model_groups()


def forget_model_groups() -> None:
    """Let others take the place of Megatron's groups, which stay as they are; not collective."""
    parallel_state.destroy_model_parallel()


def _let_megatron_allocate_on_cpu() -> None:
    """Make `torch.cuda.current_device()` give the cpu device in this process, which has no CUDA.

    Megatron's tensor parallelism allocates what it communicates there, and without CUDA the call raises.
    """

    def current_device() -> torch.device:
        return torch.device("cpu")

    torch.cuda.current_device = current_device  # type: ignore[assignment]


def data_rank() -> int:
    """Which share of the data this process reads; all processes of one copy of the model read the same."""
    return parallel_state.get_data_parallel_rank()


def context_rank() -> int:
    """Which share of a sequence this process holds."""
    return parallel_state.get_context_parallel_rank()


def context_parallel_group() -> dist.ProcessGroup:
    """Processes that share sequences."""
    return parallel_state.get_context_parallel_group()


def gradient_group() -> dist.ProcessGroup:
    """Processes that hold the same weights and see other tokens: data x context parallel."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def tensor_group() -> dist.ProcessGroup:
    """Processes that hold the shards of one copy of the weights, and see the same tokens."""
    return parallel_state.get_tensor_model_parallel_group()


def destroy_process_groups() -> None:
    """Leave the groups; safe to call where none exist."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
