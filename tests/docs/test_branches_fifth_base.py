"""The page on a fifth base and on one that is sparse from its first step against the files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from statistics import fmean, stdev

import pytest

from dash_megatron.studies.paired import Comparison, Measured, Ratio
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    ROOT,
    TASKS,
    Row,
    below,
    compare_all,
    compare_losses,
    compare_scores,
    losses,
    percent,
    places,
    predictions,
    read_pages,
    read_rows,
    right_answers,
    rows_at,
    scores,
    share,
    sure,
    without_one,
)

FOLDER = QUALITY / "branches_fifth_base"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
DOCUMENTS, SAMPLES, BASES, DENSITIES = (
    read_rows(FOLDER / f"{name}.csv") for name in ("documents", "samples", "bases", "densities")
)
GOALS = (0.95, 0.9, 0.9)
ORDERS = (1, 2, 3)
QUARTER, NINTH, SCRATCH, NSA = (
    (arm, "full_ret10", orders)
    for arm, orders in (("ret10", ORDERS), ("dash_11", ORDERS), ("scratch", ORDERS), ("nsa_25", (1, 2)))
)
"""Arm, reference and orders."""
WITH_TEN = (("branches_needles", (1,)), ("branches_ten", (1, 2)), ("branches_fifth_base", ORDERS))
"""Bases whose branches have 10% retrieval text, all with one text, and the orders that they have."""
Arms = tuple[str, str, Sequence[int]]


def _documents(arm: str, reference: str, orders: Sequence[int] = ORDERS, rows: list[Row] = DOCUMENTS) -> Comparison:  # fmt: skip
    return compare_losses(arm, reference, orders, rows)


def _retrieval(arm: str, reference: str, task: str, orders: Sequence[int] = ORDERS, rows: list[Row] = SAMPLES) -> Comparison:  # fmt: skip
    return compare_scores(arm, reference, task, orders, rows)


def _shares(arm: str, reference: str, orders: Sequence[int] = ORDERS) -> list[str]:
    return [share(_retrieval(arm, reference, task, orders).relative) for task in TASKS]


def _by_order(arm: str, reference: str, orders: Sequence[int]) -> list[str]:
    return [percent(_documents(arm, reference, (n,)).relative) for n in orders]


def _larger(found: Ratio | None) -> str:
    """A difference in percent with the larger of its errors."""
    found = sure(found)
    return f"{100 * found.value:+.2f} ± {100 * (found.error or 0):.2f}"


def test_the_first_lines() -> None:
    quarter, ninth, nsa = (percent(_documents(*arms).relative) for arms in (QUARTER, NINTH, NSA))
    assert f"at 25% ends {quarter}% below full attention in three orders of the data" in PAGE
    assert "It finds {} of the single needles that full attention finds, {} of multi-key ones and {} of recall.".format(*_shares(*QUARTER)) in PAGE  # fmt: skip
    assert f"**11% with 10%**: {ninth}% to full attention, not told apart." in PAGE
    assert "It finds {}, {} and {} of the three.".format(*_shares(*NINTH)) in PAGE
    behind = percent(_documents("nsa_25", "ret10", (1, 2)).relative)
    single = _retrieval("nsa_25", "ret10", TASKS[0], (1, 2))
    assert (
        f"{nsa}% to full attention, {behind} points behind the recipe, and {single.value.value:.2f} of single"
        f" needles found, the recipe {single.reference:.2f}" in PAGE
    )
    scratch = percent(_documents("scratch", "ret10").relative)
    assert f"from its first step end {scratch} points behind branches of the dense base" in PAGE


def test_each_order_and_document() -> None:
    for arms in (QUARTER, NINTH):
        assert "{}, {} and {}%.".format(*_by_order(*arms)) in PAGE
    counts = below(*QUARTER, DOCUMENTS)
    assert f"{min(counts)} to {max(counts)} of 61 documents are below; the median" in PAGE
    assert f"matters most takes the total to {without_one(*QUARTER, DOCUMENTS)}" in PAGE
    assert f"{below(*NSA, DOCUMENTS)[0]} of 61 documents are below full attention, in each order" in PAGE
    assert len(set(below(*NSA, DOCUMENTS))) == 1
    assert f"matters most takes it to {without_one(*NSA, DOCUMENTS)}" in PAGE
    behind = below("scratch", "ret10", ORDERS, DOCUMENTS)
    assert f"{61 - max(behind)} to {61 - min(behind)} of 61 documents are worse" in PAGE
    assert "{}, {} and {} points.".format(*_by_order("scratch", "ret10", ORDERS)) in PAGE


def test_the_goals_at_11_and_from_scratch() -> None:
    ninth, scratch = (
        sure(_documents(*arms).relative) for arms in (NINTH, ("scratch", "ret10", ORDERS))
    )  # fmt: skip
    assert ninth.error is not None
    assert abs(ninth.value) < 2 * ninth.error < 0.005 - ninth.value
    assert scratch.error is not None
    assert scratch.value - 2 * scratch.error > 0.005


def test_needles_by_how_far_back_they_stand() -> None:
    for text, task in (
        ("25% finds {} of {} single needles and full attention {}, further back {} and {} of {}.", TASKS[0]),
        ("of pairs up to 14K back it finds {} of {} and full attention {}, further back {} and {} of {}.", TASKS[2]),
    ):  # fmt: skip
        near, far = (
            [right_answers(SAMPLES, arm, ORDERS, task, *reach) for arm in QUARTER[:2]]
            for reach in ((0, 14), (14, 99))
        )
        assert text.format(*near[0], near[1][0], far[0][0], *far[1]) in PAGE
    near, far = (
        [right_answers(SAMPLES, "dash_11", ORDERS, TASKS[0], *reach)] for reach in ((0, 14), (14, 99))
    )
    assert "it finds {} of {}, further back {} of {}.".format(*near[0], *far[0]) in PAGE
    near, far = ([right_answers(SAMPLES, "nsa_25", (1, 2), TASKS[0], *reach)] for reach in ((0, 8), (8, 99)))
    assert "{} of {} needles up to 8K back and {} of {} beyond".format(*near[0], *far[0]) in PAGE


def test_11_behind_25() -> None:
    assert f"+{percent(_documents('dash_11', 'ret10').relative).strip('+')} points of loss" in PAGE
    found = _shares("dash_11", "ret10")
    assert "finds {} of the single needles that 25% finds, {} of multi-key ones and {} of recall".format(*found) in PAGE  # fmt: skip


def test_from_scratch_by_position_and_retrieval() -> None:
    beyond = []
    for place in (None, *places(DOCUMENTS)):
        name, rows = rows_at(place, DOCUMENTS)
        behind, above = (_documents("scratch", other, rows=rows) for other in ("ret10", "full_ret10"))
        losses_of = (above.reference, behind.reference, behind.value.value)
        cells = [*(f"{x:.4f}" for x in losses_of), percent(behind.relative), percent(above.relative)]
        assert f"| {name} | {' | '.join(cells)} |" in PAGE
        relative = sure(behind.relative)
        assert relative.value > 0
        assert relative.error is not None
        if place and relative.value > 2 * relative.error:
            beyond.append((place, 100 * relative.value, 100 * relative.error))
    assert [place for place, *_ in beyond] == [place for place in places(DOCUMENTS) if place[0] >= 256]
    near = [value for _, value, _ in beyond[:-1]]
    _, far, error = beyond[-1]
    assert f"{min(near):.2f} to {max(near):.2f}% up to 8K, and {far:.2f} ± {error:.2f}% beyond" in PAGE
    apart = []
    for task in TASKS:
        behind, above = (_retrieval("scratch", other, task) for other in ("ret10", "full_ret10"))
        assert f"| {task} | {behind.value.value:.3f} | {share(behind.relative)} | {share(above.relative)} |" in PAGE  # fmt: skip
        apart.append(abs(sure(behind.relative).value) > 2 * (sure(behind.relative).error or 0))
    assert apart == [True, False, False]


def test_the_base_that_is_sparse_from_its_first_step() -> None:
    def ahead(first: int, last: int) -> str:
        rows = [row for row in BASES if first <= int(row["step"]) <= last]
        both = ({1: {(x["step"],): (float(x[name]), 1.0) for x in rows}} for name in ("dash", "dense"))
        return percent(compare_all(*both).relative)

    assert f"{ahead(1201, 2000)}% in steps 1,201 to 2,000" in PAGE
    assert f"In steps 501 to 600 it was ahead, {ahead(501, 600)}%" in PAGE
    valid = {row["step"]: (float(row["dash_validation"]), float(row["dense_validation"])) for row in BASES if row["dash_validation"]}  # fmt: skip
    (first, dense), (last, last_dense) = valid["1000"], valid["2000"]
    assert (
        f"{100 * (first / dense - 1):+.2f}% at step 1,000 and {100 * (last / last_dense - 1):+.2f}% at"
        in PAGE
    )
    assert f"end at {last_dense:.3f} (dense) and {last:.3f} nats of validation" in PAGE


def test_where_the_density_goes() -> None:
    def layers(run: str) -> list[float]:
        rows = [row for row in DENSITIES if row["run"].startswith(run)]
        return [fmean(float(row[f"layer_{n}"]) for row in rows) for n in range(5)]

    *others, last = layers("dash_seed23")
    assert f"its last layer reads {last:.0%}, the others {100 * min(others):.0f} to {max(others):.0%}" in PAGE
    found = "layers 0 to 4 end at {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f}, those of the dense base at {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f}"
    assert found.format(*layers("scratch_order"), *layers("ret10_order")) in PAGE
    for arm, text in (("ret10", "{:.1f} to {:.1%}"), ("dash_11", "{:.1f} to {:.1%}")):
        rows = read_rows(FOLDER / "dense" / "results.csv")
        ends = [float(row["density"]) for row in rows if row["variant"] == arm]
        assert f"ends at {text.format(100 * min(ends), max(ends))}" in PAGE


def _with_ten(task: str | None) -> list[Ratio]:
    """25% to full attention on each base with 10%, of a task or of documents."""
    found = []
    for name, orders in WITH_TEN:
        rows = read_rows(QUALITY / name / f"{'samples' if task else 'documents'}.csv")
        of_task = [row for row in rows if row.get("task") == task]
        both = _both(orders, task, of_task)
        found.append(sure(compare_all(*both).relative))
    return found


def _both(orders: Sequence[int], task: str | None, rows: list[Row]) -> tuple[dict[int, Measured], ...]:
    """25% and full attention by order."""
    return tuple(
        {n: scores(f"{arm}_order{n}", task, rows) if task else losses(f"{arm}_order{n}", rows) for n in orders}
        for arm in ("ret10", "full_ret10")
    )  # fmt: skip


def _error_over_items(task: str | None) -> float:
    """Over documents or samples, of all branches of all bases together: they have the same text and 128 samples."""
    sides: tuple[dict[int, Measured], ...] = ({}, {})
    for name, orders in WITH_TEN:
        rows = read_rows(QUALITY / name / f"{'samples' if task else 'documents'}.csv")
        common = [row for row in rows if row.get("task") == task and int(row.get("sample", 0)) < 128]
        for side, measured in zip(sides, _both(orders, task, common), strict=True):
            side.update({len(side) + n: x for n, x in enumerate(measured.values())})
    return sure(compare_all(*sides).relative).error_items or 0


@dataclass(frozen=True)
class Mean:
    """Over the bases with 10%: the mean and its errors, of losses in percent, of answers as a share."""

    value: float
    bases: float
    items: float

    @classmethod
    def of(cls, task: str | None) -> Mean:
        scale = 1 if task else 100
        values = [scale * found.value + (1 if task else 0) for found in _with_ten(task)]
        return cls(fmean(values), stdev(values) / len(values) ** 0.5, scale * _error_over_items(task))

    @property
    def error(self) -> float:
        return max(self.bases, self.items)


MEANS = [Mean.of(task) for task in (*TASKS, None)]


def test_text_and_samples_are_those_of_the_bases_before() -> None:
    earlier = read_rows(QUALITY / "branches_ten" / "documents.csv")
    assert {(x["document"],): float(x["tokens"]) for x in earlier} == {
        name: tokens for name, (_, tokens) in losses("ret10_order1", DOCUMENTS).items()
    }
    earlier = read_rows(QUALITY / "branches_ten" / "samples.csv")
    both = [{tuple(row[key] for key in ("task", "sample", "place", "tokens")) for row in rows} for rows in (earlier, SAMPLES)]  # fmt: skip
    assert both[0] < both[1]


def test_three_bases_with_10() -> None:
    for base, (label, _) in enumerate(WITH_TEN):
        cells = [share(_with_ten(task)[base]) for task in TASKS]
        assert f"| {' | '.join(cells)} | {percent(_with_ten(None)[base])} |" in PAGE, label
    *shares, loss = MEANS
    means = [f"{x.value:.3f} ± {x.bases:.3f}" for x in shares]
    assert f"| mean, ± over bases | | {' | '.join(means)} | {loss.value:+.2f} ± {loss.bases:.2f} |" in PAGE
    items = " | ".join(f"{x.items:.3f}" for x in shares)
    assert f"| ± over samples, documents | | {items} | {loss.items:.2f} |" in PAGE
    beyond = [*((x.value - goal) / x.error for x, goal in zip(shares, GOALS, strict=True)), -loss.value / loss.error]  # fmt: skip
    assert f"| errors beyond the goal | | {' | '.join(f'{x:.1f}' for x in beyond)} |" in PAGE
    assert min(beyond) > 2
    told = "{} of single needles (goal 0.95), {} of multi-key ones (0.9) and {} of recall (0.9)"
    assert told.format(*(f"{x.value:.3f} ± {x.error:.3f}" for x in shares)) in PAGE
    assert f"would scatter with a standard deviation of {shares[0].bases * 3**0.5:.3f}" in PAGE


def test_bases_with_5() -> None:
    before = []
    for name in ("branches_projections", "branches_second_base", "branches_needles/orders"):
        rows = read_rows(QUALITY / name / "comparisons.csv")
        before.append(
            next(1 + float(x["relative"]) for x in rows if (x["arm"], x["task"]) == ("own", TASKS[0]))
        )
    more = MEANS[0].value - fmean(before)
    error = hypot(MEANS[0].error, stdev(before) / 3**0.5)
    assert f"Single needles are {more:.3f} ± {error:.3f} lower there" in PAGE


def test_the_answers_the_recipe_and_the_readme_have_its_figures() -> None:
    *shares, loss = MEANS
    whole = f"{loss.value:+.2f} ± {loss.error:.2f}%"
    ninth, nsa = (_larger(_documents(*arms).relative) for arms in (NINTH, NSA))
    scratch = _larger(_documents("scratch", "ret10").relative)
    for text in (ANSWERS, RECIPE):
        assert whole.strip("-") in text
        assert f"{ninth}%" in text
        assert scratch.strip("+") in text
    assert f"**{whole.replace(' ± ', '% ± ')}**" in README
    assert f"{ninth.replace(' ± ', '% ± ')}%" in README
    assert f"{nsa.replace(' ± ', '% ± ')}%" in README
    assert f"{scratch.strip('+')} points" in README
    assert f"{nsa}%" in ANSWERS
    assert f"{_larger(_documents('nsa_25', 'ret10', (1, 2)).relative).strip('+')} points behind" in ANSWERS
    for found, task in zip(shares, TASKS, strict=True):
        here = sure(_retrieval(*QUARTER[:2], task).relative)
        assert f"{1 + here.value:.3f} ± {here.error:.3f}" in ANSWERS
        assert f"{found.value:.3f} ± {found.error:.3f}" in ANSWERS
    at_11 = [sure(_retrieval(*NINTH[:2], task).relative) for task in TASKS]
    for text in (ANSWERS, RECIPE):
        for each in ([(x.value, x.error) for x in shares], [(1 + x.value, x.error or 0) for x in at_11]):
            cells = [f"{value:.2f} ± {error:.2f}" for value, error in each]
            assert "{} of single needles, {} of multi-key ones and {} of recall".format(*cells) in text
    both = ([(x.value, x.error) for x in shares], [(1 + x.value, x.error or 0) for x in at_11])
    cells = [
        f"{', '.join(f'{value:.2f}' for value, _ in each)} (± {', '.join(f'{error:.2f}' for _, error in each)})"
        for each in both
    ]
    assert all(cell in README for cell in cells)


@pytest.mark.parametrize(
    ("label", "arms", "predicted"),
    [
        ("25%", QUARTER, (-0.45, 0.985, 0.96, 0.95)),
        ("NSA", NSA, (1.80, 0.07, 0.10, 0.06)),
        ("from scratch", SCRATCH, (0.40, 0.85, 0.90, 0.70)),
    ],
)
def test_what_was_predicted(label: str, arms: Arms, predicted: tuple[float, ...]) -> None:
    found = [_documents(*arms).relative, *(_retrieval(*arms[:2], task, arms[2]).relative for task in TASKS)]
    assert f"| {label} | {' | '.join(predictions(found, predicted))} |" in PAGE


def test_the_study_file_of_the_sparse_base_names_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = {run.name for run in expand(load_study(FOLDER / "scratch" / "study.yaml"))}
    runs = {row["run"] for row in read_rows(FOLDER / "scratch" / "results.csv")}
    assert runs == {name for name in names if "scratch_11" not in name}
    nats = [float(row["nats"]) for row in read_rows(FOLDER / "scratch" / "answers.csv")]
    assert f"A right answer costs {fmean(nats):.2f} nats a token, as in branches of the dense base" in PAGE
