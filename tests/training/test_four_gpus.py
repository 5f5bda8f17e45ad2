"""Four GPUs over NCCL: a run that loses a rank goes on with two of them, and after another loss with one."""

import signal
from pathlib import Path
from typing import Any

import pytest

from dash_megatron.exit_codes import ExitCode
from dash_megatron.training.metrics import read_metrics
from tests.gpus import NEEDS_FOUR_GPUS
from tests.training.test_two_gpus import ROOT, assert_ends_as, start, tree_of

pytestmark = NEEDS_FOUR_GPUS

STEPS, EVERY = 24, 5
# the last rank kills itself before a step, while the others wait for it
DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from dash_megatron.training.trainer import Trainer
step = Trainer.train_step
def step_or_die(trainer):
    if trainer.step == {after} and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer)
Trainer.train_step = step_or_die
sys.argv = ["train.py", *sys.argv[1:]]
sys.exit(train.main())
"""


def tree_on(data: Path, run: Path, stage: int, parallel: dict[str, Any]) -> dict[str, Any]:
    """The tiny run of bf16 in a layout."""
    tree = tree_of(data, run)
    return {
        **tree,
        "training": {**tree["training"], "steps": STEPS},
        "parallel": parallel,
        "zero": {"stage": stage},
        "checkpoint": {"every": EVERY, "asynchronous": False},
        # kernels may be compiled in the first step
        "faults": {},
    }


@pytest.mark.parametrize(
    ("stage", "parallel"),
    [
        pytest.param(3, {"context": 2}, id="zero3-data-context"),
        pytest.param(1, {"tensor": 2, "sequence": True}, id="zero1-data-tensor"),
    ],
)
def test_a_run_killed_on_four_gpus_goes_on_with_two_and_then_with_one(
    stage: int, parallel: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    whole = start(
        tree_on(tiny_data, tmp_path / "whole", stage, parallel), tmp_path, "on_4_whole", processes=4
    )
    try:
        # processes, their layout, the step before which one is killed, and the one after which they resume
        for processes, layout, killed, resumed in ((4, parallel, 12, 0), (2, {"context": 2}, 17, 10), (1, {}, None, 15)):  # fmt: skip
            tree = tree_on(tiny_data, tmp_path / "run", stage, layout)
            program = DYING.format(root=str(ROOT), after=killed) if killed else None
            code, output, seconds = start(tree, tmp_path, f"on_{processes}", program, processes).end()
            print(f"{processes} processes: exit code {code} after {seconds:.1f} s")
            assert code == (128 + signal.SIGKILL if killed else ExitCode.DONE), output
            assert (f"resuming after step {resumed}" in output) == (resumed > 0), output
    finally:
        code, output, _ = whole.end()
    assert code == ExitCode.DONE, output
    expected, found = (read_metrics(tmp_path / name) for name in ("whole", "run"))
    differences = [abs(x["loss"] / y["loss"] - 1) for x, y in zip(found, expected, strict=True)]
    print(f"largest differences of losses: {max(differences[:10]):.1e} on four, {max(differences[10:15]):.1e} on two, {max(differences[15:]):.1e} on one")  # fmt: skip
    assert_ends_as(str(tmp_path / "whole"), str(tmp_path / "run"), STEPS)
