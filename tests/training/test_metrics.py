"""metrics.jsonl across restarts and kills."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from dash_megatron import json_lines
from dash_megatron.training.metrics import MetricsWriter, read_metrics


def line_of(step: int) -> Any:
    return {"step": step, "loss": 1.0 / step, "density_per_layer": [0.5, None], "valid_loss": None}


def test_a_resumed_run_drops_the_lines_of_steps_it_does_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=0)
    for step in (1, 2, 3):
        writer.write(line_of(step))
    writer.close()
    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=2)
    writer.write(line_of(3))
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_resumed_run_tells_which_logged_steps_it_does_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dash_megatron")
    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=0)
    for step in (5, 10, 15):
        writer.write(line_of(step))
    writer.close()
    for resumed in (15, 8):
        MetricsWriter(tmp_path, tensorboard=False, resumed_step=resumed).close()
    assert [record.getMessage() for record in caplog.records] == [
        "steps 9 to 15, at least, were taken before and not saved: done again"
    ]


def test_lines_that_are_kept_are_not_made_anew_and_reach_the_disk_before_the_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line_of(step)) + "\n" for step in (1, 2, 3)))
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(json_lines, "strict_json", lambda _: pytest.fail("a line is made anew"))
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(str(new)), replace(old, new)))
    MetricsWriter(tmp_path, tensorboard=False, resumed_step=3).close()
    assert done == []  # nothing is dropped, and nothing written
    MetricsWriter(tmp_path, tensorboard=False, resumed_step=2).close()
    assert done == [f"{path}.tmp", str(path)]


def test_a_run_that_begins_anew_keeps_the_lines_it_had_beside(tmp_path: Path) -> None:
    for steps in ((1, 2), (3,)):
        writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=0)
        for step in steps:
            writer.write(line_of(step))
        writer.close()
    MetricsWriter(tmp_path, tensorboard=False, resumed_step=0).close()
    assert read_metrics(tmp_path) == []
    earlier = (tmp_path / "metrics.jsonl.earlier").read_text().splitlines()
    assert [json.loads(line) for line in earlier] == [line_of(step) for step in (1, 2, 3)]


def test_a_cut_last_line_is_skipped_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line_of(1)) + "\n" + json.dumps(line_of(2))[:9])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    path.write_text(json.dumps(line_of(1)) + "\n" + json.dumps(line_of(2)))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert not caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2}',
        b'{"step": true, "loss": 1, "valid_loss": null}',
        b"{broken",
        b'{"step": 1}{"step": 2}',
        b"12",
        b"\xff\xfe",
        b'{"step": 2, "loss": 1, "valid_loss": null, "\xed\xa0\x80": 0}',
        b"\0\0\0",
        b"[" * 9999,
    ],
)
def test_a_damaged_line_is_set_aside_and_told_and_blocks_nothing(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    one, two = (json.dumps(line_of(step)).encode() for step in (1, 2))
    path.write_bytes(b"\n".join([one, damage, two, b""]))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert "1 damaged line(s) skipped, the first of them line 2" in caplog.text

    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=2)
    writer.write(line_of(3))
    writer.close()
    assert "moved to metrics.jsonl.damaged" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"
    caplog.clear()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert not caplog.text


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_for_readers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # of an older release
    path.write_text(json.dumps(line_of(1) | {"grad_norm": math.inf}) + "\n")
    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=1)
    writer.write(line_of(2) | {"loss": math.nan, "grad_norm": -math.inf, "density_per_layer": [math.nan]})
    writer.write(line_of(3) | {"grad_norm": 0.5})
    writer.close()
    first, second, third = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert (
        first["grad_norm"] is second["loss"] is second["grad_norm"] is second["density_per_layer"][0] is None
    )
    assert third["grad_norm"] == 0.5
    read = read_metrics(tmp_path)
    assert math.isnan(read[1]["loss"])
    assert math.isnan(read[0]["grad_norm"])
    assert math.isnan(read[1]["grad_norm"])
    assert (read[0]["loss"], read[0]["valid_loss"], read[2]["grad_norm"]) == (1.0, None, 0.5)


def test_tensorboard_gets_scalars_of_steps_and_layers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True, resumed_step=0)
    writer.write(
        line_of(1)
        | {
            "valid_loss_by_position": [{"from": 0, "to": 64, "loss": 2.5}],
            "tasks": {"copy": {"128": {"score": 0.25, "nll": 3.5}}},
        }
    )
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    by_position = "valid_loss_by_position/000000_to_000064"
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "density_per_layer/layer_00",
        by_position,
        "tasks/copy/128",
        "tasks_nll/copy/128",
    }
    assert [event.value for event in events.Scalars("tasks/copy/128")] == [0.25]
    assert [(event.step, event.value) for event in events.Scalars(by_position)] == [(1, 2.5)]
