"""The studies that were measured, against the configs in their archives."""

import tarfile
from pathlib import Path

import pytest

from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from dash_megatron.studies.submit import check_same

ROOT = Path(__file__).parents[2]
QUALITY = ROOT / "docs" / "results" / "quality"


@pytest.mark.parametrize("name", ["choices_8k", "quality_16k", "retrieval_16k", "scaling_8k", "steps_131k"])
def test_studies_say_what_their_archived_runs_were_trained_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = QUALITY if name == "steps_131k" else ROOT / "studies"
    monkeypatch.chdir(ROOT)
    runs = expand(load_study(folder / f"{name}.yaml"))
    monkeypatch.chdir(tmp_path)
    with tarfile.open(QUALITY / f"{name}.tar.xz") as archive:
        configs = [member for member in archive if Path(member.name).name == "config.yaml"]
        archive.extractall(Path("runs", "studies"), configs, filter="data")
    archived = [run for run in runs if (run.folder / "config.yaml").is_file()]
    assert len(archived) == len(configs) > 0
    for run in archived:
        check_same(run)
