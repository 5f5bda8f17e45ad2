"""The pages on branches judged on held-out documents, and their pictures, against the summaries of the runs."""

import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

from dash_megatron.studies.paired import compare
from docs.tools.branch_pictures import BARS, QUALITY, STUDIES, Difference, Study, main
from tests.docs.branches import read_answers

ANSWERS = read_answers()
PAGES = {name: (QUALITY / f"{name}.md").read_text() for name in STUDIES}
ROWS = [(name, line) for name in STUDIES for line in PAGES[name].splitlines() if line.startswith("| `")]
READ = {name: Study.read(name) for name in STUDIES}
FACTORS = READ["branches_factors"]
TASKS = ("niah_single", "niah_multikey", "associative_recall")


def _compared(study: Study, arm: str) -> bool:
    return study.full(study.orders(arm)[0]) not in {None, study.orders(arm)[0]}


def _error(values: tuple[float, ...]) -> str:
    return f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""


def _training(study: Study, arm: str) -> str:
    found = study.difference(arm, "train_loss").by_order
    return f"{fmean(found):+.2f}{_error(found)}"


def _to_full(study: Study, arm: str) -> str:
    found = study.difference(arm)
    return f"{found.mean:+.2f} ± {found.documents:.2f}{_error(found.by_order)}"


def _scores(study: Study, arm: str, task: str) -> str:
    runs = [study.runs[run]["tasks"][task] for run in study.orders(arm)]
    lengths = ("16384",) if arm.startswith("h.") else tuple(runs[0])
    return " ".join(f"{fmean(run[length][0] for run in runs):.2f}" for length in lengths)


def _answers(study: Study, arm: str) -> str:
    runs = [study.runs[run]["tasks"] for run in study.orders(arm)]
    return f"{fmean(run[task]['16384'][1] for run in runs for task in TASKS):.2f}"


def _visited(study: Study, arm: str) -> str:
    routings = [study.runs[run].get("routing") for run in study.orders(arm)]
    return ", ".join(
        f"{fmean(sum(x[f'visited_{tile}']) / sum(x['selected']) for x in routings):.2f}" for tile in (8, 32)
        if routings[0]
    )  # fmt: skip


def cells(study: Study, arm: str) -> list[str]:
    """What the table has to say of an arm, after its name and its description."""
    runs = [study.runs[run] for run in study.orders(arm)]
    compared, judged = _compared(study, arm), "tasks" in runs[0]
    return [
        str(len(runs)),
        f"{fmean(run.get('density', 1) for run in runs):.3f}",
        f"{fmean(run['valid_loss'] for run in runs):.4f}",
        _to_full(study, arm) if compared else "",
        _training(study, arm) if compared else "",
        f"{fmean(run['tokens_per_second'] for run in runs) / 1000:.0f}K",
        _visited(study, arm),
        *(_scores(study, arm, task) if judged else "" for task in TASKS),
        _answers(study, arm) if judged else "",
    ]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=lambda x: x.split("`")[1] if "`" in x else x)
def test_the_tables_are_what_the_runs_came_to(name: str, row: str) -> None:
    arm, _, *found = (cell.strip(" `") for cell in row.strip("|").split("|"))
    assert found == cells(READ[name], arm)


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_have_every_run(name: str) -> None:
    arms = {run.partition("@")[0] for run in READ[name].runs}
    assert {row.split("`")[1] for study, row in ROWS if study == name} == arms


@pytest.mark.parametrize("study", READ.values(), ids=STUDIES)
def test_losses_by_document_come_to_the_loss_of_the_run(study: Study) -> None:
    for run in list(study.pieces[0])[3:]:
        losses = [(float(x[run]), int(x["tokens"])) for x in study.pieces]
        mean = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
        assert mean == pytest.approx(study.runs[run]["valid_loss"], abs=1e-4)


@pytest.mark.parametrize("label", BARS)
def test_the_page_of_answers_has_the_differences_of_the_picture(label: str) -> None:
    pairs = zip(READ.values(), BARS[label], strict=True)
    found = Difference.pooled([study.difference(arm) for study, arm in pairs if arm])
    error = found.documents if found.orders is None else found.orders
    assert f"{found.mean:+.2f} ± {error:.2f}%" in ANSWERS


@pytest.mark.parametrize("name", STUDIES)
def test_positions_are_those_of_the_table(name: str) -> None:
    table = re.findall(r"^\| ([\w.-]+) \| (\d) \| ([+-].*) \|$", PAGES[name], re.MULTILINE)
    assert len(table) >= 7
    for arm, orders, columns in table:
        by_order = READ[name].by_position(arm)
        assert [f"{fmean(x):+.2f}{_error(x)}" for x in by_order] == columns.split(" | ")
        assert len(by_order[0]) == int(orders)


def test_arms_are_compared_with_the_recipe_by_document() -> None:
    table = re.findall(
        r"^\| (h\.[\w-]+) \| [^|]* \| ([^|]*) \| ([^|]*) \|$", PAGES["branches_factors"], re.MULTILINE
    )
    assert len(table) == 9
    for arm, difference, densities in table:
        found, density = FACTORS.paired(arm, "h.k25"), FACTORS.runs[arm]["routing"]["mean_by_position"]
        assert difference == f"{found.mean:+.2f} ± {found.documents:.2f}"
        assert densities == " ".join(f"{density[place]:.2f}" for place in (1, 2, 5))


def _median(name: str, arm: str, reference: str = "full") -> str:
    study = READ[name]
    sides = [
        {
            n: {(m,): (float(piece[run]) * float(piece["tokens"]), float(piece["tokens"])) for m, piece in enumerate(study.pieces)}
            for n, run in enumerate(study.orders(each))
        }
        for each in (arm, reference)
    ]  # fmt: skip
    found = compare(*sides)
    assert found is not None
    assert found.median is not None
    return f"{100 * found.median.value:+.2f} ± {100 * (found.median.error or 0):.2f}"


def test_medians_over_pieces_are_those_of_the_answers() -> None:
    first, second = STUDIES
    for name, arm in (
        (first, "p25-g-l-sh"),
        (second, "k25"),
        (first, "p11-g-l-sh"),
        (second, "k11"),
        (first, "inf25"),
    ):
        assert f"{_median(name, arm)}%" in ANSWERS, (name, arm)
    assert f"({_median(first, 'inf25', 'p25-g-l-sh')} points)" in ANSWERS


def test_factors_are_those_of_the_table() -> None:
    table = re.findall(
        r"^\| ([\w.]+) \| [^|]* \| (\S+) to (\S+) \| (\S+) \| (\S+) \|$",
        PAGES["branches_factors"],
        re.MULTILINE,
    )
    assert len(table) == 6
    for arm, *found in table:
        runs = [FACTORS.runs[run] for run in FACTORS.orders(arm)]
        logs = [x for run in runs for layer in run["log_factors"] for x in layer]
        lowest = min(low + mean for run in runs for _, low, _, mean, _ in run["factor_path"])
        scaling = fmean(run["scaling_factor_per_layer"][0] for run in runs)
        assert found == [f"{min(logs):+.1f}", f"{max(logs):+.1f}", f"{lowest:+.1f}", f"{scaling:.2g}"]


@pytest.mark.parametrize("arm", ["k25", "k11", "scd.k25"])
def test_shares_of_right_answers_are_those_of_the_page(arm: str) -> None:
    shares = [FACTORS.share(arm, task) for task in TASKS]
    cells = " | ".join(f"{share:.2f} ± {error:.2f}" for share, error in shares)
    assert f"| {arm} | {cells} |" in PAGES["branches_factors"]


def test_pictures_are_drawn_into_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    main(["--output", str(folder)])
    assert {path.name for path in folder.iterdir()} == {"quality_losses.png", "quality_position.png"}
    assert all(path.stat().st_size > 10_000 for path in folder.iterdir())
