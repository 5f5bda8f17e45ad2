"""The page on 10% retrieval text against the losses by document, the answers by sample and the probe beside it."""

from collections.abc import Sequence
from math import hypot
from statistics import fmean, stdev

import pytest

from dash_megatron.studies.paired import Comparison
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    TASKS,
    Row,
    below,
    collected,
    compare_all,
    compare_losses,
    compare_scores,
    errors,
    percent,
    predictions,
    read_pages,
    read_rows,
    right_answers,
    scores,
    share,
    without_one,
)

FOLDER = QUALITY / "branches_ten"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
SMALL, BIG, NSA = ("ret10", "full_ret10", (1, 2)), ("210m.own", "210m.full", (1, 2, 3)), ("nsa_25", "full_ret10", (1,))  # fmt: skip
"""Arm, reference and orders."""
YARN = ("full_ret10", "ret10")
Arms = tuple[str, str, tuple[int, ...]]


DOCUMENTS, SAMPLES, PROBE, EARLIER_DOCUMENTS, EARLIER_SAMPLES = (
    read_rows(FOLDER / f"{name}.csv")
    for name in ("documents", "samples", "probe", "../branches_needles/documents", "../branches_needles/samples")
)  # fmt: skip


def _documents(arm: str, reference: str, orders: Sequence[int] = (1,), rows: list[Row] = DOCUMENTS) -> Comparison:  # fmt: skip
    return compare_losses(arm, reference, orders, rows)


def _retrieval(arm: str, reference: str, task: str, orders: Sequence[int] = (1,), rows: list[Row] = SAMPLES) -> Comparison:  # fmt: skip
    return compare_scores(arm, reference, task, orders, rows)


def _shares(arms: Arms, digits: int = 3) -> list[str]:
    return [share(_retrieval(*arms[:2], task, arms[2]).relative, digits) for task in TASKS]


def _by_order(arms: Arms) -> list[str]:
    return [percent(_documents(*arms[:2], (n,)).relative) for n in arms[2]]


def _moved(arms: Arms, task: str) -> list[int]:
    """How many right answers the arm gains on the reference, and how many it loses."""
    pairs = [(x[f"{arms[0]}_order{n}"], x[f"{arms[1]}_order{n}"]) for x in SAMPLES if x["task"] == task for n in arms[2]]  # fmt: skip
    return [pairs.count(("1", "0")), pairs.count(("0", "1"))]


def test_the_first_lines() -> None:
    big, small = (percent(_documents(*arms).relative) for arms in (BIG, SMALL))
    assert f"at 25% ends {big}% below full attention in three orders" in PAGE
    assert "finds {} of the single needles that full attention finds, {} of multi-key ones and {} of recall.".format(*_shares(BIG)) in PAGE  # fmt: skip
    assert f"10% in the branch**: {small}% in two orders. Shares are" in PAGE
    assert (
        "{} of single needles, {} of multi-key ones and {} of recall.".format(*_shares(SMALL)) in PAGE
    )  # fmt: skip
    nsa, behind = (_documents("nsa_25", other).relative for other in ("full_ret10", "ret10"))
    assert f"{percent(nsa)}% to full attention, {percent(behind)} points behind the recipe, and 0.07" in PAGE


@pytest.mark.parametrize("arms", [SMALL, BIG], ids=["62M", "210M"])
@pytest.mark.parametrize(("task", "goal"), zip(TASKS, (0.95, 0.9, 0.9), strict=True))
def test_only_multi_key_needles_are_told_apart_from_their_goal(arms: Arms, task: str, goal: float) -> None:
    found = _retrieval(*arms[:2], task, arms[2]).relative
    assert found is not None
    assert found.error is not None
    assert (abs(1 + found.value - goal) > 2 * found.error) == (task == "niah_multikey")


def test_documents_agree() -> None:
    assert "{}, {} and {}%.".format(*_by_order(BIG)) in PAGE
    counts = below(*BIG, DOCUMENTS)
    assert f"{min(counts)} to {max(counts)} of {len(DOCUMENTS)} documents are below" in PAGE
    assert "{} and {} of 61 are below".format(*below(*SMALL, DOCUMENTS)) in PAGE
    assert f"{below(*NSA, DOCUMENTS)[0]} of 61 documents are below" in PAGE
    for arms in (BIG, SMALL):
        assert f"matters most takes the total to {without_one(*arms, DOCUMENTS)}" in PAGE
    assert f"matters most takes it to {without_one(*NSA, DOCUMENTS)}" in PAGE
    assert f"to the recipe at {percent(_documents('nsa_25', 'ret10').median)}%" in PAGE


@pytest.mark.parametrize("arms", [SMALL, BIG], ids=["62M", "210M"])
def test_needles_by_how_far_back_they_stand(arms: Arms) -> None:
    near, far = (
        [right_answers(SAMPLES, arm, arms[2], TASKS[0], *reach) for arm in arms[:2]]
        for reach in ((0, 14), (14, 99))
    )
    text = (
        f"p to 14K back 25% finds {near[0][0]} of {near[0][1]} and full attention {near[1][0]}, further back"
        f" {far[0][0]} and {far[1][0]} of {far[0][1]}."
    )
    assert text in PAGE


def test_what_210m_and_nsa_miss() -> None:
    gained, lost = _moved(BIG, TASKS[0])
    assert f"{lost} that full attention finds are missed, {gained} are found that it misses" in PAGE
    near, far = ([right_answers(SAMPLES, arm, (1, 2, 3), TASKS[2], *reach) for arm in BIG[:2]] for reach in ((0, 14), (14, 99)))  # fmt: skip
    assert (
        f"Of pairs up to 14K back it finds {near[0][0]} of {near[0][1]} and full attention {near[1][0]}, further back"
        f" {far[0][0]} and {far[1][0]} of {far[0][1]}." in PAGE
    )
    recall = _retrieval(*BIG[:2], TASKS[2], BIG[2])
    assert f"it finds {recall.value.value:.2f}, full attention {recall.reference:.2f}" in PAGE
    near, far = ([right_answers(SAMPLES, "nsa_25", (1,), TASKS[0], *reach)] for reach in ((0, 8), (8, 99)))
    assert f"{near[0][0]} of {near[0][1]} needles up to 8K back and {far[0][0]} of {far[0][1]} beyond" in PAGE
    recall = _retrieval("nsa_25", "ret10", TASKS[2])
    assert f"Of recall it finds {recall.value.value:.2f}, the recipe {recall.reference:.2f}" in PAGE


def test_full_attention_in_three_orders() -> None:
    found = [_retrieval("full_ret10", "full_ret10", task, (1, 2, 3)).value for task in TASKS]
    assert (
        "{} of single needles, {} of multi-key ones and {} of recall".format(
            *(f"{x.value:.3f} ± {x.error or 0:.3f}" for x in found)
        )
        in PAGE
    )


def test_two_bases() -> None:
    assert [(x["tokens"], x["document"]) for x in DOCUMENTS] == [(x["tokens"], x["document"]) for x in EARLIER_DOCUMENTS]  # fmt: skip
    assert [(x["task"], x["place"], x["tokens"]) for x in SAMPLES] == [(x["task"], x["place"], x["tokens"]) for x in EARLIER_SAMPLES]  # fmt: skip
    first = [_retrieval("ret10", "full_ret10", task, rows=EARLIER_SAMPLES).relative for task in TASKS]
    loss = _documents("ret10", "full_ret10", rows=EARLIER_DOCUMENTS).relative
    assert f"| one | {' | '.join(share(x, 2) for x in first)} | {percent(loss)} |" in PAGE
    here = _documents(*SMALL).relative
    assert f"| this one | two | {' | '.join(_shares(SMALL, 2))} | {percent(here)} |" in PAGE
    second = [_retrieval("ret10", "full_ret10", task, (1, 2)).relative for task in TASKS]
    pairs = [(1 + x.value, 1 + y.value) for x, y in zip(first, second, strict=True) if x and y]
    assert loss is not None
    assert here is not None
    both = (100 * loss.value, 100 * here.value)
    cells = [
        *(f"{fmean(x):.2f} ± {stdev(x) / 2**0.5:.2f}" for x in pairs),
        f"{fmean(both):+.2f} ± {stdev(both) / 2**0.5:.2f}",
    ]
    assert f"| mean, ± over bases | | {' | '.join(cells)} |" in PAGE


def test_the_base_moves_what_is_found() -> None:
    less, full = (
        compare_all({1: scores(f"{arm}_order1", TASKS[0], SAMPLES)}, {1: scores(f"{arm}_order1", TASKS[0], EARLIER_SAMPLES)})
        for arm in ("ret10", "full_ret10")
    )  # fmt: skip
    assert f"finds {-less.difference.value:.3f}{errors(less.difference, digits=3)} fewer single" in PAGE
    assert f"({less.value.value:.3f} after {less.reference:.3f})" in PAGE
    assert f"({full.difference.value:+.3f}{errors(full.difference, digits=3)})" in PAGE


def _probed(head: tuple[str, str], digits: str) -> Row:
    return next(row for row in PROBE if (row["layer"], row["kv_head"]) == head and row["digits"] == digits)


def test_what_is_missed_is_selected() -> None:
    right, wrong = (_probed(("4", "0"), digits) for digits in ("right", "wrong"))
    assert (right["number"], wrong["number"], wrong["digit_in"]) == ("510", "2", "1.0000")
    text = "selects {:.0f} of {:.0f} past chunks. It puts {:.2f} of its attention on right digits and {:.2f} on the"
    values = (right["selected"], right["routed"], right["digit_mass"], wrong["digit_mass"])
    assert text.format(*map(float, values)) in PAGE
    assert f"without selection and prior it would be {float(wrong['free_mass']):.2f}" in PAGE
    assert f"puts {float(_probed(('3', '1'), 'right')['digit_mass']):.2f} on right digits" in PAGE


@pytest.mark.parametrize(("label", "arm"), zip(("full attention", "25%"), YARN, strict=True))
def test_yarn_without_training(label: str, arm: str) -> None:
    found = [_retrieval(f"yarn.{arm}", arm, task) for task in TASKS]
    cells = [f"{x.value.value:.3f}, {x.difference.value:+.3f}{errors(x.difference, digits=3)}" for x in found]
    loss = percent(_documents(f"yarn.{arm}", arm).relative)
    assert f"| {label} with 10% | {loss} | {' | '.join(cells)} |" in PAGE
    assert f"{loss.strip('+')}%" in PAGE


def test_yarn_of_25_to_full_attention_without() -> None:
    ends = percent(_documents("yarn.ret10", "full_ret10").relative)
    assert f"25% with YaRN ends {ends}% above full attention without it" in PAGE
    moved = [_moved(("yarn.ret10", "ret10", (1,)), task) for task in TASKS[:2]]
    assert moved == [[8, 3], [9, 2]]


def test_the_answers_and_the_recipe_have_its_figures() -> None:
    big, small = _documents(*BIG).relative, _documents(*SMALL).relative
    assert big is not None
    assert small is not None
    for text in (ANSWERS, RECIPE, README):
        assert (
            f"{100 * big.value:+.2f}{'%' if text is README else ''} ± {100 * (big.error or 0):.2f}%" in text
        )
    for text in (ANSWERS, RECIPE):
        assert f"{100 * small.value:+.2f} ± {100 * (small.error or 0):.2f}%" in text
    for task in TASKS:
        for arms in (BIG, SMALL):
            found = _retrieval(*arms[:2], task, arms[2]).relative
            assert found is not None
            assert f"{1 + found.value:.3f} ± {found.error:.3f}" in ANSWERS, (arms, task)
    nsa = _documents(*NSA).relative
    assert nsa is not None
    assert f"{percent(nsa)}%" in ANSWERS


def _between(first: tuple[float, float], second: tuple[float, float]) -> str:
    return f"{first[0] - second[0]:.2f} ± {hypot(first[1], second[1]):.2f}"


def test_sizes_and_shares_of_text_beside_each_other() -> None:
    big, earlier = collected("branches_ten/210m", "own"), collected("branches_longer/210m", "own")
    assert abs(big[0] - earlier[0]) < 2 * hypot(big[1], earlier[1])
    with_5 = _between(earlier, collected("branches_projections", "own"))
    with_10 = _between(big, collected("branches_ten/62m", "ret10"))
    assert f"by {with_5} points with 5% retrieval text, by {with_10} with 10%" in ANSWERS


@pytest.mark.parametrize(
    ("label", "arms", "predicted"),
    [
        ("25%, 210M", BIG, (-0.20, 0.95, 0.96, 0.95)),
        ("25%, 62M", SMALL, (-0.45, 0.985, 0.96, 0.95)),
        ("NSA, 62M", NSA, (1.80, 0.07, 0.10, 0.06)),
    ],
)
def test_what_was_predicted(label: str, arms: Arms, predicted: tuple[float, ...]) -> None:
    loss = _documents(*arms).relative
    found = [loss, *(_retrieval(*arms[:2], task, arms[2]).relative for task in TASKS)]
    assert f"| {label} | {' | '.join(predictions(found, predicted))} |" in PAGE
