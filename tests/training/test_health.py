"""Hangs, slow processes, collapsed routers and full disks are noticed, and named."""

import errno
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dash_megatron.exit_codes import ExitCode
from dash_megatron.retry import retry
from dash_megatron.training.hang import HangReport, describe
from dash_megatron.training.health import CollapseAlarm
from dash_megatron.training.metrics import MetricsWriter, read_metrics
from tests.training.fault_workers import train_with_a_slow_rank

ROOT = Path(__file__).parents[2]


def test_a_process_without_progress_shows_its_stacks_and_ends() -> None:
    code = (
        "import time\n"
        "from dash_megatron.training.health import Watchdog\n"
        "def wait_for_a_lost_peer(): time.sleep(60)\n"
        "watchdog = Watchdog(minutes=1 / 60)\n"
        "for _ in range(4): watchdog.beat(); time.sleep(0.5)\n"
        "print('alive', flush=True)\n"
        "wait_for_a_lost_peer()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=ROOT
    )
    assert result.stdout == "alive\n"
    assert "Timeout (0:00:01)!" in result.stderr
    assert "in wait_for_a_lost_peer" in result.stderr
    assert result.returncode == ExitCode.FAULT


def test_processes_without_progress_tell_which_of_them_stand_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "exit.7.0"
    monkeypatch.setenv("DASH_EXIT_FILE", str(told))
    hosts = ["node01", "node01", "node02", "node02"]
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / "rank_00002").write_text("of an earlier start")
    reports = [HangReport(tmp_path, rank, hosts, seconds=4) for rank in (0, 1, 3)]
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / ".nfs0001").write_text("what a network file system keeps of a removed file")

    def wait_for_words() -> None:
        if not (told.is_file() and told.read_text().endswith("\n")):
            raise OSError("not yet")

    retry(wait_for_words, "wait", seconds=30)
    expected = (
        "no progress for 4 s: no sign of life of rank 2 on node02; rank 0 on node01 and 2 more in retry ("
    )
    sentence, machine = told.read_text().splitlines()
    assert sentence.startswith(f"{int(ExitCode.FAULT)}\t{expected}retry.py:")
    assert machine.startswith("bad\tnode02\tno progress for 4 s: ")
    assert capfd.readouterr().err.count(expected) == 1
    for report in reports:
        report.stop()


def wait_for_lines(told: Path, number: int) -> None:
    deadline = time.monotonic() + 30
    while told.read_text().count("\n") != number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_go_on_take_back_that_they_hang_and_tell_when_they_hang_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "exit.7.0"
    told.write_text("1\terror: of another process\n")
    monkeypatch.setenv("DASH_EXIT_FILE", str(told))
    report = HangReport(tmp_path, 0, ["a", "b"], seconds=1)
    for _ in range(2):
        wait_for_lines(told, 3)
        report.beat()
        wait_for_lines(told, 1)
    report.stop()
    assert told.read_text() == "1\terror: of another process\n"
    assert not list((tmp_path / "hang").iterdir())
    said = capfd.readouterr().err
    assert said.count("; where this is slow and no hang, raise faults.hang_minutes\n") == 2
    assert said.count("warning: the processes went on\n") == 2


@pytest.mark.parametrize("then", ["end", "may be killed"])
def test_processes_that_go_on_take_back_that_they_hang_before_they_end(
    then: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "exit.7.0"
    told.touch()
    monkeypatch.setenv("DASH_EXIT_FILE", str(told))
    report = HangReport(tmp_path, 0, ["a", "b"], seconds=1)
    wait_for_lines(told, 2)
    report.seconds = 3600
    time.sleep(0.2)
    report.beat()
    if then == "end":
        report.stop()
    wait_for_lines(told, 0)
    report.stop()


def test_processes_that_make_progress_or_have_ended_tell_nothing(tmp_path: Path) -> None:
    trains, ended = (HangReport(tmp_path, rank, ["a", "b"], seconds=1) for rank in (0, 1))
    ended.stop()
    for _ in range(8):
        trains.beat()
        time.sleep(0.25)
    trains.stop()
    assert not (tmp_path / "hang").exists()


def test_of_hundreds_of_processes_those_are_named_first_that_others_may_wait_for() -> None:
    hosts = [f"node{rank // 8:02d}" for rank in range(512)]
    places = {rank: "backward (training/engine.py:122)" for rank in range(512)}
    del places[97], places[98]
    places[300] = "next_batch (training/sources.py:50)"
    text, silent = describe(hosts, places, 1620)
    assert text == (
        "no progress for 1620 s: no sign of life of rank 97 on node12 and 1 more; "
        "rank 300 on node37 in next_batch (training/sources.py:50); "
        "rank 0 on node00 and 508 more in backward (training/engine.py:122); "
        "where this is slow and no hang, raise faults.hang_minutes"
    )
    assert silent == ["node12"]


def test_a_slow_process_is_named_with_its_time(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    run_processes(2, train_with_a_slow_rank, tiny_config, 1, 0.3)
    lines = read_metrics(tiny_config["run_dir"])[1:]
    assert [line["slowest_rank"] for line in lines] == [1, 1, 1]
    assert all(line["slowest_over_median"] > 1.5 for line in lines)
    assert "rank 1 on " in (tmp_path / "rank_0.log").read_text()


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's log, which a trainer in this process may have taken away from the root logger."""
    monkeypatch.setattr(logging.getLogger("dash_megatron"), "propagate", True)
    return caplog


def test_a_collapsed_router_raises_one_alarm_until_it_selects_again(package_log: Any) -> None:
    alarm = CollapseAlarm(steps=3)
    # floor; ceiling; free; one chunk only, where both are the same; no router
    collapsed = ([0.13, 0.9995, 0.5, 1.0, None], [1.0, 8.0, 4.0, 1.0, None])
    for step in range(1, 6):
        assert alarm.alarms == (0 if step < 4 else 2)
        alarm.update(step, *collapsed)
    texts = [record.getMessage() for record in package_log.records]
    assert len(texts) == 2
    assert "step 3: layer 0's router has selected only the own chunk for 3 steps" in texts[0]
    assert "step 3: layer 1's router has selected every chunk for 3 steps" in texts[1]
    alarm.update(6, [0.5, 0.9995, 0.5, 1.0, None], [4.0, 8.0, 4.0, 1.0, None])
    assert alarm.alarms == 1
    assert "step 6: layer 0's router selects again" in package_log.records[-1].getMessage()


def test_a_disk_that_was_full_for_a_moment_leaves_whole_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package_log: Any
) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=0)
    append, failures = writer._lines._append, [True, False]

    def half_a_line(line: bytes) -> None:
        if failures and failures.pop(0):
            append(line[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(line)

    monkeypatch.setattr(writer._lines, "_append", half_a_line)
    for step in (1, 2):
        writer.write({"step": step, "loss": 2.0})  # type: ignore[typeddict-item]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n'
    assert "disk full" in package_log.records[0].getMessage()
