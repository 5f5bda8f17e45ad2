"""Every command ends as other tools do when nobody reads on what it prints."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dash_megatron.reader import ending_with_reader

ROOT = Path(__file__).parents[1]
PLAN = ["-m", "dash_megatron", "plan", "--config", "configs/8b_128k.yaml", "--gpus", "64"]


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "command",
    [
        PLAN,
        [*PLAN, "--json", "--top", "1000"],
        ["train.py", "--config", "configs/quickstart.yaml"],
        ["-m", "data_tools.write_sidecar", "--help"],
        ["slurm/submit.py", "--help"],
        ["slurm/status.py", "tests"],
        ["-m", "benchmarks.choices"],
        ["-m", "docs.tools.kernel_rates"],
    ],
    ids=["little", "much", "train", "data_tools", "submit", "status", "choices", "kernel_rates"],
)
def test_a_command_without_a_reader_ends_without_a_word(command: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    os.close(writer)
    # argparse itself passes over a --help that it cannot write
    assert ended.returncode == (0 if unbuffered and "--help" in command else 128 + signal.SIGPIPE)
    assert ended.stderr == ""


def test_another_connection_that_breaks_is_told() -> None:
    with pytest.raises(BrokenPipeError), ending_with_reader():
        raise BrokenPipeError
