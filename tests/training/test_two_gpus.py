"""Two GPUs over NCCL: faults, orders to stop, saving beside training, and the doctor. All start as users start them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from dash_megatron.checkpoint.folder import finished_steps
from dash_megatron.exit_codes import ExitCode
from dash_megatron.training.metrics import read_metrics
from tests.conftest import NO_GPU
from tests.gpus import NEEDS_TWO_GPUS
from tests.tiny import tiny_tree

pytestmark = NEEDS_TWO_GPUS

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count() >= 2
SECONDS = 240.0
# a GPU takes many in the time in which a test sees one and sends a signal
STEPS, EVERY = 200 if GPUS else 40, 5
# rounding to bf16, and sums of no fixed order, through all steps
TOLERANCE = 0.02
# rank 1 stops in a step, as a process does whose GPU or network is gone
HANGING = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
from dash_megatron.training.trainer import Trainer
step = Trainer.train_step
def step_or_hang(trainer):
    if trainer.step == {after} and os.environ["RANK"] == "1":
        time.sleep(600)
    return step(trainer)
Trainer.train_step = step_or_hang
sys.argv = ["train.py", *sys.argv[1:]]
sys.exit(train.main())
"""


class Run:
    """A command in a session of its own, whose output is read from a file."""

    def __init__(self, folder: Path, name: str, *command: str) -> None:
        self.log = folder / f"{name}.log"
        environment = {**os.environ, **({} if GPUS else NO_GPU), "PYTHONPATH": str(ROOT)}
        environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                cwd=ROOT,
            )

    def wait_for(self, pattern: str) -> None:
        """Until a line of the output matches."""
        self.wait_until(lambda: re.search(pattern, self.log.read_text(), re.MULTILINE) is not None, pattern)

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Until something holds, `what` in words."""
        deadline = time.monotonic() + SECONDS
        while not holds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                pytest.fail(f"the process ended, or took too long, before {what!r}:\n{self.log.read_text()}")
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """The launcher's children."""
        return psutil.Process(self.process.pid).children()

    def end(self) -> tuple[int, str, float]:
        """Exit code, output and seconds from now; nothing of the session may be left then."""
        begin = time.monotonic()
        family = (
            psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        )
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        seconds = time.monotonic() - begin
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()
        self.process.kill()
        self.process.wait()
        assert not left, f"processes are left: {left}\n{self.log.read_text()}"
        return code, self.log.read_text(), seconds


def tree_of(data: Path, run: Path) -> dict[str, Any]:
    """A run of bf16 whose sequences are shared, and whose weights and states are sharded."""
    tree = tiny_tree(data, run)
    return {
        **tree,
        "model": {**tree["model"], "head_dim": 64},
        "training": {"steps": STEPS, "global_batch": 4, "precision": "bf16"},
        "optimizer": {"lr": 1e-3},
        "parallel": {"context": 2},
        "zero": {"stage": 2},
        "checkpoint": {"every": EVERY},
        # NCCL's own limit is not below five minutes: the watchdog comes first
        "faults": {"hang_minutes": 0.75},
    }


@pytest.fixture
def tree(tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """See `tree_of`."""
    return tree_of(tiny_data, tmp_path / "run")


def start(
    tree: dict[str, Any], folder: Path, name: str, program: str | None = None, processes: int = 2
) -> Run:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    if program is not None:
        (folder / f"{name}.py").write_text(program)
    script = ROOT / "train.py" if program is None else folder / f"{name}.py"
    launch = (
        f"from dash_megatron.launcher import launch; import sys; sys.exit(launch(sys.argv[1:], {processes}))"
    )
    command = [sys.executable, str(script), "--config", str(config)]
    return Run(folder, name, sys.executable, "-c", launch, *command)


def train(tree: dict[str, Any], folder: Path, name: str) -> str:
    code, output, _ = start(tree, folder, name).end()
    assert code == ExitCode.DONE, output
    return output


def assert_ends_as(whole: str, run: str, steps: int = STEPS) -> None:
    """Losses of a run that was interrupted are those of one that was not."""
    expected, found = ({line["step"]: line for line in read_metrics(path)} for path in (whole, run))
    assert found.keys() == expected.keys() == set(range(1, steps + 1))
    for step, line in expected.items():
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=TOLERANCE), step


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the run without faults."""
    folder = tmp_path_factory.mktemp("whole")
    train(tree_of(tiny_data, folder / "run"), folder, "whole")
    return str(folder / "run")


def test_a_killed_rank_ends_all_and_the_run_goes_on_from_its_checkpoint(
    tree: dict[str, Any], whole: str, tmp_path: Path
) -> None:
    for number, rank in enumerate((1, 0)):
        run = start(tree, tmp_path, f"killed_{rank}")
        run.wait_for(rf"^step +{12 + 12 * number}/{STEPS}")
        # saved beside the steps, of which a GPU takes several meanwhile
        run.wait_until(lambda: finished_steps(tree["run_dir"])[-1:] >= [10], "step 10 is saved")
        run.ranks()[rank].send_signal(signal.SIGKILL)
        code, output, seconds = run.end()
        print(f"rank {rank} killed: all ended after {seconds:.1f} s")
        assert code == 128 + signal.SIGKILL, output
        assert seconds < 30
    assert f"resuming after step {finished_steps(tree['run_dir'])[-1]}" in train(tree, tmp_path, "again")
    assert_ends_as(whole, tree["run_dir"])


def test_a_rank_that_hangs_is_shown_and_ends_all(tree: dict[str, Any], whole: str, tmp_path: Path) -> None:
    run = start(tree, tmp_path, "hanging", HANGING.format(root=str(ROOT), after=12))
    run.wait_for(rf"^step +12/{STEPS}")
    code, output, seconds = run.end()
    print(f"rank 1 hung: all ended after {seconds:.1f} s")
    assert code == ExitCode.FAULT, output
    assert "in step_or_hang" in output, "the stack of rank 1"
    assert 30 < seconds < 120
    train(tree, tmp_path, "again")
    assert_ends_as(whole, tree["run_dir"])


def test_an_order_to_stop_is_followed_by_both_after_the_same_step(
    tree: dict[str, Any], whole: str, tmp_path: Path
) -> None:
    run = start(tree, tmp_path, "stopped")
    run.wait_for(rf"^step +7/{STEPS}")
    run.ranks()[1].send_signal(signal.SIGTERM)
    code, output, _ = run.end()
    assert code == ExitCode.REQUEUE, output
    step = read_metrics(tree["run_dir"])[-1]["step"]
    assert 7 <= step < STEPS
    assert finished_steps(tree["run_dir"])[-1] == step
    train(tree, tmp_path, "again")
    assert_ends_as(whole, tree["run_dir"])


def test_saving_beside_training_stalls_it_less_than_waiting_does(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """A model of some hundred MB of state, where a GPU has such; the copy to host memory is all that is waited for."""
    large = {
        "layers": 4,
        "hidden_size": 1024,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 64,
        "ffn_hidden_size": 4096,
    }
    stalls = {}
    for name, asynchronous in (("beside", True), ("waiting", False)):
        changed = {
            **tree,
            "run_dir": str(tmp_path / name),
            "model": large if GPUS else tree["model"],
            "training": {**tree["training"], "steps": 24},
            "checkpoint": {"every": 8, "asynchronous": asynchronous},
        }
        output = train(changed, tmp_path, name)
        seconds = [float(found) for found in re.findall(r"stood still ([\d.]+) s", output)]
        assert len(seconds) == 3, output
        # the first save allocates pinned memory; the last one waits in any case
        stalls[name] = seconds[1]
    print(f"stalls: {stalls}")
    assert stalls["beside"] < stalls["waiting"]


def test_the_doctor_finds_two_gpus_well(tree: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "doctor.yaml"
    config.write_text(yaml.safe_dump(tree))
    launch = "from dash_megatron.launcher import launch; import sys; sys.exit(launch(sys.argv[1:], 2))"
    command = [sys.executable, "-m", "dash_megatron", "doctor", "--config", str(config)]
    code, output, seconds = Run(tmp_path, "doctor", sys.executable, "-c", launch, *command).end()
    print(output, json.dumps({"seconds": seconds}))
    assert code == 0, output
    assert "nothing failed" in output
    if GPUS:
        assert re.search(r"^ok +kernels", output, re.MULTILINE)
