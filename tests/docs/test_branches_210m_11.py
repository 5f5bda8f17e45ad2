"""The page on 210M parameters at 11% against the answers by sample, losses and densities beside it."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from statistics import fmean

import pytest

from dash_megatron.studies.paired import Comparison
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    ROOT,
    TASKS,
    Row,
    below,
    collected,
    compare_losses,
    compare_scores,
    compare_training,
    guess,
    guess_share,
    larger,
    losses,
    percent,
    places,
    read_pages,
    read_rows,
    read_words,
    right_answers,
    rows_at,
    share,
    sure,
    without_one,
)

FOLDER = QUALITY / "branches_210m_11"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
EVIDENCE = read_words(ROOT / "docs" / "configuration-evidence.md")
SAMPLES, DOCUMENTS, TRAINING, NATS, DENSITIES, RUNS, COMPARISONS = (
    read_rows(FOLDER / f"{name}.csv")
    for name in ("samples", "documents", "training", "answers", "densities", "results", "comparisons")
)
OWN, NSA, INFLLM = ARMS = ("dash_11", "nsa_11", "infllmv2_11")
ORDERS = {"full": (1, 2), OWN: (1, 2), NSA: (1,), INFLLM: (1,)}
COLUMNS = [f"{arm}_order{n}" for arm, orders in ORDERS.items() for n in orders]
WITH_62M, AT_25 = ("branches_fifth_base/dense", "dash_11"), ("branches_ten/210m", "own")
NEAR, FAR = (0, 14), (14, 99)


def _documents(arm: str, reference: str = "full", rows: Sequence[Row] = DOCUMENTS) -> Comparison:
    return compare_losses(arm, reference, ORDERS[arm], rows)


def _retrieval(arm: str, task: str, reference: str = "full") -> Comparison:
    return compare_scores(arm, reference, task, ORDERS[arm], SAMPLES)


def _training(arm: str, orders: Sequence[int], first: int = 301) -> str:
    return percent(compare_training(arm, "full", orders, (first, first + 99), TRAINING))


def _right(arm: str, task: str, reach: tuple[int, int]) -> tuple[int, int]:
    return right_answers(SAMPLES, arm, ORDERS[arm], task, *reach)


def _short(found: Comparison) -> str:
    """A difference in percent with the larger of its errors."""
    relative = sure(found.relative)
    return f"{100 * relative.value:+.2f} ± {100 * larger(relative):.2f}"


LOSSES = {arm: percent(_documents(arm).relative) for arm in ARMS}
BEHIND = [percent(_documents(arm, OWN).relative).strip("+") for arm in (NSA, INFLLM)]
SHARES = [_retrieval(OWN, task).relative for task in TASKS]
SHORT = [f"{1 + sure(x).value:.3f} ± {larger(sure(x)):.3f}" for x in SHARES]


def test_the_first_lines() -> None:
    assert f"at 11% ends {LOSSES[OWN]}% above full attention on held-out documents**" in PAGE
    told = "{} of the single needles that full attention finds, {} of multi-key ones and {} of recall."
    assert told.format(*map(share, SHARES)) in PAGE
    loss = sure(_documents(OWN).relative)
    assert f"is met**, by {(0.005 - loss.value) / larger(loss):.1f} errors" in PAGE
    assert loss.value > 2 * larger(loss)
    by_order = [percent(compare_losses(OWN, "full", (n,), DOCUMENTS).relative) for n in (1, 2)]
    assert "the orders have {} and {}%.".format(*by_order) in PAGE
    told = "end {} and {}% above full attention, {} and {} points behind DashAttention at 11%."
    assert told.format(LOSSES[NSA], LOSSES[INFLLM], *BEHIND) in PAGE
    first = [[_retrieval(arm, task).value.value for arm in (NSA, INFLLM)] for task in TASKS]
    beside = _retrieval(NSA, TASKS[0], OWN).reference, _retrieval(NSA, TASKS[0]).reference
    told = "{:.2f} and {:.2f} of single needles, where DashAttention finds {:.2f} and full attention {:.2f} in the same order; of multi-key needles {:.2f} and {:.2f}, of recall {:.2f} and {:.2f}."
    assert told.format(*first[0], *beside, *first[1], *first[2]) in PAGE


def test_what_other_pages_say() -> None:
    loss, nsa, infllm = (_short(_documents(arm)) for arm in ARMS)
    for text in (ANSWERS, RECIPE, EVIDENCE, README):
        assert loss.strip("+") in text.replace("% ±", " ±")
    for text in (ANSWERS, RECIPE):
        assert "{}, {} and {}".format(*SHORT) in text
    for text in (ANSWERS, RECIPE, README):
        assert f"{nsa} and {infllm}%" in text.replace("% ±", " ±").replace("% and", " and")
    for name in ("branches_ten", "branches_fifth_base", "branches_210m_longer"):
        assert "branches_210m_11.md" in read_words(QUALITY / f"{name}.md")
    for each, behind in zip((nsa, infllm), BEHIND, strict=True):
        assert f"with 210M and 10% {each}%, {behind} points behind" in ANSWERS
    assert f"| 210M, 400 steps, 10% retrieval text | {loss}% | {' | '.join(SHORT)} | two |" in ANSWERS
    for label, source, orders in (
        ("62M, 800 steps, 10% retrieval text", WITH_62M, "three"),
        ("62M, 800 steps", ("branches_second_base", "own11"), "three"),
    ):
        value, error = collected(*source)
        found = [collected(*source, task) for task in TASKS]
        cells = " | ".join(f"{x:.3f} ± {apart:.3f}" for x, apart in found)
        assert f"| {label} | {value:+.2f} ± {error:.2f}% | {cells} | {orders} |" in ANSWERS
    median = sure(_documents(OWN).median)
    assert f"with 210M {100 * median.value:+.2f} ± {100 * larger(median):.2f}%" in ANSWERS
    far = _documents(OWN, rows=rows_at((8192, 16384), DOCUMENTS)[1])
    assert f"with 210M it is {_short(far)}%" in ANSWERS
    for arm in (NSA, INFLLM):
        pairs = [_retrieval(arm, task, OWN) for task in TASKS]
        told = "with 210M {:.2f} against {:.2f}, {:.2f} against {:.2f} and {:.2f} against {:.2f}"
        assert told.format(*(x for each in pairs for x in (each.reference, each.value.value))) in ANSWERS


@pytest.mark.parametrize("place", [None, *places(DOCUMENTS)], ids=str)
def test_losses_by_position(place: tuple[int, int] | None) -> None:
    name, rows = rows_at(place, DOCUMENTS)
    own, *others = (_documents(arm, rows=rows) for arm in ARMS)
    beyond = {"above": "yes", "within": "no"}[own.verdict]
    cells = [f"{own.reference:.4f}", percent(own.relative), beyond, *(percent(x.relative) for x in others)]
    assert f"| {name} | {' | '.join(cells)} |" in PAGE
    for other in others:
        lost = sure(other.relative).value > 2 * larger(sure(other.relative))
        assert lost == (place is None or place[0] >= 1024)


def test_losses_by_document() -> None:
    counts, median = below(OWN, "full", (1, 2), DOCUMENTS), percent(_documents(OWN).median)
    assert "{} and {} of 61 documents are below full attention.".format(*counts) in PAGE
    told = "the median document stands at {}%, and without the one that matters most the whole is {}."
    assert told.format(median, without_one(OWN, "full", (1, 2), DOCUMENTS)) in PAGE
    sparse = (NSA, INFLLM)
    counts = [below(arm, "full", (1,), DOCUMENTS)[0] for arm in sparse]
    assert "{} and {} of 61 documents are below full attention. The median".format(*counts) in PAGE
    medians = [percent(_documents(arm).median) for arm in sparse]
    rests = [without_one(arm, "full", (1,), DOCUMENTS) for arm in sparse]
    told = "The median one stands at {} and {}%, and without the one that matters most it is {} and {}."
    assert told.format(*medians, rests[0].strip("%"), rests[1]) in PAGE
    counts = [below(arm, OWN, (1,), DOCUMENTS)[0] for arm in sparse]
    assert "{} and {} of 61 are below DashAttention at 11%".format(*counts) in PAGE
    assert f"differ by {percent(_documents(INFLLM, NSA).relative).strip('-')} points" in PAGE


@pytest.mark.parametrize("first", range(1, 400, 100))
def test_losses_of_training(first: int) -> None:
    cells = [_training(arm, (n,), first) for arm in ARMS for n in ORDERS[arm]]
    assert f"| {first}-{first + 99} | {' | '.join(cells)} |" in PAGE
    logged = sum(int(row["step"]) > 300 for row in TRAINING)
    assert f"11% ends {_training(OWN, (1, 2))}% above, over {logged} logged steps an order" in PAGE


def test_where_nsa_is_ahead() -> None:
    ahead = [float(row["full_order1"]) - float(row[f"{NSA}_order1"]) for row in TRAINING]
    steps = [int(row["step"]) for row, nats in zip(TRAINING, ahead, strict=True) if nats > 0]
    assert steps == [int(row["step"]) for row in TRAINING[: len(steps)]]
    assert f"Up to step {steps[-1]} NSA's loss is lower than full attention's, at the first step by {ahead[0]:.2f} nats." in PAGE  # fmt: skip
    assert f"begins {float(TRAINING[0]['full_order1']) - float(TRAINING[0][f'{INFLLM}_order1']):.2f} nats below full attention." in PAGE  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_what_each_finds(task: str) -> None:
    found = [fmean(float(row[run]) for row in SAMPLES if row["task"] == task) for run in COLUMNS]
    assert f"| {task} | {' | '.join(f'{x:.3f}' for x in found)} |" in PAGE
    pairs = [(OWN, "full"), (NSA, "full"), (INFLLM, "full"), (NSA, OWN), (INFLLM, OWN)]
    cells = [share(_retrieval(arm, task, other).relative) for arm, other in pairs]
    assert f"| {task} | {' | '.join(cells)} |" in PAGE


def _moved(task: str, nearest: int = 0, furthest: int = 99) -> tuple[int, int]:
    """Answers that full attention finds and 11% does not, and those that 11% alone finds, in both orders."""
    rows = [
        (row[f"{OWN}_order{n}"], row[f"full_order{n}"])
        for row in SAMPLES
        if row["task"] == task
        and (not row["place"] or 1024 * nearest <= (1 - float(row["place"])) * int(row["tokens"]) < 1024 * furthest)
        for n in ORDERS[OWN]
    ]  # fmt: skip
    return rows.count(("0", "1")), rows.count(("1", "0"))


@pytest.mark.parametrize(
    ("label", "reach"),
    [("up to 2K", (0, 2)), ("2K to 4K", (2, 4)), ("4K to 8K", (4, 8)), ("8K to 14K", (8, 14)), ("beyond 14K", FAR), ("all", (0, 99))],
)  # fmt: skip
def test_what_is_missed_by_how_far_back(label: str, reach: tuple[int, int]) -> None:
    cells = []
    for task in (TASKS[0], TASKS[2]):
        (full, asked), (own, _) = (_right(arm, task, reach) for arm in ("full", OWN))
        cells.append(f"{asked} | {full} | {own} | {' and '.join(map(str, _moved(task, *reach)))}")
    assert f"| {label} | {' | '.join(cells)} |" in PAGE


def test_what_the_text_says_of_answers() -> None:
    lost, full = _moved(TASKS[0])[0], _right("full", TASKS[0], (0, 99))[0]
    assert f"it misses {lost} of the {full} that full attention finds, {_moved(TASKS[0], 4)[0]} of them more than 4K back" in PAGE  # fmt: skip
    (own, full), (own_far, full_far) = (
        [_right(arm, TASKS[0], reach) for arm in (OWN, "full")] for reach in (NEAR, FAR)
    )
    told = "11% finds {} of {} and full attention {}, further back {} and {} of {}"
    assert told.format(*own, full[0], own_far[0], *full_far) in PAGE
    assert "{} are lost and {} gained.".format(*_moved(TASKS[1])) in PAGE
    (own, full), (own_far, full_far) = (
        [_right(arm, TASKS[2], reach) for arm in (OWN, "full")] for reach in (NEAR, FAR)
    )
    told = "{} of {} against {}; further back it is {} against {} of {}."
    assert told.format(*own, full[0], own_far[0], *full_far) in PAGE
    by_order = [share(compare_scores(OWN, "full", TASKS[2], (n,), SAMPLES).relative) for n in (1, 2)]
    assert "its share is {} and {}".format(*by_order) in PAGE
    near, far = ([_right(arm, TASKS[0], reach(k)) for arm, k in ((NSA, 4), (INFLLM, 8))] for reach in (lambda k: (0, k), lambda k: (k, 99)))  # fmt: skip
    assert [right for right, _ in far] == [0, 0]
    told = "NSA {} of {} single needles up to 4K back and none of {} beyond, InfLLMv2 {} of {} up to 8K back and none of {} beyond"
    assert told.format(*near[0], far[0][1], *near[1], far[1][1]) in PAGE
    nats = [fmean(float(x["nats"]) for x in NATS if x["run"].startswith(f"{arm}_order")) for arm in (OWN, "full", NSA, INFLLM)]  # fmt: skip
    told = "A right answer costs 11% {:.2f} nats a token in the mean of tasks and orders, full attention {:.2f}, NSA {:.2f} and InfLLMv2 {:.2f}."
    assert told.format(*nats) in PAGE


def test_other_sizes_and_densities_beside_it() -> None:
    rows = [
        [collected(*study, task) for task in ("documents", *TASKS)]
        for study in (("branches_210m_11", OWN), WITH_62M, AT_25)
    ]
    for label, row in zip(("seed 51, two, 400", "seed 23, three, 800", "seed 11, three, 400"), rows, strict=True):  # fmt: skip
        (loss, error), *shares = row
        cells = " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in shares)
        assert f"| {label} | {loss:+.2f} ± {error:.2f} | {cells} |" in PAGE
    told = []
    for label, other in zip(("second", "third"), rows[1:], strict=True):
        apart = [(x - y, hypot(a, b)) for (x, a), (y, b) in zip(rows[0], other, strict=True)]
        (loss, error), *shares = apart
        cells = " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in shares)
        assert f"| the first less the {label} | | {loss:.2f} ± {error:.2f} | {cells} |" in PAGE
        told.append([abs(value) > 2 * error for value, error in apart])
    assert told == [[False, False, True, True], [True, True, False, False]]


def test_figures_of_other_studies_are_theirs() -> None:
    for page, told in (
        ("branches_fifth_base", "standard deviation of 0.023"),
        ("branches_210m_longer", " 0.661"),
        ("branches_factors", "+4.98 ± 0.44%"),
        ("../quality", "+4.45 ± 0.37%"),
    ):
        assert told in PAGE
        assert told in read_words(QUALITY / f"{page}.md")
    (single,) = (float(row["value"]) for row in read_rows(QUALITY / "branches_210m_longer" / "comparisons.csv") if (row["arm"], row["task"]) == ("infllmv2_25", TASKS[0]))  # fmt: skip
    assert f"found {single:.2f} of single needles" in PAGE
    recall = [compare_scores("full", "full", TASKS[2], (n,), SAMPLES).reference for n in (1, 2)]
    assert "here {:.3f} and {:.3f}.".format(*recall) in PAGE
    first, second = (sure(compare_losses(OWN, "full", (n,), DOCUMENTS).relative).value for n in (1, 2))
    assert f"the two losses differ by {100 * abs(first - second):.2f} points" in PAGE


def test_densities_and_scales() -> None:
    layers = [[float(row[f"layer_{n}"]) for n in range(16)] for row in DENSITIES]
    for n, each in enumerate(layers, 1):
        assert f"| order {n} | {' | '.join(f'{x:.2f}' for x in each)} |" in PAGE
    assert max(abs(x - y) for x, y in zip(*layers, strict=True)) < 0.03
    rest = [x for each in layers for x in each[1:15]]
    told = f"The first layer reads {layers[0][0]:.0%} and the last {layers[0][15]:.0%}, the others {100 * min(rest):.0f} to {max(rest):.0%}"
    assert told in PAGE
    of_all = [(each[0] + each[15]) / sum(each) for each in layers]
    assert f"read {100 * of_all[0]:.0f} and {of_all[1]:.0%} of what all read" in PAGE
    starts, ends = ([float(row[f"scaling_{step}"]) for row in DENSITIES] for step in (1, 400))
    told = "falls from {:.2f} and {:.2f} at the first step to {:.3f} and {:.3f}."
    assert told.format(*starts, *ends) in PAGE
    found = {arm: [100 * float(row["density"]) for row in RUNS if row["variant"] == arm] for arm in ARMS}
    told = "is {:.1f} and {:.1f}%, of NSA {:.1f}% and of InfLLMv2 {:.1f}%."
    assert told.format(*found[OWN], *found[NSA], *found[INFLLM]) in PAGE


PREDICTED = {
    OWN: ("11%", (0.1, -0.25, 0.45), (0.45, 0.1, 0.9), (0.8, 0.65, 0.92), (0.85, 0.7, 0.95), (0.6, 0.4, 0.8)),
    NSA: ("NSA", (4.5, 3, 6), (6.5, 4.5, 9), (0.03, 0, 0.1), (0.03, 0, 0.1), (0.05, 0, 0.15)),
    INFLLM: ("InfLLMv2", (4.5, 3, 6.5), (6, 4, 9), (0.04, 0, 0.15), (0.04, 0, 0.12), (0.05, 0, 0.15)),
}  # fmt: skip
NAMES = ("single needles", "multi-key needles", "recall")


@pytest.mark.parametrize("arm", ARMS)
def test_what_was_predicted(arm: str) -> None:
    label, loss, training, *shares = PREDICTED[arm]
    found = sure(_documents(arm).relative).value
    last = compare_training(arm, "full", ORDERS[arm], (301, 400), TRAINING).value
    assert f"| {label}, documents, % | {guess(*loss, 100 * found, '+.2f')}" in PAGE
    assert f"| {label}, training, % | {guess(*training, 100 * last, '+.2f')}" in PAGE
    for task, name, each in zip(TASKS, NAMES, shares, strict=True):
        assert f"| {label}, {name}, share | {guess(*each, 1 + sure(_retrieval(arm, task).relative).value, '.3f')}" in PAGE  # fmt: skip


@pytest.mark.parametrize(("task", "name", "guessed"), zip(TASKS, NAMES, (0.95, 0.96, 0.87), strict=True))
def test_what_full_attention_was_to_find(task: str, name: str, guessed: float) -> None:
    found = _retrieval(OWN, task).reference
    assert f"| full attention finds of {name} | {guess_share(guessed, found, 128)} |" in PAGE


def test_what_was_collected_is_what_the_page_computes() -> None:
    for row in COMPARISONS:
        arm, task = row["arm"], row["task"]
        if arm == "full":
            continue
        if task == "documents":
            place = (int(row["from"]), int(row["to"])) if row["to"] else None
            found = sure(_documents(arm, rows=rows_at(place, DOCUMENTS)[1]).relative)
        elif task == "loss":
            found = compare_training(arm, "full", ORDERS[arm], (301, 400), TRAINING)
        else:
            found = sure(_retrieval(arm, task).relative)
        assert float(row["relative"]) == pytest.approx(found.value, abs=2e-6)
        assert float(row["relative_error_items"]) == pytest.approx(found.error_items, abs=2e-6)
    for row in NATS:
        run = row["run"].partition("_from")[0]
        answers = [float(x[run]) for x in SAMPLES if x["task"] == row["task"]]
        assert (int(row["samples"]), float(row["score"])) == (len(answers), pytest.approx(fmean(answers), abs=1e-6))  # fmt: skip


def test_the_study_file_makes_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = {(x.name, str(x.config.training.steps), str(x.tokens)) for x in expand(load_study(FOLDER / "study.yaml"))}  # fmt: skip
    assert {(x["run"], x["steps"], x["tokens"]) for x in RUNS} < made
    assert {x["run"] for x in RUNS if x["base"]} == {f"{run}_from_full_seed51" for run in COLUMNS}
    sizes = {row["variant"]: int(row["parameters"]) / 1e6 for row in RUNS}
    told = f"Model of {sizes['full']:.1f}M as in [branches_210m](branches_210m.md#how), with {sizes[OWN]:.1f}M at 11% and {sizes[NSA]:.1f}M with NSA"
    assert told in PAGE
    assert f"to {float(RUNS[0]['valid_loss']):.3f} nats of validation" in PAGE
    tokens = sum(size for _, size in losses(COLUMNS[0], DOCUMENTS).values())
    assert f"the first 16K tokens count, {tokens / 1000:.0f}K in all" in PAGE
