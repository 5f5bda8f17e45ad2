"""How a process finds out who started it."""

import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dash_megatron import ranks
from dash_megatron.config import ParallelConfig
from dash_megatron.parallel import groups, read_launch

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu7",
}


def test_without_a_launcher_there_is_one_process_and_no_network() -> None:
    launch = read_launch({})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.master_address) == (0, 1, 0, None)


def test_a_batch_script_outside_srun_runs_alone() -> None:
    assert read_launch({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}).world_size == 1


def test_torchrun_comes_before_srun_because_it_runs_inside() -> None:
    launch = read_launch({**SRUN, **TORCHRUN})
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 8, 1)
    assert (launch.master_address, launch.master_port) == ("node0", 29500)


def test_srun_gives_ranks_and_a_rendezvous_that_all_tasks_agree_on() -> None:
    launch = read_launch(SRUN)
    assert (launch.rank, launch.world_size, launch.local_rank) == (9, 16, 1)
    assert launch.master_address == "gpu7"
    ports = {read_launch({**SRUN, "SLURM_JOB_ID": str(job)}).master_port for job in range(5000, 6000)}
    assert len(ports) == 1000
    # where Linux gives none to connections
    assert 20_000 <= min(ports) <= max(ports) < 32_768
    assert read_launch({**SRUN, "SLURM_PROCID": "3"}).master_port == launch.master_port
    assert read_launch({**SRUN, "SLURM_STEP_ID": "1"}).master_port != launch.master_port


def test_master_variables_override_the_rendezvous_under_srun() -> None:
    launch = read_launch({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (launch.master_address, launch.master_port) == ("10.0.0.1", 4000)


def test_a_folded_node_list_is_expanded_by_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    def scontrol(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "hostnames", "gpu[07-09,12]"]
        return subprocess.CompletedProcess(command, 0, stdout="gpu07\ngpu08\ngpu09\ngpu12\n")

    monkeypatch.setattr(ranks.subprocess, "run", scontrol)
    assert read_launch({**SRUN, "SLURM_STEP_NODELIST": "gpu[07-09,12]"}).master_address == "gpu07"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "eight"}, "WORLD_SIZE='eight' must be a number"),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, "MASTER_PORT='abc' must be a number from 1 to 65535"),
        ({**SRUN, "MASTER_PORT": "70000"}, "MASTER_PORT='70000' must be a number from 1 to 65535"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many' must be a number"),
        ({**SRUN, "SLURM_JOB_ID": "none"}, "SLURM_JOB_ID='none' must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID"),
    ],
)
def test_a_broken_environment_is_an_error_that_names_the_variable(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_launch(environment)


@pytest.mark.parametrize(("visible", "rank", "device"), [(1, 0, 0), (1, 3, 0), (4, 3, 3)])
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one_it_sees(
    visible: int, rank: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    launch = read_launch({**SRUN, "SLURM_LOCALID": str(rank)})
    assert groups.pick_device(launch) == torch.device("cuda", device)


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: 2 are visible"):
        groups.pick_device(read_launch({**SRUN, "SLURM_LOCALID": "2"}))


def test_two_processes_on_one_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[str], own: str) -> None:
        found[:] = ["node1 GPU-a", own, "node2 GPU-a"]

    monkeypatch.setattr(groups.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(groups.dist, "all_gather_object", gather)
    groups.check_own_gpus("node1 GPU-b")
    with pytest.raises(ValueError, match=r"processes \[0, 1\] see one and the same GPU \(node1 GPU-a\)"):
        groups.check_own_gpus("node1 GPU-a")


def test_a_job_with_gpus_does_not_train_on_cpus_because_torch_sees_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        ValueError, match=r"SLURM_GPUS_ON_NODE=8, but torch \S+ sees no GPU; .* `make env NUM_GPUS=1`"
    ):
        groups.pick_device(read_launch(SRUN))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert groups.pick_device(read_launch(SRUN)) == torch.device("cpu")


def test_a_machine_whose_gpus_cannot_be_used_is_named_to_the_scheduler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DASH_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="has no GPU"):
        groups.pick_device(read_launch({**SRUN, "SLURM_LOCALID": "2"}))

    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "set_device", broken)
    with pytest.raises(RuntimeError, match="unknown error"):
        groups.join_processes(read_launch({**SRUN, "SLURM_LOCALID": "1"}))
    first, second = (tmp_path / "exit").read_text().splitlines()
    assert first.startswith("bad\tnode3\tprocess 2 of this machine has no GPU: ")
    assert second == "bad\tnode3\tCUDA error: unknown error"


def test_as_many_files_may_be_open_as_connections_to_hundreds_of_processes_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [1024, 1_000_000]
    allowed: list[int] = []
    monkeypatch.setattr(groups.os, "environ", {})
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(0, new[0]))
    monkeypatch.setattr(groups.dist, "init_process_group", lambda *_, **__: allowed.append(limits[0]))
    monkeypatch.setattr(groups, "pick_device", lambda _: torch.device("cpu"))
    launch = read_launch({**SRUN, "SLURM_STEP_NUM_TASKS": "512"})
    groups.join_processes(launch)
    # connections to each other process in up to 8 groups, and to the rendezvous
    assert allowed[0] > 2 * 9 * 512
    limits[:] = [1024, 4096]
    with pytest.raises(ValueError, match=r"512 processes: .* and may have 4096 .*; ask for a higher limit"):
        groups.join_processes(launch)


@pytest.mark.parametrize(("tensor", "context", "of_all"), [(1, 1, 2), (1, 8, 1), (8, 8, 0)])
def test_of_512_processes_none_is_in_more_groups_of_all_than_training_needs(
    tensor: int, context: int, of_all: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    new_group = dist.new_group

    def counted(ranks: list[int], **options: Any) -> Any:
        made.append(len(ranks))
        return new_group(ranks, **options)

    monkeypatch.setattr(dist, "new_group", counted)
    dist.init_process_group("fake", rank=77, world_size=512, store=FakeStore())
    try:
        groups.make_model_groups(ParallelConfig(tensor=tensor, context=context))
        sizes = [dist.get_world_size(group()) for group in (groups.gradient_group, groups.tensor_group)]
        assert sizes == [512 // tensor, tensor]
        groups.destroy_model_groups()
        assert dist.get_world_size() == 512
    finally:
        groups.destroy_process_groups()
    assert made.count(512) == of_all
