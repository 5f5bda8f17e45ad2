"""What processes agree on; each function here runs in several processes, and leaves what it saw in files."""

import datetime
import json
import logging
import os
import re
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from dash_megatron import agreement
from dash_megatron.agreement import once_a_machine


def join(machine: str, seconds: float = 60) -> int:
    os.environ["SLURMD_NODENAME"] = machine
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    return dist.get_rank()


def note(folder: Path, task: int, at_once: int = 1) -> None:
    """Leave a file, and wait until as many tasks of this machine as are done at once have begun."""
    machine = os.environ["SLURMD_NODENAME"]
    (folder / f"{machine}_{task}_by_{os.environ['RANK']}").write_text(str(time.time()))
    deadline = time.monotonic() + 60
    while len(list(folder.glob(f"{machine}_*"))) < at_once:
        assert time.monotonic() < deadline, "the processes do not share the tasks"
        time.sleep(0.01)


def on_two_machines(folder: Path) -> None:
    # as srun distributes ranks cyclically; on node0 rank 0 gives signs of life and the others work
    node = int(os.environ["RANK"]) % 2
    join(f"node{node}")
    once_a_machine("note", [partial(note, folder, task, 2 + node) for task in range(6)])
    seen = sorted(path.name.rpartition("_by_")[0] for path in folder.glob("node*"))
    assert seen == [f"node{machine}_{task}" for machine in range(2) for task in range(6)]
    once_a_machine("note", [])
    once_a_machine("note", [partial(note, folder, 6)])


def test_each_task_is_done_once_on_each_machine_and_first_on_that_of_rank_0(run_processes, tmp_path):
    run_processes(6, on_two_machines, tmp_path)
    files = [path for path in tmp_path.glob("node*") if "_6_" not in path.name]
    done = {path.name: float(path.read_text()) for path in files}
    times = [[time for name, time in done.items() if name.startswith(f"node{node}")] for node in range(2)]
    assert max(times[0]) < min(times[1])
    assert {name.rpartition("_")[2] for name in done} == {"1", "2", "3", "4", "5"}


def test_without_other_processes_tasks_are_done_in_order():
    done: list[int] = []
    once_a_machine("note", [partial(done.append, task) for task in range(3)])
    assert done == [0, 1, 2]


def fails_on_the_other_machine(folder: Path) -> None:
    rank = join(f"node{int(os.environ['RANK']) // 2}", 1)

    def task() -> None:
        time.sleep(2.5)  # in which collectives would time out
        if rank == 2 or rank == 3:
            raise OSError(28, f"disk full on {os.environ['SLURMD_NODENAME']}")

    with pytest.raises(OSError, match="disk full on node1") as caught:
        once_a_machine("note", [task])
    (folder / f"told_{rank}").write_text(json.dumps([caught.value.errno, caught.value.strerror]))


def tell_progress(folder: Path, rank_0_works: bool) -> None:
    rank = join(f"node{os.environ['RANK']}" if rank_0_works else "node0")
    if rank == 0:
        package = logging.getLogger("dash_megatron")
        package.setLevel(logging.INFO)
        package.addHandler(logging.FileHandler(folder / "log"))
    agreement._TELL_SECONDS = 0.2
    once_a_machine("order data sets", [partial(time.sleep, 0.4)] * 3)


@pytest.mark.parametrize("rank_0_works", [False, True])
def test_the_log_tells_how_many_tasks_are_done(rank_0_works, run_processes, tmp_path):
    run_processes(2, tell_progress, tmp_path, rank_0_works)
    lines = (tmp_path / "log").read_text().splitlines()
    assert any(
        re.fullmatch(r"to order data sets: [12] of 3 done on node0 after [0-3] s", line) for line in lines
    )
    assert any("done on node1" in line for line in lines) == rank_0_works
    assert len(lines) <= 12


def hang() -> None:
    time.sleep(3)
    os._exit(0)


def wait_for_the_one_that_hangs(folder: Path) -> None:
    join("node7")
    agreement._STALLED_SECONDS = 0.5
    with pytest.raises(TimeoutError, match=r"node7 could not order data sets for 0 minutes \(0 of 1 done\)"):
        once_a_machine("order data sets", [hang])
    (folder / "told").write_text("")


def test_nobody_waits_for_ever_for_a_process_that_hangs(run_processes, tmp_path):
    run_processes(2, wait_for_the_one_that_hangs, tmp_path)
    assert (tmp_path / "told").is_file()


def wait_for_the_slow_machine(folder: Path) -> None:
    rank = join(f"node{os.environ['RANK']}")
    agreement._STALLED_SECONDS = 1.5
    once_a_machine("note", [partial(time.sleep, 0.6 * rank)] * 4)
    (folder / f"done_{rank}").write_text("")


def test_a_machine_whose_tasks_end_one_by_one_is_waited_for(run_processes, tmp_path):
    run_processes(2, wait_for_the_slow_machine, tmp_path)
    assert len(list(tmp_path.glob("done_*"))) == 2


def test_an_error_of_a_task_is_raised_on_all_processes_however_long_it_took(run_processes, tmp_path):
    run_processes(3, fails_on_the_other_machine, tmp_path)
    assert {path.read_text() for path in tmp_path.glob("told_*")} == {'[28, "disk full on node1"]'}
    assert len(list(tmp_path.glob("told_*"))) == 3
