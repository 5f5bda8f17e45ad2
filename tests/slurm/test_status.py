"""The table of runs, from what runs leave in their folders; without SLURM unless a test fakes its queue."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import status  # of slurm/, see conftest.py

EVENTS = [("submitted", "0", "x.sbatch"), ("started", "0", "on a"), ("requeued", "0", "saved"), ("started", "1", "on a")]  # fmt: skip


def make_run(folder: Path, events: list[tuple[str, str, str]] = EVENTS, job: str = "7") -> Path:
    """A run of 100 steps of 1000 tokens at 500 tokens/s, that has done 20, the first of them with smaller batches."""
    for name in ("slurm", "checkpoints/step_00000015", "checkpoints/step_00000025.partial"):
        (folder / name).mkdir(parents=True)
    lines = [
        f"2026-01-01T00:00:00Z\t{job}\t{restart}\t{name}\t{detail}\n" for name, restart, detail in events
    ]
    (folder / "slurm/events.tsv").write_text("".join(lines))
    (folder / "config.yaml").write_text("training: {steps: 100, global_batch: 10}\ndata: {seq_length: 100}\n")
    metrics = [
        {"step": step, "loss": 40.0 / step, "tokens": 400 * step, "tokens_per_second": 500.0}
        for step in (19, 20)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(text + '{"step": 21, "lo')
    return folder


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    assert status.main(list(arguments)) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def queue_of(monkeypatch: pytest.MonkeyPatch, **jobs: tuple[str, str]) -> None:
    queue = {name.removeprefix("job"): job for name, job in jobs.items()}
    monkeypatch.setattr(status, "read_queue", lambda: queue)
    monkeypatch.setattr(status, "state_in_accounting", lambda job: None)


def test_a_line_says_state_step_loss_speed_time_left_checkpoint_and_restarts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue_of(monkeypatch, job7=("RUNNING", "None"))
    run = make_run(tmp_path / "study" / "run")
    (tmp_path / "study" / "no_run").mkdir()
    logged = time.time() - 1500
    os.utime(run / "metrics.jsonl", (logged, logged))
    header, line = rows(capsys, str(tmp_path / "study"))
    assert header[:5] == ["run", "job", "state", "step", "loss"]
    # 80 steps of 1000 tokens at 500 a second
    assert line[1:7] == ["7", "RUNNING", "20/100", "2.0000", "500", "0:02:40"]
    # it hangs, or its machines do
    assert line[7].startswith("0:25:0")
    assert line[8] == "15,"
    assert line[-1] == "1"


@pytest.mark.parametrize(
    ("last", "job", "expected"),
    [
        (None, ("PENDING", "Resources"), ["PENDING", "Resources"]),
        (("done", "1", "x"), None, ["DONE"]),
        (("done", "1", "x"), ("COMPLETED", "None"), ["DONE"]),
        (("stopped", "1", "error: wrong"), ("FAILED", "NonZeroExitCode"), ["STOPPED", "error:", "wrong"]),
        (("ended", "1", "x"), ("CANCELLED", "None"), ["CANCELLED"]),
        # SLURM has forgotten it, and keeps no accounts
        (None, None, ["GONE"]),
    ],
)
def test_the_state_is_that_of_the_queue_while_a_job_is_in_it_and_then_what_its_script_said(
    last: tuple[str, str, str] | None,
    job: tuple[str, str] | None,
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    queue_of(monkeypatch, **({"job7": job} if job else {}))
    run = make_run(tmp_path / "run", [*EVENTS, *([last] if last else [])])
    _, line = rows(capsys, str(run))
    assert line[2] == expected[0]
    assert line[2:][-len(expected) + 1 :] == expected[1:] or len(expected) == 1


def test_a_job_that_waits_for_the_one_before_shows_when_that_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue_of(monkeypatch, job7=("COMPLETED", "None"), job8=("PENDING", "Dependency"))
    run = make_run(tmp_path / "run", [EVENTS[0], ("done", "0", "x")])
    history = run / "slurm/events.tsv"
    submitted, done = history.read_text().splitlines(keepends=True)
    history.write_text(submitted + submitted.replace("\t7\t", "\t8\t") + done)
    _, line = rows(capsys, str(run))
    assert line[1:3] == ["8", "PENDING"]


def test_a_run_that_was_only_submitted_has_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue_of(monkeypatch, job7=("PENDING", "Priority"))
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/events.tsv").write_text("2026-01-01T00:00:00Z\t7\t0\tsubmitted\tx\n")
    (tmp_path / "run/slurm/1.yaml").write_text(
        "training: {steps: 9, global_batch: 1}\ndata: {seq_length: 8}\n"
    )
    _, line = rows(capsys, str(tmp_path))
    assert line[1:] == ["7", "PENDING", "0/9", "-", "-", "-", "-", "-", "0", "Priority"]


def test_runs_of_studies_below_runs_have_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue_of(monkeypatch)
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path("runs") / name) for name in ("alone", "studies/small/runs/dash")]
    _, *lines = rows(capsys)
    assert [line[0] for line in lines] == list(map(str, runs))


def test_folders_that_do_not_exist_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert status.main([str(tmp_path / "nothing")]) == 2
    assert "nothing: no such folder" in capsys.readouterr().err
    assert status.main([str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_a_missing_folder_hides_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue_of(monkeypatch)
    run = make_run(tmp_path / "good")
    assert status.main([str(run), str(tmp_path / "bad")]) == 2
    told = capsys.readouterr()
    assert "bad: no such folder" in told.err
    assert str(run) in told.out
