"""The page on 210M parameters against what `study collect` wrote, and the study file that made it."""

import csv
from pathlib import Path
from statistics import fmean

import pytest

from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY

FOLDER = QUALITY / "branches_210m"
PAGE = (QUALITY / "branches_210m.md").read_text()


def _read(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open() as file:
        return list(csv.DictReader(file))


FOUND = [row for row in _read("comparisons.csv") if row["arm"] == "dash_25"]


def _errors(row: dict[str, str], scale: int = 1, of: str = "relative") -> str:
    return "".join(f" ± {scale * float(row[f'{of}_error_{over}']):.2f}" for over in ("items", "orders"))


def _percent(row: dict[str, str], of: str) -> str:
    return f"{100 * float(row[of]):+.2f}{_errors(row, 100, of)}"


def _line(row: dict[str, str]) -> str:
    values = [f"{float(row[name]):.4f}" for name in ("reference_value", "value")]
    relative = float(row["relative"])
    if row["task"] == "documents":
        name = f"{row['from']}-{row['to']}" if row["to"] else "all"
        difference = _percent(row, "relative")
    else:
        name, difference = f"{row['task']}, {row['length']}", f"{1 + relative:.2f}" + _errors(row)
    beyond = "no" if row["verdict"] == "within" else "yes"
    return f"| {' | '.join([name, *values, difference, beyond])} |"


@pytest.mark.parametrize(
    "row",
    [row for row in FOUND if row["evaluation"] != "training"],
    ids=lambda row: f"{row['task']}-{row['to']}",
)
def test_tables_are_what_was_collected(row: dict[str, str]) -> None:
    assert _line(row) in PAGE


def test_the_text_has_the_figures_of_the_files() -> None:
    training = next(row for row in FOUND if row["task"] == "loss")
    assert f"{_percent(training, 'relative')}%" in PAGE
    whole = next(row for row in FOUND if row["task"] == "documents" and not row["to"])
    assert f"the median document stands at {_percent(whole, 'median')}%" in PAGE
    answers = [row for row in _read("answers.csv") if row["length"] == "16384"]
    assert len(answers) == 18
    for kind in ("full", "dash"):
        assert f"{fmean(float(row['nats']) for row in answers if row['run'].startswith(kind)):.2f}" in PAGE
    runs = {
        kind: [row for row in _read("results.csv") if row["variant"] == kind and row["base"]]
        for kind in ("full", "dash_25")
    }
    speeds = [fmean(float(row["tokens_per_second"]) for row in found) for found in runs.values()]
    assert (
        f"{speeds[1] / speeds[0]:.2f} times as fast ({speeds[1] / 1000:.1f}K against {speeds[0] / 1000:.1f}K"
        in PAGE
    )
    for found in runs.values():
        assert f"{float(found[0]['gpu_memory_gib']):.1f}" in PAGE


def test_the_study_file_makes_the_runs_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    names = {run.name for run in expand(load_study(FOLDER / "study.yaml"))}
    assert names == {row["run"] for row in _read("results.csv")}
