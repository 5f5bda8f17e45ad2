"""Every command takes overrides anywhere, and ends as other tools do when nobody reads on what it prints."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dash_megatron.command_line import ending_with_reader, parse_with_overrides

ROOT = Path(__file__).parents[1]
PLAN = ["-m", "dash_megatron", "plan", "--config", "configs/8b_128k.yaml", "--gpus", "64"]
SUBMIT = [
    "slurm/submit.py",
    "--config",
    "configs/quickstart.yaml",
    "--nodes",
    "1",
    "--gpus-per-node",
    "0",
    "--time",
    "1:00:00",
]


# unbuffered, the first word that is printed fails; buffered, what is left at the end
BUFFERED = [
    PLAN,
    [*PLAN, "--json", "--top", "1000"],
    ["train.py", "--config", "configs/quickstart.yaml"],
    ["-m", "data_tools.write_sidecar", "--help"],
    ["slurm/submit.py", "--help"],
    [*SUBMIT, "--dry-run"],
    ["slurm/status.py", "tests"],
    ["-m", "docs.tools.kernel_rates"],
    ["-m", "docs.tools.configuration"],
    ["benchmarks/full_attention.py", "--tiny"],
    ["benchmarks/layouts.py", "--help"],
    ["examples/stdlib_chats.py"],
]
UNBUFFERED = [
    PLAN,
    ["train.py", "--config", "configs/quickstart.yaml"],
    ["slurm/submit.py", "--help"],
    [*SUBMIT, "--dry-run"],
    ["slurm/status.py", "tests"],
    ["-m", "benchmarks.choices"],
]


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [*((command, "") for command in BUFFERED), *((command, "1") for command in UNBUFFERED)],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "unbuffered" if x else "buffered",
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


@pytest.mark.parametrize(
    ("line", "overrides", "others"),
    [
        ("a.b=1 --number 2 run_dir=x --flag a.b=3", ["a.b=1", "run_dir=x", "a.b=3"], (True, 2, None, None)),
        ("--flag a.b=1 a.b=2 a.b=1", ["a.b=1", "a.b=2", "a.b=1"], (True, None, None, None)),
        ("--several 1 2 a.b=1 --flag c.d=2", ["a.b=1", "c.d=2"], (True, None, [1, 2], None)),
        ("--text a.b=1 --several 1 a.b=2", ["a.b=2"], (False, None, [1], "a.b=1")),
        ("--text=a.b=1 a.b=2", ["a.b=2"], (False, None, None, "a.b=1")),
        ("--several 1", [], (False, None, [1], None)),
    ],
)
def test_overrides_stand_anywhere_and_keep_their_order(
    line: str, overrides: list[str], others: tuple[object, ...]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--number", type=int)
    parser.add_argument("--several", type=int, nargs="+")
    parser.add_argument("--text")
    parser.add_argument("overrides", nargs="*")
    options = parse_with_overrides(parser, line.split())
    assert options.overrides == overrides
    assert (options.flag, options.number, options.several, options.text) == others


def test_the_name_of_a_folder_is_no_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    assert parse_with_overrides(parser, ["base", "lr=1", "other"]).runs == ["base", "lr=1", "other"]


def test_ctrl_c_ends_a_command_with_the_status_that_a_shell_gives_it() -> None:
    with pytest.raises(SystemExit) as ended, ending_with_reader():
        raise KeyboardInterrupt
    assert ended.value.code == 128 + signal.SIGINT
