"""The pages on branches judged on held-out documents, and their pictures, against the summary of the runs."""

import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

from docs.tools.branch_pictures import FOLDER, Study, main

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGE = (RESULTS / "quality" / "branches_held_out.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]
STUDY = Study.read()
TASKS = ("niah_single", "niah_multikey", "associative_recall")


def _compared(arm: str) -> bool:
    return STUDY.full(STUDY.orders(arm)[0]) not in {None, STUDY.orders(arm)[0]}


def _error(values: tuple[float, ...]) -> str:
    return f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""


def _training(arm: str) -> str:
    found = STUDY.difference(arm, "train_loss").by_order
    return f"{fmean(found):+.2f}{_error(found)}"


def _to_full(arm: str) -> str:
    found = STUDY.difference(arm)
    return f"{found.mean:+.2f} ± {found.documents:.2f}{_error(found.by_order)}"


def _scores(arm: str, task: str) -> str:
    runs = [STUDY.runs[run]["tasks"][task] for run in STUDY.orders(arm)]
    lengths = ("16384",) if arm.startswith("h.") else tuple(runs[0])
    return " ".join(f"{fmean(run[length][0] for run in runs):.2f}" for length in lengths)


def _answers(arm: str) -> str:
    runs = [STUDY.runs[run]["tasks"] for run in STUDY.orders(arm)]
    return f"{fmean(run[task]['16384'][1] for run in runs for task in TASKS):.2f}"


def _visited(arm: str) -> str:
    routings = [STUDY.runs[run].get("routing") for run in STUDY.orders(arm)]
    return ", ".join(
        f"{fmean(sum(x[f'visited_{tile}']) / sum(x['selected']) for x in routings):.2f}" for tile in (8, 32)
        if routings[0]
    )  # fmt: skip


def cells(arm: str) -> list[str]:
    """What the table has to say of an arm, after its name and its description."""
    runs = [STUDY.runs[run] for run in STUDY.orders(arm)]
    compared, judged = _compared(arm), "tasks" in runs[0]
    return [
        str(len(runs)),
        f"{fmean(run.get('density', 1) for run in runs):.3f}",
        f"{fmean(run['valid_loss'] for run in runs):.4f}",
        _to_full(arm) if compared else "",
        _training(arm) if compared else "",
        f"{fmean(run['tokens_per_second'] for run in runs) / 1000:.0f}K",
        _visited(arm),
        *(_scores(arm, task) if judged else "" for task in TASKS),
        _answers(arm) if judged else "",
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("`")[1])
def test_the_tables_are_what_the_runs_came_to(row: str) -> None:
    arm, _, *found = (cell.strip(" `") for cell in row.strip("|").split("|"))
    assert found == cells(arm)


def test_the_tables_have_every_run() -> None:
    assert {row.split("`")[1] for row in ROWS} == {run.partition("@")[0] for run in STUDY.runs}


def test_losses_by_document_come_to_the_loss_of_the_run() -> None:
    for run in list(STUDY.pieces[0])[3:]:
        losses = [(float(x[run]), int(x["tokens"])) for x in STUDY.pieces]
        mean = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
        assert mean == pytest.approx(STUDY.runs[run]["valid_loss"], abs=1e-4)


def test_the_page_of_answers_has_the_differences_of_the_three_orders() -> None:
    text = (RESULTS / "quality.md").read_text()
    for arm in ("inf25", "p11-g-l-sh", "p25-g-l-sh"):
        found = STUDY.difference(arm)
        assert f"{found.mean:+.2f} ± {found.orders:.2f}%" in text


def test_positions_are_those_of_the_table() -> None:
    table = re.findall(r"^\| ([\w-]+) \| (\d) \| ([+-].*) \|$", PAGE, re.MULTILINE)
    assert len(table) == 7
    for arm, orders, columns in table:
        by_order = STUDY.by_position(arm)
        assert [f"{fmean(x):+.2f}{_error(x)}" for x in by_order] == columns.split(" | ")
        assert len(by_order[0]) == int(orders)


def test_pictures_are_drawn_into_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    main(["--output", str(folder)])
    assert {path.name for path in folder.iterdir()} == {"quality_losses.png", "quality_position.png"}
    assert all(path.stat().st_size > 10_000 for path in folder.iterdir())


def test_files_are_small() -> None:
    assert all(path.stat().st_size <= 100_000 for path in FOLDER.iterdir())
