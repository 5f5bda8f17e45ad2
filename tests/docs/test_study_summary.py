"""The summary of a study: what its runs share and what not, and what they came to."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.tools import study_summary


def _line(step: int, valid_loss: float | None = None) -> dict[str, Any]:
    return {
        "step": step, "loss": 10.0 - step, "valid_loss": valid_loss, "tasks": None, "tokens": 100 * step, "density": 0.25,
        "density_per_layer": [0.2, None], "scaling_factor_per_layer": [1.23456789, None], "tokens_per_second": 10.0 * step,
        "gpu_memory_gib": 1.0 + step, "skipped": 0,
        "valid_loss_by_position": valid_loss and [{"from": 0, "to": 64, "loss": 3.0}],
    }  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name, kind in (("full", "full"), ("dash", "dash")):
        run = tmp_path / "runs" / name
        evaluation = run / "evaluation" / "tasks"
        evaluation.mkdir(parents=True)
        config = {"run_dir": name, "attention": {"kind": kind, "chunk_size": 64}, "zero": {"options": {}}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [_line(step) for step in range(1, 200)] + [_line(200, 2.5)]
        lines[1]["loss"] = None  # of a step whose update was skipped
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        # of an evaluation with other settings before, whose answers were generated
        (evaluation / "niah_single.jsonl").write_text(json.dumps({"length": 4096, "score": 0.0}) + "\n")
        tasks = {
            "documents": {"64": {"documents": 3, "nll": 2.0, "buckets": [{"to": 64, "nll": 2.5}]}},
            "niah_single": {"4096": {"samples": 2, "score": 0.5, "standard_error": 0.5, "nll": 1.0}},
            "copy": {"64": {"samples": 4, "score": 0.123456}},
        }
        (evaluation / "results.json").write_text(json.dumps({"tasks": tasks}))
    (tmp_path / "runs" / "failed").mkdir()
    return tmp_path


def test_a_summary_gives_back_configs_and_holds_means(study: Path, tmp_path: Path) -> None:
    output = tmp_path / "study.json"
    study_summary.main([str(study), "--output", str(output)])
    summary = json.loads(output.read_text())
    assert summary["config"] == {"attention.chunk_size": 64, "zero.options": {}}
    for name in ("full", "dash"):
        config = yaml.safe_load((study / "runs" / name / "config.yaml").read_text())
        assert study_summary.config_of(summary, name) == config
    run = summary["runs"]["dash"]
    assert run["results"] | {"loss": -180.5, "valid_loss": 2.5, "tokens_per_second": 1005.0} == run["results"]
    assert run["results"]["scaling_factor_per_layer"] == [1.2346, None]
    assert run["results"]["gpu_memory_gib"] == 201.0
    assert len(run["curve"]["step"]) == study_summary.CURVE_POINTS
    assert run["curve"]["step"][:2] == [3, 7]
    assert run["curve"]["loss"][:2] == [8.0, 4.5]
    assert run["validations"] == [{"step": 200, "loss": 2.5, "loss_by_position": {"64": 3.0}}]
    assert run["evaluations"] == {
        "tasks": {
            "documents": {"64": {"samples": 3, "nll": 2.0, "nll_by_position": {"64": 2.5}}},
            "niah_single": {"4096": {"samples": 2, "score": 0.5, "nll": 1.0}},
            "copy": {"64": {"samples": 4, "score": 0.12346, "nll": None}},
        }
    }


def test_what_cannot_be_summarized_is_told(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(study / "study.json")]
    (study / "runs" / "unlogged").mkdir()
    (study / "empty" / "runs").mkdir(parents=True)
    for folders, message in (
        ([study, study], "two of the folders have a run dash; make a summary of each"),
        ([study / "empty"], "no run in the folders' `runs` has logged a step; give the `output` of a study"),
        ([study / "none"], f"No such file or directory: {study / 'none' / 'runs'}"),
    ):
        with pytest.raises(SystemExit):
            study_summary.main([*map(str, folders), *output])
        assert message in capsys.readouterr().err
