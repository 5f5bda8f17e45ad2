"""Checks that raise, how the findings of all processes become one result, and what people see of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_megatron.__main__ import main
from dash_megatron.doctor.examine import CHECKS
from dash_megatron.doctor.runner import (
    Check,
    Finding,
    Result,
    merge_equal,
    merge_largest,
    merge_smallest,
    rank_list,
    run_checks,
)
from dash_megatron.doctor.session import Session


def test_ranks_are_listed_as_runs() -> None:
    assert rank_list([0]) == "0"
    assert rank_list([9, 1, 2, 3, 5]) == "1-3, 5, 9"


def test_one_failure_fails_all_and_its_message_names_the_ranks() -> None:
    findings = [Finding("skipped", message="no GPU"), Finding(), Finding("failed", message="too hot")]
    merged = merge_largest([*findings, findings[2]])
    assert (merged.status, merged.message) == ("failed", "rank 2-3: too hot")


def test_the_largest_error_counts_and_nan_most_of_all() -> None:
    findings = [Finding(figures={"error": value}) for value in (0.1, 0.3, 0.2)]
    assert merge_largest(findings).figures == {"error": 0.3}
    for place in range(3):
        broken = [*findings[:place], Finding(figures={"error": math.nan}), *findings[place:]]
        assert math.isnan(float(merge_largest(broken).figures["error"]))


def test_the_slowest_rate_counts_and_names_its_rank() -> None:
    findings = [Finding(figures={"write GB/s": value, "files": 3}) for value in (2.0, 0.5, 1.0)]
    assert list(merge_smallest(findings).figures.items()) == [("write GB/s on rank 1", 0.5), ("files", 3)]
    assert merge_smallest(findings[:1]).figures == findings[0].figures


def test_a_figure_that_differs_fails_and_says_who_has_what() -> None:
    findings = [Finding(figures={"torch": version, "gpu": "H200"}) for version in ("2.13", "2.13", "2.12")]
    merged = merge_equal(findings)
    assert merged.status == "failed"
    assert "torch is 2.13 on rank 0-1, but 2.12 on rank 2" in merged.message
    assert "gpu" not in merged.message
    assert merge_equal(findings[:2]).status == "ok"


def test_many_processes_that_fail_in_words_of_their_own_fit_a_line() -> None:
    findings = [Finding("failed", message=f"{rank} bytes are free") for rank in range(512)]
    message = merge_largest(findings).message
    assert message.startswith("rank 0: 0 bytes are free; rank 1: 1 bytes")
    assert message.endswith("; rank 4-511: the like")


def test_a_result_is_a_line_with_figures_units_and_message() -> None:
    figures = {"write GB/s on rank 3": 0.123456, "checkpoints": 3}
    line = str(Result("disk", "failed", figures, "it is full", 1.0))
    assert line == "failed   disk          1.0 s  write 0.123 GB/s on rank 3, checkpoints 3; it is full"


def test_a_check_that_raises_has_failed_and_does_not_stop_the_others(session: Session) -> None:
    def broken(session: Session) -> Finding:
        raise OSError("no such luck")

    def statuses(stops: bool) -> list[str]:
        checks = [
            Check("one", 60, broken, merge_largest, stops_others=stops),
            Check("two", 60, lambda session: Finding(), merge_largest),
        ]
        results, lost = run_checks(session, checks)
        assert not lost
        assert results[0].message == "OSError: no such luck"
        return [result.status for result in results]

    assert statuses(False) == ["failed", "ok"]
    assert statuses(True) == ["failed", "skipped"]


def test_the_scheduler_is_told_of_a_machine_that_fails_a_check_alone(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DASH_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    broken = Finding("failed", {}, "NaN\nof a GPU")
    checks = [
        Check("links", 60, lambda session: broken, merge_largest),
        Check("kernels", 60, lambda session: Finding(), merge_largest, of_one_machine=True),
    ]
    run_checks(session, checks)
    assert not (tmp_path / "exit").exists()
    run_checks(session, [Check("kernels", 60, lambda session: broken, merge_largest, of_one_machine=True)])
    assert (tmp_path / "exit").read_text() == "bad\tnode3\tkernels: NaN of a GPU\n"
    assert [check.name for check in CHECKS if check.of_one_machine] == ["kernels"]


def test_processes_are_started_with_the_arguments_of_the_command(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config))
    started: list[Any] = []

    def launch(command: list[str], processes: int) -> int:
        started.append((command[1:], processes))
        return 1

    monkeypatch.setattr("dash_megatron.doctor.cli.launch", launch)
    doctor = ["doctor", "--config", str(path), "--only", "disk"]
    assert main([doctor[0], "training.seed=7", *doctor[1:], "--processes", "2", "zero.stage=1"]) == 1
    assert started == [(["-m", "dash_megatron", *doctor, "training.seed=7", "zero.stage=1"], 2)]
    assert main([*doctor, "--processes", "2", "zero.stage=9"]) == main([*doctor, "--processes", "0"]) == 2
    assert len(started) == 1


def test_an_error_that_all_processes_have_is_told_by_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # whoever waits for rank 0 is ended by its launcher, and here looks past it
    monkeypatch.setattr("dash_megatron.ranks.OTHERS_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("dash_megatron.ranks.signal.signal", lambda *_: None)
    waited: list[float] = []
    monkeypatch.setattr("dash_megatron.ranks.time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["doctor", "--config", str(tmp_path / "none.yaml")]) == 2
        assert capsys.readouterr().err.startswith("error: --config")
        assert waited == ([] if rank == "0" else [0.0, 1.0])
