"""The page on branches of one dense base, against the summary of its runs and their losses by document."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import pytest

QUALITY = Path(__file__).parents[2] / "docs" / "results" / "quality"
FOLDER = QUALITY / "branches_16k"
LIMIT = 100_000
RUNS = json.loads((FOLDER / "summary.json").read_text())["runs"]
PIECES = list(csv.DictReader((FOLDER / "documents.csv").open()))
ROWS = [line for line in (QUALITY / "branches_16k.md").read_text().splitlines() if line.startswith("| `")]
TASKS = ("niah_single", "niah_multikey", "associative_recall")


def _full(run: str) -> str:
    """Full attention of the same shape and order of the data."""
    arm, at, order = run.partition("@")
    return ("full128" if arm.endswith("128") else "full") + at + order


def _training_loss(run: str) -> float:
    curve = RUNS[run]["curve"]
    batches = [loss for step, loss in zip(curve["step"], curve["loss"], strict=True) if step > 600]
    assert len(batches) == 10
    return fmean(batches)


def _valid_loss(run: str) -> float:
    return float(RUNS[run]["evaluations"]["step_800"]["perplexity"]["16384"]["nll"])


def _loss_of(run: str, pieces: list[dict[str, str]]) -> float:
    return sum(float(x[run]) * int(x["tokens"]) for x in pieces) / sum(int(x["tokens"]) for x in pieces)


def _unseen_loss(run: str) -> float:
    harder = [x for x in PIECES if fmean(float(x[full]) for full in ("full", "full@2", "full@3")) >= 1.3]
    assert len(harder) == 127
    return _loss_of(run, harder)


def _to_full(loss: Callable[[str], float], runs: list[str]) -> str:
    """Mean difference to full attention in percent, and its standard error over orders."""
    percent = [100 * (loss(run) / loss(_full(run)) - 1) for run in runs]
    error = f" ± {stdev(percent) / len(percent) ** 0.5:.2f}" if len(percent) > 1 else ""
    return f"{fmean(percent):+.2f}{error}"


def _visited(runs: list[str], tile: int) -> str:
    """Chunks that tiles of so many tokens visit, over the selected ones, as a mean over orders."""
    routings = [RUNS[run]["routing"] for run in runs]
    return f"{fmean(sum(x[f'visited_{tile}']) / sum(x['selected']) for x in routings):.2f}"


def _scores(runs: list[str], task: str) -> str:
    by_run = [RUNS[run]["evaluations"]["step_800"][task] for run in runs]
    return " ".join(
        f"{fmean(x[length]['score'] for x in by_run):.2f}" for length in ("4096", "8192", "16384")
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("`")[1])
def test_the_table_is_what_the_runs_came_to(row: str) -> None:
    arm, _, *cells = (cell.strip(" `") for cell in row.strip("|").split("|"))
    runs = sorted(run for run in RUNS if run.partition("@")[0] == arm)
    is_full = _full(runs[0]) == runs[0]
    assert cells == [
        str(len(runs)),
        "1" if is_full else f"{fmean(RUNS[run]['results']['density'] for run in runs):.3f}",
        "" if is_full else _to_full(_training_loss, runs),
        "" if is_full else _to_full(_unseen_loss, runs),
        " ".join(f"{_valid_loss(run):.3f}" for run in runs),
        "" if is_full else _to_full(_valid_loss, runs),
        f"{fmean(RUNS[run]['results']['tokens_per_second'] for run in runs) / 1000:.0f}K",
        ", ".join(_visited(runs, tile) for tile in (8, 32)) if "routing" in RUNS[runs[0]] else "",
        *(_scores(runs, task) for task in TASKS),
    ]


def test_the_table_has_every_run() -> None:
    assert {row.split("`")[1] for row in ROWS} == {run.partition("@")[0] for run in RUNS}


def test_losses_by_document_come_to_the_validation_loss() -> None:
    assert list(PIECES[0])[3:] == list(RUNS)
    for run in RUNS:
        assert _loss_of(run, PIECES) == pytest.approx(_valid_loss(run), abs=1e-4)


def test_files_are_small() -> None:
    assert all(path.stat().st_size <= LIMIT for path in FOLDER.iterdir())
