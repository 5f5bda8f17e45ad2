"""The page on routers with projections of their own against the losses and answers beside it."""

import csv
from pathlib import Path

import pytest

from dash_megatron.studies.paired import Comparison, Measured, Ratio, compare
from docs.tools.branch_pictures import QUALITY

PAGE = (QUALITY / "branches_router.md").read_text()
PAIRS = [("a.recipe", "a.full"), ("a.own", "a.full"), ("b.own", "b.full"), ("b.own@2", "b.full@2")]


def _read(name: str) -> list[dict[str, str]]:
    with Path(QUALITY / "branches_router" / name).open() as file:
        return list(csv.DictReader(file))


PIECES = _read("documents.csv")


def _losses(run: str, first: bool = False, each_piece: bool = False) -> Measured:
    """By document, or by piece; of the first pieces alone or of all."""
    found: dict[tuple[str, ...], tuple[float, float]] = {}
    for row in PIECES:
        item = (row["document"], row["piece"]) if each_piece else (row["document"],)
        if row["piece"] == "0" or not first:
            loss, size = found.get(item, (0.0, 0.0))
            tokens = int(row["tokens"])
            found[item] = loss + float(row[run]) * tokens, size + tokens
    return found


def _compared(arms: list[str], references: list[str], first: bool = False, each_piece: bool = False) -> Comparison:  # fmt: skip
    sides = (
        {n: _losses(run, first, each_piece) for n, run in enumerate(runs)} for runs in (arms, references)
    )
    found = compare(*sides)
    assert found is not None
    return found


def _percent(found: Ratio | None) -> str:
    assert found is not None
    errors = [error for error in (found.error_items, found.error_orders) if error is not None]
    return f"{100 * found.value:+.2f}" + "".join(f" ± {100 * error:.2f}" for error in errors)


def _named(run: str) -> str:
    study, arm = run.removesuffix("@2").split(".")
    return f"{study}, {arm}" + (", order 2" if run.endswith("@2") else "")


def held_out_line(arm: str, reference: str) -> str:
    whole, first = (_compared([arm], [reference], first) for first in (False, True))
    pieces = _compared([arm], [reference], each_piece=True)
    assert whole.relative is not None
    assert pieces.relative is not None
    cells = [
        _named(arm),
        f"{100 * whole.relative.value:+.2f}",
        *(f"{100 * (found.error_items or 0):.2f}" for found in (pieces.relative, whole.relative)),
        _percent(whole.median),
        _percent(first.relative),
        _percent(first.median),
    ]
    return f"| {' | '.join(cells)} |"


def training_line(run: str) -> str:
    reference = f"{run[0]}.full" + ("@2" if run.endswith("@2") else "")
    quarters = [
        compare(*({0: {(row["step"],): (float(row[of]), 1.0) for row in rows}} for of in (run, reference)))
        for begin in (0, 100, 200, 300)
        for rows in [[row for row in _read("training.csv") if begin < int(row["step"]) <= begin + 100]]
    ]
    found = [each.relative for each in quarters if each is not None and each.relative is not None]
    cells = [_named(run), *(f"{100 * each.value:+.2f}" for each in found)]
    return f"| {' | '.join(cells)} | {100 * (found[-1].error_items or 0):.2f} |"


def answers_line(run: str) -> str:
    tasks = ("niah_single", "niah_multikey", "associative_recall")
    scores = {row["task"]: float(row["score"]) for row in _read("answers.csv") if row["run"] == run}
    return f"| {_named(run)} | {' | '.join(f'{scores[task]:.2f}' for task in tasks)} |"


@pytest.mark.parametrize(("arm", "reference"), PAIRS)
def test_losses_are_those_of_the_documents(arm: str, reference: str) -> None:
    assert held_out_line(arm, reference) in PAGE


def test_both_orders_together_and_the_two_arms_against_each_other() -> None:
    runs = ["b.own", "b.own@2"], ["b.full", "b.full@2"]
    for first in (False, True):
        found = _compared(*runs, first)
        assert f"{_percent(found.relative)}%" in PAGE
        assert f"{_percent(found.median)}%" in PAGE
    assert f"{_percent(_compared(['a.own'], ['a.recipe'], first=True).relative)} points" in PAGE


def test_one_document_makes_the_totals() -> None:
    tokens = sum(int(row["tokens"]) for row in PIECES)
    largest = [row for row in PIECES if row["document"] == "24"]
    share = sum(int(row["tokens"]) for row in largest) / tokens
    assert f"has {len(largest)} of {len(PIECES)} pieces and {share:.0%} of the\n  tokens" in PAGE
    points, pieces = [], []
    for arm, reference in PAIRS[1:]:
        total = sum(float(row[reference]) * int(row["tokens"]) for row in PIECES)
        lost = sum((float(row[arm]) - float(row[reference])) * int(row["tokens"]) for row in largest)
        points.append(f"{100 * lost / total:+.2f}")
        pieces += [float(row[arm]) / float(row[reference]) - 1 for row in largest]
    assert f"{points[0]}, {points[1]} and {points[2]} points\n" in PAGE
    assert f"differ by {min(pieces):.0%} to {max(pieces):+.0%}" in PAGE


@pytest.mark.parametrize(
    "run", [name for name in _read("training.csv")[0] if "." in name and "full" not in name]
)
def test_training_losses_are_those_of_the_steps(run: str) -> None:
    assert training_line(run) in PAGE


@pytest.mark.parametrize("run", dict.fromkeys(row["run"] for row in _read("answers.csv")))
def test_answers_are_those_of_the_runs(run: str) -> None:
    assert answers_line(run) in PAGE
