"""The page on a second base, 11% and 64K against the losses by document, the answers by sample and the training losses beside it."""

import csv
from collections.abc import Callable

import pytest

from dash_megatron.studies.paired import Comparison, Item, Measured, Ratio, compare
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY

FOLDER = QUALITY / "branches_second_base"
PAGE = " ".join((QUALITY / "branches_second_base.md").read_text().split())
ORDERS = (1, 2, 3)
SECOND, BOTH, EXTENDED = ("{}_order{}_from_full_seed7",), ("{}_order{}_from_full", "{}_order{}_from_full_seed7"), ("ext.{}_order{}",)  # fmt: skip
"""Names of runs by arm and order of the data: those on the second base, those on both, and those that were extended."""
Row = dict[str, str]


def _read(name: str) -> list[Row]:
    with (FOLDER / name).open() as file:
        return list(csv.DictReader(file))


DOCUMENTS, EXTENDED_DOCUMENTS, SAMPLES, TRAINING = (
    _read(f"{name}.csv") for name in ("documents", "documents_64k", "samples", "training")
)


def _compared(
    rows: list[Row], names: tuple[str, ...], arm: str, item: str, size: Callable[[Row], float] = lambda row: 1.0,
    reference: str = "full",
) -> Comparison:  # fmt: skip
    def measured(run: str) -> Measured:
        found: dict[Item, tuple[float, float]] = {}
        for row in rows:
            loss, tokens = found.get((row[item],), (0.0, 0.0))
            found[(row[item],)] = loss + float(row[run]) * size(row), tokens + size(row)
        return found

    runs = [(name, order) for name in names for order in ORDERS]
    sides = (
        {n: measured(name.format(each, order)) for n, (name, order) in enumerate(runs)}
        for each in (arm, reference)
    )
    found = compare(*sides)
    assert found is not None
    return found


def _errors(found: Ratio, scale: int = 1) -> str:
    return "".join(f" ± {scale * (error or 0):.2f}" for error in (found.error_items, found.error_orders))


def _percent(found: Comparison) -> str:
    assert found.relative is not None
    return f"{100 * found.relative.value:+.2f}{_errors(found.relative, 100)}"


def _share(task: str, length: int, names: tuple[str, ...], arm: str) -> str:
    rows = [row for row in SAMPLES if (row["task"], row["length"]) == (task, str(length))]
    found = _compared(rows, names, arm, "sample").relative
    assert found is not None
    return f"{1 + found.value:.2f}{_errors(found)}"


def _tokens(row: Row) -> float:
    return float(row["tokens"])


def test_both_bases_together() -> None:
    whole = _percent(_compared(DOCUMENTS, BOTH, "own", "document", _tokens))
    assert f"{whole}% in six pairs on two bases" in PAGE
    shares = [_share(task, 16384, BOTH, "own") for task in ("niah_single", "niah_multikey", "associative_recall")]  # fmt: skip
    assert (
        "{} of full attention's single needles, {} of multi-key ones and {} of recall".format(*shares) in PAGE
    )


@pytest.mark.parametrize(
    ("arm", "counted"), [("own", "98 to 102 of 124 are"), ("own11", "At 11% 62 to 70 are")]
)
def test_how_many_documents_are_below_full_attention(arm: str, counted: str) -> None:
    below = [
        sum(float(row[SECOND[0].format(arm, order)]) < float(row[SECOND[0].format("full", order)]) for row in DOCUMENTS)
        for order in ORDERS
    ]  # fmt: skip
    assert f"{min(below)} to {max(below)} " in counted
    assert counted in PAGE


def test_11_against_25_percent() -> None:
    found = _percent(_compared(DOCUMENTS, SECOND, "own11", "document", _tokens, "own"))
    assert f"It costs {found}% over 25%" in PAGE


@pytest.mark.parametrize(
    ("name", "begins"),
    [("all", "0 16384 32768"), ("0-16384", "0"), ("16384-32768", "16384"), ("32768-65536", "32768"), ("16384-65536", "16384 32768")],
)  # fmt: skip
def test_the_table_of_64k_is_what_the_documents_came_to(name: str, begins: str) -> None:
    rows = [row for row in EXTENDED_DOCUMENTS if row["from"] in begins.split()]
    own, own11 = (_compared(rows, EXTENDED, arm, "document", _tokens) for arm in ("own", "own11"))
    cells = [name, str(own.items), f"{own.reference:.4f}", _percent(own), _percent(own11)]
    assert f"| {' | '.join(cells)} |" in PAGE


def test_the_median_documents_of_64k() -> None:
    medians = [
        _compared(EXTENDED_DOCUMENTS, EXTENDED, arm, "document", _tokens).median for arm in ("own", "own11")
    ]
    own, own11 = (f"{100 * each.value:+.2f}{_errors(each, 100)}%" for each in medians if each)
    assert f"in the median document they have {own} and {own11}" in PAGE


def _found(arm: str, length: int, nearest: float, furthest: float) -> str:
    names = SECOND if length == 16384 else EXTENDED
    right = [
        float(row[names[0].format(arm, order)])
        for row in SAMPLES
        if row["task"] == "niah_single" and int(row["length"]) == length
        and nearest <= (1 - float(row["place"])) * int(row["tokens"]) < furthest
        for order in ORDERS
    ]  # fmt: skip
    return f"{sum(right):.0f} of {len(right)}"


@pytest.mark.parametrize(
    ("text", "back", "nearest", "furthest"),
    [(16, "up to 8K", 0, 8), (16, "8K to 16K", 8, 16), (64, "up to 16K", 0, 16), (64, "16K to 48K", 16, 48), (64, "48K to 64K", 48, 64)],
)  # fmt: skip
def test_needles_by_how_far_back_they_stand(text: int, back: str, nearest: int, furthest: int) -> None:
    cells = [_found(arm, 1024 * text, 1024 * nearest, 1024 * furthest) for arm in ("full", "own", "own11")]
    assert f"| text of {text}K, {back} back | {' | '.join(cells)} |" in PAGE


def test_needles_at_64k() -> None:
    own, own11 = (_share("niah_single", 65536, EXTENDED, arm) for arm in ("own", "own11"))
    assert f"(a share of {own}), and 0.64 for 11% ({own11})" in PAGE


@pytest.mark.parametrize(
    ("name", "retrieval_rows"),
    [
        ("16 logged steps of text alone", "0"),
        ("24 logged steps with one row of retrieval", "1"),
        ("all", "01"),
    ],
)
def test_training_losses_with_and_without_retrieval_text(name: str, retrieval_rows: str) -> None:
    rows = [row for row in TRAINING if row["retrieval_rows"] in retrieval_rows]
    cells = [_percent(_compared(rows, SECOND, arm, "step")) for arm in ("own", "own11")]
    assert f"| {name} | {' | '.join(cells)} |" in PAGE


def test_the_file_of_the_extension_makes_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(QUALITY.parents[2])
    runs = expand(load_study(FOLDER / "extension.yaml"))
    assert [run.name for run in runs] == [
        f"ext.{name}_seed1" for name in ("full-full", "own-dash", "own11-dash")
    ]
    scalings = [run.config.model.rope_scaling for run in runs]
    assert [(each.rope_type, each.factor) for each in scalings if each] == [("yarn", 4)] * 3
