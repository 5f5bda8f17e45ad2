"""A signal lets the step finish, saves, and ends with the code that means "start again"; nothing of the run changes."""

import ctypes
import errno
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed import TCPStore

from dash_megatron.exit_codes import ExitCode
from dash_megatron.parallel import Launch, destroy_process_groups, join_processes
from dash_megatron.training.metrics import read_metrics
from dash_megatron.training.stop import StopSignals, agree_to_stop
from tests.conftest import Started, train_command
from tests.training.test_resume import EXACT, run_of
from tests.training.workers import train_all

# many enough for a signal to arrive before the last one, on a busy machine too
STEPS = 24


def exact_metrics(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for line in read_metrics(run)]


def config_of(tree: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "training": {**tree["training"], "steps": STEPS}}))
    return ["--config", str(path)]


def test_a_run_stopped_by_signals_ends_as_one_that_was_not(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    arguments = config_of(tiny_config, tmp_path)
    whole = run_of(tiny_config, tmp_path / "whole", training={"steps": STEPS})
    run_processes(1, train_all, [(whole, None)])

    run = Path(tiny_config["run_dir"])
    for number, after in ((signal.SIGUSR1, 2), (signal.SIGINT, 7)):
        process = Started(tmp_path / "log", train_command, *arguments)
        process.wait_for(f"step {after:>2}/{STEPS}")
        process.send_signal(number)
        code, output = process.end()
        assert code == ExitCode.REQUEUE, output
        step = read_metrics(run)[-1]["step"]
        assert after <= step < STEPS
        assert f"{number.name}: finishing the step" in output
        assert f"stopped by a signal after step {step}" in output
        assert (run / "checkpoints" / f"step_{step:08d}").is_dir()
    code, output = Started(tmp_path / "log", train_command, *arguments).end()
    assert code == ExitCode.DONE, output
    assert exact_metrics(run) == exact_metrics(tmp_path / "whole")


def test_a_signal_to_one_process_stops_both_after_the_same_step(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    arguments = config_of(tiny_config, tmp_path)
    # listens before any process starts, as torchrun's agent does: a port found free could be taken by then
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Started(
            tmp_path / f"log_{rank}",
            train_command,
            *arguments,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        for rank in range(2)
    ]
    try:
        ranks[0].wait_for(f"step  1/{STEPS}")
        ranks[1].send_signal(signal.SIGTERM)
        for process in ranks:
            code, output = process.end()
            assert code == ExitCode.REQUEUE, output
    finally:
        for process in ranks:
            process.kill()
    run = Path(tiny_config["run_dir"])
    step = read_metrics(run)[-1]["step"]
    assert step < STEPS
    assert len(list((run / "checkpoints" / f"step_{step:08d}").glob("state_*.safetensors"))) == 2


def wait_in_a_call() -> None:
    """The main thread waits in a call that no Python handler interrupts, as a collective would."""
    StopSignals()
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    for _ in range(60):
        libc.sleep(1)
    libc.sleep(60)


@pytest.fixture
def waiting_process(tmp_path: Path) -> Iterator[Started]:
    """A process in `wait_in_a_call`."""
    process = Started(tmp_path / "log", wait_in_a_call)
    process.wait_for("ready")
    yield process
    process.kill()


def test_a_second_order_to_stop_exits_at_once(waiting_process: Started) -> None:
    waiting_process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    waiting_process.send_signal(signal.SIGTERM)  # the same order, passed on by a launcher
    time.sleep(1.2)
    assert waiting_process.process.is_alive()
    waiting_process.send_signal(signal.SIGINT)
    code, output = waiting_process.end()
    assert code == 128 + signal.SIGINT
    assert "exiting without saving" in output


def test_scheduler_warnings_may_be_repeated_and_an_order_may_follow(waiting_process: Started) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        waiting_process.send_signal(number)
        time.sleep(1.2)
        assert waiting_process.process.is_alive()


def train_on_a_full_disk(*arguments: str) -> None:
    from dash_megatron.checkpoint import files

    def full(path: Path, tensors: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    files.write_tensors = full
    train_command(*arguments)


def test_a_full_disk_ends_in_a_sentence(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    arguments = [*config_of(tiny_config, tmp_path), "training.steps=1", "checkpoint.retry_seconds=0"]
    code, output = Started(tmp_path / "log", train_on_a_full_disk, *arguments).end()
    assert code == ExitCode.FAULT, output
    last = output.splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 1 could not be written: process 0: cannot write")
    assert "disk full: No space left on device" in last
    assert "Traceback" not in output


def test_a_run_folder_that_cannot_be_written_is_exit_code_2(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    arguments = [*config_of(tiny_config, tmp_path), f"run_dir={tmp_path}/file/run"]
    code, output = Started(tmp_path / "log", train_command, *arguments).end()
    assert code == ExitCode.CONFIG_ERROR, output
    assert f"error: cannot write to run_dir={tmp_path}/file/run: Not a directory" in output
    assert "Traceback" not in output


def test_processes_agree_to_stop_without_a_ring_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    join_processes(Launch(rank=0, world_size=1, local_rank=0))
    monkeypatch.delattr(torch.distributed, "all_reduce")
    try:
        assert agree_to_stop(True, False)
        assert not agree_to_stop(False, True)
    finally:
        destroy_process_groups()
