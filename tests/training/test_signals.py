"""A signal lets the step finish, saves, and ends with the code that means "start again"; nothing of the run changes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import TCPStore

from dash_megatron.exit_codes import ExitCode
from dash_megatron.training.metrics import read_metrics
from tests.training.test_resume import EXACT, run_of
from tests.training.workers import train_all

ROOT = Path(__file__).parents[2]
STEPS = 16


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """train.py on the CPU, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read the output up to the line that begins with `text`."""
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(text):
            return
    pytest.fail(f"the process ended before {text!r}:\n{''.join(read)}")


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


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
        process = start(arguments)
        wait_for(process, f"step {after:>2}/{STEPS}")
        process.send_signal(number)
        code, output = end_of(process)
        assert code == ExitCode.REQUEUE, output
        step = read_metrics(run)[-1]["step"]
        assert after <= step < STEPS
        assert f"{number.name}: finishing the step" in output
        assert f"stopped by a signal after step {step}" in output
        assert (run / "checkpoints" / f"step_{step:08d}").is_dir()
    code, output = end_of(start(arguments))
    assert code == ExitCode.DONE, output
    assert exact_metrics(run) == exact_metrics(tmp_path / "whole")


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    arguments = config_of(tiny_config, tmp_path)
    # listens before any process starts, as torchrun's agent does: a port found free could be taken by then
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        start(
            arguments,
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
        wait_for(ranks[0], f"step  1/{STEPS}")
        ranks[1].send_signal(signal.SIGTERM)
        for process in ranks:
            code, output = end_of(process)
            assert code == ExitCode.REQUEUE, output
    finally:
        for process in ranks:
            process.kill()
    run = Path(tiny_config["run_dir"])
    step = read_metrics(run)[-1]["step"]
    assert step < STEPS
    assert len(list((run / "checkpoints" / f"step_{step:08d}").glob("state_*.safetensors"))) == 2


def waiting_process() -> subprocess.Popen[str]:
    """Its main thread waits in a call that no Python handler interrupts, as a collective would."""
    code = (
        "import ctypes; from dash_megatron.training.stop import StopSignals; StopSignals();"
        "print('ready', flush=True);"
        "libc = ctypes.CDLL(None); [libc.sleep(1) for _ in range(60)]; libc.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    wait_for(process, "ready")
    return process


def test_a_second_order_to_stop_exits_at_once() -> None:
    process = waiting_process()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # the same order, passed on by a launcher
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, output = end_of(process)
    assert code == 128 + signal.SIGINT
    assert "exiting without saving" in output


def test_warnings_of_the_scheduler_may_be_repeated_and_an_order_may_follow() -> None:
    process = waiting_process()
    try:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
            time.sleep(1.2)
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_run_folder_that_cannot_be_written_is_one_line_and_exit_code_2(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    code, output = end_of(start([*config_of(tiny_config, tmp_path), f"run_dir={tmp_path}/file/run"]))
    assert code == ExitCode.CONFIG_ERROR, output
    assert f"error: cannot write to run_dir={tmp_path}/file/run: Not a directory" in output
    assert "Traceback" not in output
