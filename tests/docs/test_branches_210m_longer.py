"""The page on 210M parameters after 800 steps against the answers by sample, losses and densities beside it."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, hypot
from statistics import fmean

import pytest

from dash_megatron.studies.paired import Comparison, Measured, Ratio
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    ROOT,
    TASKS,
    Row,
    compare_all,
    compare_losses,
    errors,
    losses,
    percent,
    read_pages,
    read_rows,
    right_answers,
    scores,
    share,
)
from tests.docs.test_branches_fifth_base import MEANS

FOLDER = QUALITY / "branches_210m_longer"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
SAMPLES, DOCUMENTS, TRAINING, NATS, DENSITIES, RUNS = (
    read_rows(FOLDER / f"{name}.csv")
    for name in ("samples", "documents", "training", "answers", "densities", "results")
)
SHORT_SAMPLES, SMALL_SAMPLES = (
    read_rows(QUALITY / name / "samples.csv") for name in ("branches_ten", "branches_fifth_base")
)
"""Of 210M after 400 steps, from another base, and of 62M."""
GOALS = dict(zip(TASKS, (0.95, 0.9, 0.9), strict=True))
ORDERS = (1, 2)
RUN_NAMES = [f"{arm}_order{n}" for arm in ("full", "own") for n in ORDERS]


def _asked(run: str, task: str, rows: list[Row] = SAMPLES) -> Measured:
    """Right answers by sample, of those that the run was asked."""
    return scores(run, task, [row for row in rows if row[run]])


def _at_most(n: int, task: str, known: bool = True) -> Measured:
    """Right answers of full attention by sample; where one is not known it counts as right, which lowers the share of 25%."""
    every = {(row["sample"],): (1.0, 1.0) for row in SAMPLES if row["task"] == task}
    return {**every, **_asked(f"full_order{n}", task)} if known else every


def _bound(task: str, orders: Sequence[int] = ORDERS, known: Sequence[int] = ORDERS) -> Ratio:
    """What 25% finds of full attention's, at least; `known`: orders whose answers of full attention are read."""
    own = {n: _asked(f"own_order{n}", task) for n in orders}
    return _sure(compare_all(own, {n: _at_most(n, task, n in known) for n in orders}).relative)


def _paired(task: str) -> Comparison:
    """25% to full attention in order 1, of the samples that both were asked."""
    return compare_all(*({1: _asked(f"{arm}_order1", task)} for arm in ("own", "full")))


def _sure(found: Ratio | None) -> Ratio:
    assert found is not None
    return found


def _error(found: Ratio) -> float:
    return max(found.error_items or 0, found.error_orders or 0)


def _beyond(found: Ratio, task: str) -> float:
    """Errors beyond the goal."""
    return (1 + found.value - GOALS[task]) / _error(found)


def _short(found: Ratio) -> str:
    """A share with the larger of its errors."""
    return f"{1 + found.value:.3f} ± {_error(found):.3f}"


def _collected(study: str, arm: str, task: str) -> tuple[float, float]:
    """A share of full attention's or a difference in training loss, in percent, with its larger error."""
    rows = read_rows(QUALITY / study / "comparisons.csv")
    row = next(x for x in rows if (x["arm"], x["task"], x["to"]) == (arm, task, ""))
    both = [float(row[f"relative_error_{over}"] or 0) for over in ("items", "orders")]
    value, error = float(row["relative"]), max(both)
    return (1 + value, error) if task in TASKS else (100 * value, 100 * error)


def _difference(rows: list[Row], arm: str, orders: Sequence[int], before: list[Row], earlier: str, task: str) -> Comparison:  # fmt: skip
    """Right answers of the samples that are in both tables."""
    return compare_all(
        {n: _asked(f"{arm}_order{n}", task, rows) for n in orders},
        {n: _asked(f"{earlier}_order{n}", task, before) for n in orders},
    )


NEAR, FAR = (0, 14), (14, 99)
BOUNDS = {task: _bound(task) for task in TASKS}


def test_the_first_lines_and_what_other_pages_say() -> None:
    single, keys, recall = (share(found) for found in BOUNDS.values())
    assert f"finds at least {single} of the single needles" in PAGE
    assert f"at least {keys} of multi-key ones and at least {recall} of recall" in PAGE
    before = [_collected("branches_ten/210m", "own", task) for task in TASKS]
    assert "it had {}, {} and {}.".format(*(f"{x:.3f} ± {error:.3f}" for x, error in before)) in PAGE
    for text in (ANSWERS, RECIPE, README):
        assert "at least {}, {} and {}".format(*map(_short, BOUNDS.values())) in text
    ten, fifth = ((QUALITY / f"{name}.md").read_text() for name in ("branches_ten", "branches_fifth_base"))
    for text in (ten, fifth):
        assert "branches_210m_longer.md" in text
    ends = _sure(_training(601, 800, ORDERS).relative)
    for text in (ANSWERS, RECIPE):
        assert f"{100 * ends.value:+.2f} ± {100 * _error(ends):.2f}% in training loss" in text


@pytest.mark.parametrize("task", TASKS)
def test_the_goals_are_met_and_single_needles_by_order_1(task: str) -> None:
    without = _bound(task, known=())
    cells = [
        f"{GOALS[task]:g}",
        share(_bound(task, (2,))),
        share(BOUNDS[task]),
        f"{_beyond(BOUNDS[task], task):.1f}",
        share(without),
        f"{_beyond(without, task):.1f}",
    ]
    assert f"| {task} | {' | '.join(cells)} |" in PAGE
    assert _beyond(BOUNDS[task], task) > 2
    assert (_beyond(without, task) > 2) == (task != TASKS[0])
    for n in ORDERS:
        assert _beyond(_bound(task, (n,)), task) > 2
    assert "met, by {:.1f}, {:.1f} and {:.1f} errors".format(*(_beyond(x, t) for t, x in BOUNDS.items())) in ANSWERS  # fmt: skip
    cells = [
        ("400 steps, base of seed 11, three orders", [_collected("branches_ten/210m", "own", x) for x in TASKS]),
        ("800 steps, base of seed 31, two orders, at least", [(1 + x.value, _error(x)) for x in BOUNDS.values()]),
    ]  # fmt: skip
    for name, found in cells:
        assert f"| {name} | {' | '.join(f'{x:.3f} ± {error:.3f}' for x, error in found)} |" in ANSWERS


def test_how_rough_the_bound_of_single_needles_is() -> None:
    without = _bound(TASKS[0], known=())
    assert f"at least {_short(without)}, which is above 0.95 by only {_beyond(without, TASKS[0]):.1f} errors" in PAGE  # fmt: skip
    second = [int(row["own_order2"]) for row in SAMPLES if row["task"] == TASKS[0]]
    missed = second.count(0)
    assert f"is {_beyond(_bound(TASKS[0], (2,)), TASKS[0]):.1f} errors above 0.95: {missed} of 192" in PAGE
    assert f"(single needles by {_beyond(without, TASKS[0]):.1f} if order 1 is a bound as well)" in ANSWERS
    chance = sum(comb(192, k) * 0.05**k * 0.95 ** (192 - k) for k in range(missed + 1))
    assert f"would miss {missed} or fewer of 192 in {100 * chance:.0f} of 100 evaluations" in PAGE


def test_three_bases_of_62m_scatter() -> None:
    single, _, recall, _ = (mean.bases * 3**0.5 for mean in MEANS)
    assert f"three bases scatter in single needles with a standard deviation of {single:.3f}" in PAGE
    assert f"bases of 62M with 10% scatter in that share with a standard deviation of {recall:.3f}" in PAGE


def test_what_was_evaluated() -> None:
    for task in TASKS:
        rows = [row for row in SAMPLES if row["task"] == task]
        asked = [[row["sample"] for row in rows if row[run]] for run in RUN_NAMES]
        assert f"| {task}, of {len(rows)} samples | {' | '.join(str(len(each)) for each in asked)} |" in PAGE
        # the first ones, in order
        assert all(each == [str(n) for n in range(len(each))] for each in asked)
    assert f"| held-out documents, of {len(DOCUMENTS)} | 0 | 0 | 61 | 61 |" in PAGE
    assert [name for name in DOCUMENTS[0] if "order" in name] == RUN_NAMES[2:]


def test_samples_and_documents_are_those_of_the_studies_before() -> None:
    keys = ("task", "sample", "place", "tokens")
    ours, of_62m, short = (
        {tuple(row[key] for key in keys) for row in rows} for rows in (SAMPLES, SMALL_SAMPLES, SHORT_SAMPLES)
    )
    assert short < ours == of_62m
    earlier = read_rows(QUALITY / "branches_ten" / "documents.csv")
    assert [(x["document"], x["tokens"]) for x in DOCUMENTS] == [(x["document"], x["tokens"]) for x in earlier]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_what_it_finds(task: str) -> None:
    first, second = _paired(task), _asked("own_order2", task)
    own = fmean(right for right, _ in _asked("own_order1", task).values())
    cells = [
        f"{first.reference:.3f}",
        f"{own:.3f}",
        f"{fmean(right for right, _ in second.values()):.3f}",
        share(first.relative),
        str(first.items),
    ]
    assert f"| {task} | {' | '.join(cells)} |" in PAGE


def test_which_are_missed() -> None:
    pairs = {
        task: [(x["own_order1"], x["full_order1"]) for x in SAMPLES if x["task"] == task] for task in TASKS
    }
    (lost, gained), *others = ([each.count(("0", "1")), each.count(("1", "0"))] for each in pairs.values())
    assert f"misses {lost} single needles that full attention finds, and finds {gained} that it" in PAGE
    assert "of multi-key ones it is {} and {}, of recall {} and {}.".format(*others[0], *others[1]) in PAGE
    both = [(x["full_order2"], x["own_order2"]) for x in SAMPLES if x["full_order2"]]
    full, own = (sum(int(each[n]) for each in both) for n in (0, 1))
    assert f"first {len(both)} single needles of order 2 full attention finds {full} and 25% finds {own}" in PAGE  # fmt: skip
    near, far = (right_answers(SAMPLES, "own", ORDERS, TASKS[0], *reach) for reach in (NEAR, FAR))
    assert "25% finds {} of {} single needles in two orders, further back {} of {}.".format(*near, *far) in PAGE  # fmt: skip
    own_near, own_far, full_near, full_far = (
        right_answers(SAMPLES, arm, (1,), TASKS[0], *reach)
        for arm in ("own", "full")
        for reach in (NEAR, FAR)
    )
    text = "In order 1 it is {} of {} and {} of {}, with full attention {} and {}."
    assert text.format(*own_near, *own_far, full_near[0], full_far[0]) in PAGE


def test_nats_of_right_answers() -> None:
    def nats(run: str, task: str) -> float:
        return float(next(x["nats"] for x in NATS if x["run"].startswith(run) and x["task"] == task))

    text = "{:.3f} nats a token of single needles and {:.3f} of multi-key ones in order 1, full attention {:.3f} and {:.3f}."  # fmt: skip
    assert text.format(*(nats(f"{arm}_order1", task) for arm in ("own", "full") for task in TASKS[:2])) in PAGE  # fmt: skip
    earlier = read_rows(QUALITY / "branches_ten" / "210m" / "answers.csv")
    means = [fmean(float(x["nats"]) for x in rows if x["run"].startswith("own")) for rows in (NATS, earlier)]
    assert "it costs 25% {:.2f} nats; after 400 steps it was {:.2f}.".format(*means) in PAGE
    for row in NATS:
        run = row["run"].partition("_from")[0]
        answers = [right for right, _ in _asked(run, row["task"]).values()]
        assert (int(row["samples"]), float(row["score"])) == (len(answers), pytest.approx(fmean(answers), abs=1e-6))  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_400_steps_and_800(task: str) -> None:
    for arm, name, orders in (("own", "25%, orders 1 and 2", ORDERS), ("full", "full attention, order 1", (1,))):  # fmt: skip
        found = _difference(SAMPLES, arm, orders, SHORT_SAMPLES, f"210m.{arm}", task)
        assert found.items == 128
        values = f"{found.reference:.3f} | {found.value.value:.3f}"
        difference = f"{found.difference.value:+.3f}{errors(found.difference, digits=3)}"
        assert f"| {task}, {name} | {values} | {difference} |" in PAGE


def test_what_the_shares_gain_on_400_steps() -> None:
    gains = {}
    for task in TASKS:
        before, error = _collected("branches_ten/210m", "own", task)
        gains[task] = (1 + BOUNDS[task].value - before, hypot(_error(BOUNDS[task]), error))
    single, _, recall = (f"{gain:.3f} ± {error:.3f}" for gain, error in gains.values())
    assert f"as a share at least {recall}." in PAGE
    assert f"recall by at least {recall} more of full attention's" in ANSWERS
    assert f"single needles gain at least {single}, which is within two errors" in PAGE
    assert gains[TASKS[1]][0] < 0.002
    assert [gain > 2 * error for gain, error in gains.values()] == [False, False, True]
    first = [row for row in SAMPLES if int(row["sample"]) < 128]
    far, near = (
        [right_answers(rows, arm, ORDERS, TASKS[2], *reach) for arm, rows in (("own", first), ("210m.own", SHORT_SAMPLES))]
        for reach in (FAR, NEAR)
    )  # fmt: skip
    text = (
        f"25% finds {far[0][0]} of {far[0][1]}, after 400 steps {far[1][0]} of {far[1][1]}; of those nearer"
    )
    assert f"{text} {near[0][0]} of {near[0][1]} after {near[1][0]}." in PAGE


def test_beside_62m() -> None:
    found = {task: _difference(SAMPLES, "own", ORDERS, SMALL_SAMPLES, "ret10", task) for task in TASKS}
    recall = found[TASKS[2]]
    assert f"{recall.value.value:.3f} of the same 192 samples against {recall.reference:.3f} in orders 1" in PAGE  # fmt: skip
    assert f"{recall.difference.value:+.3f}{errors(recall.difference, digits=3)}" in PAGE
    assert [each.verdict for each in found.values()] == ["within", "within", "above"]
    for study in ("branches_second_base", "branches_longer/long"):
        share_of_62m, error = _collected(study, "own", TASKS[0])
        assert f"{share_of_62m:.2f} ± {error:.2f} after" in PAGE


def _training(first: int, last: int, orders: Sequence[int]) -> Comparison:
    rows = [row for row in TRAINING if first <= int(row["step"]) <= last]
    return compare_all(
        *({n: {(x["step"],): (float(x[f"{arm}_order{n}"]), 1.0) for x in rows} for n in orders} for arm in ("own", "full"))
    )  # fmt: skip


@pytest.mark.parametrize("first", range(1, 800, 200))
def test_losses_of_training(first: int) -> None:
    cells = [percent(_training(first, first + 199, orders).relative) for orders in ((1,), (2,), ORDERS)]
    assert f"| {first}-{first + 199} | {' | '.join(cells)} |" in PAGE


def test_the_loss_at_the_end() -> None:
    last = _training(601, 800, ORDERS)
    assert last.items == 40
    assert f"25% ends {percent(last.relative)}% below full attention" in PAGE
    for n in ORDERS:
        one = _sure(_training(601, 800, (n,)).relative)
        assert one.value < -2 * (one.error_items or 0)
    relative = _sure(last.relative)
    before, error = _collected("branches_ten/210m", "own", "loss")
    assert f"which was {before:+.2f} ± {error:.2f}% after 400 steps" in ANSWERS
    apart = before - 100 * relative.value, hypot(error, 100 * _error(relative))
    assert f"{apart[0]:.2f} ± {apart[1]:.2f} points more, which is within two errors" in PAGE
    assert apart[0] < 2 * apart[1]
    pairs = [
        [_collected(study, arm, task)[0] for task in ("documents", "loss")]
        for study, arm in (("branches_ten/210m", "own"), ("branches_ten/62m", "ret10"), ("branches_needles/ret10", "ret10"), ("branches_fifth_base/dense", "ret10"))
    ]  # fmt: skip
    assert [documents < training for documents, training in pairs] == [True, True, True, False]
    text = "{:+.2f}% where it was {:+.2f}% (210M after 400 steps), {:+.2f} and {:+.2f}, {:+.2f} and {:+.2f}, {:+.2f} and {:+.2f} (62M)."  # fmt: skip
    assert text.format(*(x for pair in pairs for x in pair)) in PAGE


def test_held_out_documents_of_25() -> None:
    nats = [compare_losses("own", "own", (n,), DOCUMENTS).value.value for n in ORDERS]
    assert "cost 25% {:.4f} and {:.4f} nats a token".format(*nats) in PAGE
    earlier = read_rows(QUALITY / "branches_ten" / "documents.csv")
    ours, before = (
        {n: losses(f"{arm}_order{n}", rows) for n in ORDERS}
        for arm, rows in (("own", DOCUMENTS), ("210m.own", earlier))
    )
    assert f"That is {percent(compare_all(ours, before).relative)}% to 25% after 400 steps" in PAGE
    lower = [sum(ours[n][item] < before[n][item] for item in ours[n]) for n in ORDERS]
    assert "lower on {} and {} of 61 documents".format(*lower) in PAGE


def test_densities_and_scales() -> None:
    layers = [[float(row[f"layer_{n}"]) for n in range(16)] for row in DENSITIES]
    for order, each in enumerate(layers, 1):
        assert f"| order {order} | {' | '.join(f'{x:.2f}' for x in each)} |" in PAGE
        assert min(each[0], each[15]) > 0.46
    others = [x for each in layers for x in each[1:15]]
    assert f"the others {100 * min(others):.0f} to {max(others):.0%}" in PAGE
    apart = [abs(x - y) for x, y in zip(*layers, strict=True)]
    moved = [n for n, x in enumerate(apart) if x >= 0.1]
    assert moved == [1, 3, 7]
    assert f"layers 1, 3 and 7 differ by {min(apart[n] for n in moved):.2f} to {max(apart):.2f}" in PAGE
    starts, ends = ([float(row[f"scaling_{step}"]) for row in DENSITIES] for step in (1, 800))
    assert (
        "falls from {:.2f} and {:.2f} at the first step to {:.3f} and {:.3f}".format(*starts, *ends) in PAGE
    )
    density = [float(row["density"]) for row in RUNS if row["variant"] == "own"]
    assert f"Density of the last tenth of the steps is {100 * density[0]:.1f} and {density[1]:.1%}" in PAGE


@pytest.mark.parametrize(
    ("name", "task", "guess", "least", "most"),
    [("single needles", TASKS[0], 0.97, 0.93, 1.0), ("multi-key needles", TASKS[1], 0.975, 0.95, 1.0), ("recall", TASKS[2], 0.92, 0.86, 0.97)],
)  # fmt: skip
def test_what_was_predicted(name: str, task: str, guess: float, least: float, most: float) -> None:
    found = 1 + BOUNDS[task].value
    bold = "" if least <= found <= most else "**"
    row = f"| {name}, share | {guess:g} ({least:.2f} to {most:.2f}) | {bold}at least {found:.3f}{bold} |"
    assert row in PAGE
    full = _paired(task).reference
    error = (full * (1 - full) / _paired(task).items) ** 0.5
    expected = {TASKS[2]: 0.92}.get(task, 0.98)
    bold = "**" if abs(full - expected) >= 2 * error else ""
    assert f"| {expected} | {bold}{full:.3f}{bold} |" in PAGE


def test_the_study_file_makes_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = {(x.name, str(x.config.training.steps), str(x.tokens)) for x in expand(load_study(FOLDER / "study.yaml"))}  # fmt: skip
    assert {(x["run"], x["steps"], x["tokens"]) for x in RUNS} == {x for x in made if "order3" not in x[0]}
    assert f"to {float(RUNS[0]['valid_loss']):.3f} nats of validation" in PAGE
    sizes = {row["variant"]: int(row["parameters"]) for row in RUNS}
    assert f"The model of {sizes['full'] / 1e6:.1f}M" in PAGE
    assert f"with {sizes['own'] / 1e6:.1f}M at 25%" in PAGE
    assert {row["step"] for row in RUNS if row["base"]} == {"800"}
    ours, earlier = (path.read_text().splitlines()[1:] for path in (FOLDER / "study.yaml", QUALITY / "branches_ten" / "210m" / "study.yaml"))  # fmt: skip
    changed = {x.split(":")[0].strip() for x, y in zip(ours, earlier, strict=True) if x != y}
    assert changed == {"output", "seeds", "training.steps", "retrieval"}
