"""How a process finds out who started it."""

import subprocess

import pytest

from dash_megatron.parallel import launch as launch_module
from dash_megatron.parallel import read_launch

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
    assert 20_000 <= launch.master_port < 40_000
    assert read_launch({**SRUN, "SLURM_PROCID": "3"}).master_port == launch.master_port
    assert read_launch({**SRUN, "SLURM_STEP_ID": "1"}).master_port != launch.master_port


def test_master_variables_override_the_rendezvous_under_srun() -> None:
    launch = read_launch({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (launch.master_address, launch.master_port) == ("10.0.0.1", 4000)


def test_a_folded_node_list_is_expanded_by_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    def scontrol(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "hostnames", "gpu[07-09,12]"]
        return subprocess.CompletedProcess(command, 0, stdout="gpu07\ngpu08\ngpu09\ngpu12\n")

    monkeypatch.setattr(launch_module.subprocess, "run", scontrol)
    assert read_launch({**SRUN, "SLURM_STEP_NODELIST": "gpu[07-09,12]"}).master_address == "gpu07"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "eight"}, "WORLD_SIZE='eight' must be a number"),
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
