"""metrics.jsonl across restarts and kills."""

import json
from pathlib import Path
from typing import Any

import pytest

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


def test_a_cut_last_line_is_skipped_and_an_earlier_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line_of(1)) + "\n" + json.dumps(line_of(2))[:9])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    path.write_text("{broken\n" + json.dumps(line_of(2)) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:1 is not JSON"):
        read_metrics(tmp_path)


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
