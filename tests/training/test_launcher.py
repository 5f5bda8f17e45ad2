"""Several processes on one machine end as one would: with its exit code, its words once, and its time to save."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_megatron.exit_codes import ExitCode
from dash_megatron.launcher import launch
from dash_megatron.training.metrics import read_metrics
from tests.conftest import NO_GPU

ROOT = Path(__file__).parents[2]


def launched(program: str, processes: int = 3) -> int:
    # programs find this repository's train.py
    return launch(
        [
            sys.executable,
            "-c",
            f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); rank = int(os.environ['RANK']); {program}",
        ],
        processes,
    )


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", ExitCode.DONE),
        ("sys.exit(75)", ExitCode.REQUEUE),
        ("sys.exit(2) if rank == 1 else time.sleep(60)", ExitCode.CONFIG_ERROR),
        ("os.kill(os.getpid(), 9) if rank == 2 else sys.exit(0)", 128 + 9),
    ],
)
def test_the_exit_code_is_that_of_the_processes_and_one_that_fails_ends_all(program: str, code: int) -> None:
    begin = time.monotonic()
    assert launched(program) == code
    assert time.monotonic() - begin < 30


def test_a_process_that_a_signal_ended_is_named_last(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(1) or sys.exit('connection reset by peer')"
    )
    assert launched(program) == 128 + 9
    last = "error: rank 1 was ended by SIGKILL; where memory runs out, the system does that\n"
    assert capfd.readouterr().err.endswith(f"connection reset by peer\n{last}")


def lives(process: str) -> bool:
    try:
        return bool(
            Path("/proc", process, "cmdline").read_bytes()
        )  # nothing where only its parent has not noted its end
    except OSError:
        return False


def test_processes_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    child = f"import os, time; open('{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(300)"
    program = (
        f"import sys; from dash_megatron.launcher import launch; launch([sys.executable, '-c', {child!r}], 2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(children := list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while any(lives(child.name) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def start(tree: dict[str, Any], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "training.seed=7",
            "--config",
            str(path),
            "--processes",
            "2",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **NO_GPU, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def test_ctrl_c_saves_and_ends_with_a_sentence(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    process = start(tiny_config, tmp_path, "training.steps=500")  # overrides stand before and behind options
    assert process.stdout is not None
    output = ""
    while not output.rpartition("\n")[0].rpartition("\n")[2].startswith("step "):
        output += process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the launcher and to all
    output += process.stdout.read()
    assert process.wait() == ExitCode.REQUEUE, output
    step = read_metrics(tiny_config["run_dir"])[-1]["step"]
    assert output.rstrip().endswith(f"stopped by a signal after step {step}; start again to go on"), output
    assert "Traceback" not in output
    saved = Path(tiny_config["run_dir"]) / "checkpoints" / f"step_{step:08d}"
    assert len(list(saved.glob("state_*.safetensors"))) == 2


def test_ctrl_c_before_there_is_anything_to_save_says_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with open(tmp_path / "config.yaml", "w"):  # which the process has begun to read
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (-signal.SIGINT, "")


def test_an_error_that_all_have_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    late = "rank == 0 and time.sleep(0.3)"  # rank 0 tells it all the same, and the others do not
    assert (
        launched(f"import train; {late}; sys.exit(train.tell_end(2, 'error: of all'))")
        == ExitCode.CONFIG_ERROR
    )
    assert capfd.readouterr().err == "error: of all\n"


def test_an_error_that_some_have_is_told_by_one_of_them_and_leaves_no_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    wait = "import train; from dash_megatron import ranks; ranks.OTHERS_WAIT_SECONDS = 0.2 * rank; rank or time.sleep(60)"
    assert launched(f"{wait}; sys.exit(train.tell_end(2, 'error: of 1 and 2'))") == ExitCode.CONFIG_ERROR
    assert capfd.readouterr().err == "error: of 1 and 2\n"
    assert not list(tmp_path.iterdir())


TOO_MANY = str(1000 * (os.cpu_count() or 1))


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ("0", "must be at least 1"),
        ("2", "torchrun or srun has started this one"),
        (TOO_MANY, f"{TOO_MANY} must be at most"),
    ],
)
def test_a_number_of_processes_that_cannot_be_is_told(
    processes: str, message: str, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # as under torchrun
    output, _ = (process := start(tiny_config, tmp_path, "--processes", processes)).communicate()
    assert process.returncode == ExitCode.CONFIG_ERROR
    assert message in output


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"RANK": "x"}, "RANK='x' must be a number; start with torchrun or srun"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' must be a number from 1 to 65535"),
    ],
)
@pytest.mark.parametrize(
    "command", [["train.py"], ["-m", "dash_megatron", "doctor"]], ids=["train", "doctor"]
)
def test_a_wrong_variable_of_the_launcher_is_told_before_anything_is_loaded(
    command: list[str], variable: dict[str, str], message: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config))
    launcher = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--config", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **NO_GPU, "PYTHONPATH": str(ROOT), **launcher, **variable},
    )
    imported, told = (
        [line for line in result.stderr.splitlines() if line.startswith("import time:") == timed]
        for timed in (True, False)
    )
    assert (result.returncode, result.stdout) == (ExitCode.CONFIG_ERROR, "")
    assert [line[: len(f"error: {message}")] for line in told] == [f"error: {message}"]
    assert not any(line.endswith(" torch") for line in imported)


@pytest.mark.parametrize("processes", [(), ("--processes", "3")], ids=["alone", "three"])
@pytest.mark.parametrize(
    "command", [["train.py"], ["-m", "dash_megatron", "doctor"]], ids=["train", "doctor"]
)
def test_a_batch_that_processes_cannot_share_is_told_once_before_any_starts(
    command: list[str], processes: tuple[str, ...], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({**tiny_config, "training": {**tiny_config["training"], "global_batch": 6}})
    )
    # of the file and the overrides together, 3 processes would fit the file alone
    result = subprocess.run(
        [sys.executable, *command, "--config", str(path), *processes, "training.micro_batch=4"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **NO_GPU, "PYTHONPATH": str(ROOT)},
    )
    number = 3 if processes else 1
    assert result.returncode == ExitCode.CONFIG_ERROR
    assert result.stdout == ""  # not even that torch is loaded
    assert result.stderr == (
        f"error: training.global_batch=6 must be a multiple of {4 * number} = training.micro_batch=4 x {number} "
        f"data-parallel processes; try {max(4 * number, 6 // (4 * number) * 4 * number)}\n"
    )
