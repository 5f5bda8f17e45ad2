"""The studies that were measured, against the summaries of their runs in docs/results/quality."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from dash_megatron.studies.submit import check_same
from docs.tools.study_summary import config_of

ROOT = Path(__file__).parents[2]
QUALITY = ROOT / "docs" / "results" / "quality"
STUDIES = ["choices_8k", "quality_16k", "retrieval_16k", "scaling_8k", "steps_131k"]
LIMIT = 100_000


def _summary(name: str) -> dict[str, Any]:
    return json.loads((QUALITY / f"{name}.json").read_text())


@pytest.mark.parametrize("name", STUDIES)
def test_studies_say_what_their_measured_runs_were_trained_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = QUALITY if name == "steps_131k" else ROOT / "studies"
    monkeypatch.chdir(ROOT)
    runs = expand(load_study(folder / f"{name}.yaml"))
    monkeypatch.chdir(tmp_path)
    summary = _summary(name)
    for run in summary["runs"]:
        path = Path("runs", "studies", name, "runs", run, "config.yaml")
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(config_of(summary, run)))
    measured = [run for run in runs if (run.folder / "config.yaml").is_file()]
    assert len(measured) == len(summary["runs"]) > 0
    for run in measured:
        check_same(run)


@pytest.mark.parametrize("name", [*STUDIES, "older_runs", "branches_16k/summary"])
def test_summaries_are_small_and_their_curves_end_at_the_last_step(name: str) -> None:
    assert (QUALITY / f"{name}.json").stat().st_size <= LIMIT
    for run in _summary(name)["runs"].values():
        curve = run["curve"]
        assert len(curve["step"]) == len(curve["loss"]) == len(curve["density"]) <= 60
        assert curve["step"] == sorted(set(curve["step"]))
        assert curve["step"][-1] == run["results"]["step"]
        assert run["validations"][-1]["loss"] == pytest.approx(run["results"]["valid_loss"], abs=1e-4)


def test_no_archives_of_metrics_are_kept_beside_the_summaries() -> None:
    assert not [path.name for path in QUALITY.rglob("*") if path.suffix in (".xz", ".gz")]
