"""The page on 210M parameters after 800 steps against the answers by sample, losses and densities beside it."""

from __future__ import annotations

from collections.abc import Sequence
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
    collected,
    compare_all,
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
    scores,
    share,
    sure,
    without_one,
)
from tests.docs.test_branches_fifth_base import MEANS

FOLDER = QUALITY / "branches_210m_longer"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
SAMPLES, DOCUMENTS, TRAINING, NATS, DENSITIES, RUNS, COMPARISONS = (
    read_rows(FOLDER / f"{name}.csv")
    for name in ("samples", "documents", "training", "answers", "densities", "results", "comparisons")
)
SHORT_SAMPLES, SMALL_SAMPLES = (
    read_rows(QUALITY / name / "samples.csv") for name in ("branches_ten", "branches_fifth_base")
)
"""Of 210M after 400 steps, from another base, and of 62M."""
SHORT_DOCUMENTS = read_rows(QUALITY / "branches_ten" / "documents.csv")
GOALS = dict(zip(TASKS, (0.95, 0.9, 0.9), strict=True))
FIRST, SECOND = (1, 2), (3,)
"""Orders that were run from the base of seed 31 and from that of seed 32."""
ORDERS = (*FIRST, *SECOND)
INFLLM = "infllmv2_25"
COLUMNS = ["full_order1", "full_order2", "own_order1", "own_order2", "full_order3", "own_order3", f"{INFLLM}_order3"]  # fmt: skip
NEAR, FAR = (0, 14), (14, 99)


def _asked(run: str, task: str, rows: list[Row] = SAMPLES) -> Measured:
    """Right answers by sample, of those that the run was asked."""
    return scores(run, task, [row for row in rows if row[run]])


def _at_most(n: int, task: str, known: bool) -> Measured:
    """Right answers of full attention by sample; where one is not known it counts as right, which lowers the share of 25%."""
    every = {(row["sample"],): (1.0, 1.0) for row in SAMPLES if row["task"] == task}
    return {**every, **_asked(f"full_order{n}", task)} if known else every


def _share(task: str, orders: Sequence[int], known: bool = True) -> Ratio:
    """What 25% finds of full attention's, less 1, at least; not `known`: without a look at full attention's answers."""
    own = {n: _asked(f"own_order{n}", task) for n in orders}
    return sure(compare_all(own, {n: _at_most(n, task, known) for n in orders}).relative)


def _over_bases(task: str, known: bool = True) -> Ratio:
    """The mean of both bases; its errors are over samples, which are the same on both, and over bases."""
    shares = [_share(task, FIRST, known).value, _share(task, SECOND).value]
    names = list(_asked("own_order1", task))
    rests = []
    for orders, value, read in zip((FIRST, SECOND), shares, (known, True), strict=True):
        own, full = (
            [sum(runs[n][name][0] for n in orders) for name in names]
            for runs in (
                {n: _asked(f"own_order{n}", task) for n in orders},
                {n: _at_most(n, task, read) for n in orders},
            )
        )
        rests.append([(x - (1 + value) * y) / sum(full) for x, y in zip(own, full, strict=True)])
    return Ratio(fmean(shares), _of_rests(rests, (0.5, 0.5)), stdev(shares) / 2**0.5)


def _of_rests(rests: Sequence[Sequence[float]], weights: Sequence[float]) -> float:
    """Standard error over items of a weighted sum of ratios, of what each item adds to them (`paired.standard_error`)."""
    both = [sum(w * x for w, x in zip(weights, each, strict=True)) for each in zip(*rests, strict=True)]
    return (len(both) / (len(both) - 1) * sum(x * x for x in both)) ** 0.5


def _beyond(found: Ratio, task: str) -> float:
    """Errors beyond the goal."""
    return (1 + found.value - GOALS[task]) / larger(found)


def _short(found: Ratio) -> str:
    """A share with the larger of its errors."""
    return f"{1 + found.value:.3f} ± {larger(found):.3f}"


def _documents(arm: str, reference: str, rows: list[Row] = DOCUMENTS) -> Comparison:
    """Held-out documents in order 3, from the second base."""
    return compare_losses(arm, reference, SECOND, rows)


def _retrieval(arm: str, reference: str, task: str) -> Comparison:
    return compare_scores(arm, reference, task, SECOND, SAMPLES)


def _right(arm: str, orders: Sequence[int], task: str, reach: tuple[int, int]) -> tuple[int, int]:
    return right_answers(SAMPLES, arm, orders, task, *reach)


BOTH = {task: _over_bases(task) for task in TASKS}
LOSS = percent(_documents("own", "full").relative)
LOSS_OF_INFLLM, BEHIND = (percent(_documents(INFLLM, other).relative) for other in ("full", "own"))


def test_the_first_lines_and_what_other_pages_say() -> None:
    single, keys, recall = map(_short, BOTH.values())
    assert f"at least {single} of single needles, {keys} of multi-key ones and {recall} of recall" in PAGE
    assert f"level with it: {LOSS}%**" in PAGE
    ten, fifth = (read_words(QUALITY / f"{name}.md") for name in ("branches_ten", "branches_fifth_base"))
    for text in (ANSWERS, RECIPE, README, ten):
        assert f"at least {single}, {keys} and {recall}" in text
    for text in (ANSWERS, RECIPE, README):
        assert any(f"{each} after 800" in text for each in (f"{LOSS}%", LOSS.replace(" ± ", "% ± ") + "%"))
    assert "branches_210m_longer.md" in fifth
    low = f"{_retrieval('own', 'full', TASKS[2]).reference:.3f}"
    assert f"full attention finds {low} of it, where it found {_found('full_order1', TASKS[2])[:5]} on the first" in PAGE  # fmt: skip
    for text in (ANSWERS, RECIPE):
        assert f"full attention itself finds but {low} of recall" in text
    beyond = [_beyond(found, task) for task, found in BOTH.items()]
    assert "by {:.1f}, {:.1f} and {:.1f} errors".format(*beyond) in PAGE
    assert "by {:.1f}, {:.1f} and {:.1f} errors".format(*beyond) in ANSWERS
    assert f"recall is above its goal by {_beyond(_share(TASKS[2], SECOND), TASKS[2]):.1f} errors" in PAGE
    before, error = collected("branches_ten/210m", "own")
    assert f"After 400 steps it was {before:+.2f} ± {error:.2f}% (three orders, another base)" in PAGE
    pairs = [_retrieval(INFLLM, "own", task) for task in TASKS]
    text = "ends {}%, {} points behind 25%, and finds {}, {} and {} of the three tasks where 25% finds {}, {} and {}"  # fmt: skip
    found = [*(x.value.value for x in pairs), *(x.reference for x in pairs)]
    assert text.format(LOSS_OF_INFLLM, BEHIND.strip("+"), *(f"{x:.2f}" for x in found)) in PAGE
    assert f"with 210M and 10% {LOSS_OF_INFLLM}%, {BEHIND.strip('+')} points behind" in ANSWERS
    text = "with 210M {:.3f} against {:.3f}, {:.3f} against {:.3f} and {:.3f} against {:.3f}"
    assert text.format(*(x for each in pairs for x in (each.reference, each.value.value))) in ANSWERS


def _found(run: str, task: str) -> str:
    answers = _asked(run, task)
    if not answers:
        return "-"
    of = "" if len(answers) == 192 else f" of {len(answers)}"
    return f"{fmean(right for right, _ in answers.values()):.3f}{of}"


def test_what_each_finds() -> None:
    for task in TASKS:
        rows = [row for row in SAMPLES if row["task"] == task]
        asked = [[row["sample"] for row in rows if row[run]] for run in COLUMNS]
        # the first ones, in order
        assert all(each == [str(n) for n in range(len(each))] for each in asked)
        assert f"| {task} | {' | '.join(_found(run, task) for run in COLUMNS)} |" in PAGE
    nats = [f"{compare_losses(arm, arm, (n,), DOCUMENTS).value.value:.4f}" for arm, n in (("own", 1), ("own", 2), ("full", 3), ("own", 3), (INFLLM, 3))]  # fmt: skip
    assert f"| documents, nats | - | - | {' | '.join(nats)} |" in PAGE
    assert [name for name in DOCUMENTS[0] if "order" in name] == COLUMNS[2:]
    assert [name for name in SAMPLES[0] if "order" in name] == COLUMNS


@pytest.mark.parametrize("task", TASKS)
def test_the_goals_are_met(task: str) -> None:
    bound = _over_bases(task, known=False)
    cells = [
        f"{GOALS[task]:g}",
        share(_share(task, FIRST)),
        share(_share(task, SECOND)),
        share(BOTH[task]),
        f"{_beyond(BOTH[task], task):.1f}",
        share(bound),
        f"{_beyond(bound, task):.1f}",
    ]
    assert f"| {task} | {' | '.join(cells)} |" in PAGE
    assert min(_beyond(BOTH[task], task), _beyond(bound, task)) > 2
    assert (_beyond(_share(task, SECOND), task) > 2) == (task != TASKS[2])
    cells = [
        ("400 steps, base of seed 11, three orders", [collected("branches_ten/210m", "own", x) for x in TASKS]),
        ("800 steps, base of seed 31, two orders, at least", [(1 + (y := _share(x, FIRST)).value, larger(y)) for x in TASKS]),
        ("800 steps, base of seed 32, one order", [(1 + (y := _share(x, SECOND)).value, larger(y)) for x in TASKS]),
    ]  # fmt: skip
    for name, found in cells:
        assert f"| {name} | {' | '.join(f'{x:.3f} ± {error:.3f}' for x, error in found)} |" in ANSWERS


def test_an_error_over_two_bases_is_rough() -> None:
    single = MEANS[0].bases * 3**0.5
    apart = _share(TASKS[0], SECOND).value - _share(TASKS[0], FIRST).value
    assert f"in single needles with a standard deviation of {single:.3f}; these two differ by {apart:.3f}" in PAGE  # fmt: skip


def test_samples_and_documents_are_those_of_the_studies_before() -> None:
    keys = ("task", "sample", "place", "tokens")
    ours, of_62m, short = (
        {tuple(row[key] for key in keys) for row in rows} for rows in (SAMPLES, SMALL_SAMPLES, SHORT_SAMPLES)
    )
    assert short < ours == of_62m
    sizes = {name: tokens for name, (_, tokens) in losses("own_order3", DOCUMENTS).items()}
    assert sizes == {(row["document"],): float(row["tokens"]) for row in SHORT_DOCUMENTS}


def test_which_are_missed() -> None:
    lost = {}
    for n in (1, 3):
        rows = [[(x[f"own_order{n}"], x[f"full_order{n}"]) for x in SAMPLES if x["task"] == task] for task in TASKS]  # fmt: skip
        lost[n] = [each.count(pair) for each in rows for pair in (("0", "1"), ("1", "0"))]
    text = "25% misses {} single needles that full attention finds, and finds {} that it misses; of multi-key ones it is {} and {}, of recall {} and {}."  # fmt: skip
    assert text.format(*lost[3]) in PAGE
    near, far = (_right("own", ORDERS, TASKS[0], reach) for reach in (NEAR, FAR))
    text = "25% finds {} of {} single needles in three branches, further back {} of {}."
    assert text.format(*near, *far) in PAGE
    full, own = ([_right(arm, (1, 3), TASKS[0], reach) for reach in (NEAR, FAR)] for arm in ("full", "own"))
    text = "In orders 1 and 3 it is {} of {} and {} of {}, with full attention {} and {}."
    assert text.format(*own[0], *own[1], full[0][0], full[1][0]) in PAGE


def test_nats_of_right_answers() -> None:
    def nats(run: str, task: str) -> float:
        return float(next(x["nats"] for x in NATS if x["run"].startswith(run) and x["task"] == task))

    of_recall = [nats(run, TASKS[2]) for run in ("full_order3", "own_order3", "full_order1")]
    text = "costs full attention {:.2f} nats a token and 25% {:.2f}, on the first base full attention {:.2f}."
    assert text.format(*of_recall) in PAGE
    for row in NATS:
        run = row["run"].partition("_from")[0]
        answers = [right for right, _ in _asked(run, row["task"]).values()]
        assert (int(row["samples"]), float(row["score"])) == (len(answers), pytest.approx(fmean(answers), abs=1e-6))  # fmt: skip


def test_recall_on_the_second_base() -> None:
    task = TASKS[2]
    near, far, close = ([_right(arm, SECOND, task, reach) for arm in ("full", "own")] for reach in (NEAR, FAR, (0, 2)))  # fmt: skip
    text = "full attention finds {} of {} and 25% {}; further back {} and {} of {}; of the {} that are less than 2K back {} and {}."  # fmt: skip
    found = (*near[0], near[1][0], far[0][0], *far[1], close[0][1], close[0][0], close[1][0])
    assert text.format(*found) in PAGE
    before = [_right("own", FIRST, task, reach) for reach in (NEAR, FAR)]
    assert "25% finds {} of {} and {} of {} in two orders.".format(*before[0], *before[1]) in PAGE
    first, second = (compare_all({3: losses("own_order3", DOCUMENTS)}, {3: losses(f"own_order{n}", DOCUMENTS)}) for n in FIRST)  # fmt: skip
    assert f"{percent(first.relative)} and {percent(second.relative)}%" in PAGE
    ours, *others = (losses(f"own_order{n}", DOCUMENTS) for n in (3, 1, 2))
    lower = [sum(ours[name] < other[name] for name in ours) for other in others]
    assert "lower on {} and {} of 61 documents".format(*lower) in PAGE
    few = [row for row in SAMPLES if int(row["sample"]) < 128]
    now = fmean(right for right, _ in _asked("full_order3", task, few).values())
    earlier = [fmean(right for right, _ in _asked(f"210m.full_order{n}", task, SHORT_SAMPLES).values()) for n in ORDERS]  # fmt: skip
    assert (
        f"full attention finds {min(earlier):.3f} to {max(earlier):.3f} of the same 128 samples in three orders, here {now:.3f}"
        in PAGE
    )
    of_62m = [fmean(float(row[f"full_ret10_order{n}"]) for row in SMALL_SAMPLES if row["task"] == task) for n in ORDERS]  # fmt: skip
    assert min(earlier) == earlier[2]
    assert min(of_62m) == of_62m[2]
    assert f"({of_62m[2]:.3f}, others up to {max(of_62m):.3f})" in PAGE


@pytest.mark.parametrize("place", [None, *places(DOCUMENTS)], ids=str)
def test_losses_by_position(place: tuple[int, int] | None) -> None:
    name, rows = rows_at(place, DOCUMENTS)
    own, others = (_documents(arm, "full", rows) for arm in ("own", INFLLM))
    cells = [f"{own.reference:.4f}", percent(own.relative), percent(others.relative), percent(_documents(INFLLM, "own", rows).relative)]  # fmt: skip
    assert f"| {name} | {' | '.join(cells)} |" in PAGE
    relative, other = sure(own.relative), sure(others.relative)
    assert abs(relative.value) < 2 * (relative.error_items or 0)
    assert (other.value > 2 * (other.error_items or 0)) == (place is None or place[0] >= 2048)


def test_losses_by_document() -> None:
    for arm in ("own", INFLLM):
        median = percent(_documents(arm, "full").median)
        text = f"{below(arm, 'full', SECOND, DOCUMENTS)[0]} of 61 documents are below, the median one stands at {median}%"
        assert (
            f"{text}, and without the one that matters most it is {without_one(arm, 'full', SECOND, DOCUMENTS)}"
            in PAGE
        )
    assert f"{below(INFLLM, 'own', SECOND, DOCUMENTS)[0]} of 61 documents are below 25%" in PAGE
    assert f"after 400 steps and {percent(_documents('own', 'full').median)}% after 800" in ANSWERS


def test_the_loss_beside_that_of_400_steps() -> None:
    def rest(arms: tuple[str, str], orders: Sequence[int], rows: list[Row]) -> tuple[float, list[float]]:
        found = sure(compare_losses(*arms, orders, rows).relative).value
        own, full = [{n: losses(f"{arm}_order{n}", rows) for n in orders} for arm in arms]
        names = [(str(n),) for n in range(61)]
        above, below = ([sum(runs[n][name][0] for n in orders) for name in names] for runs in (own, full))
        return found, [(x - (1 + found) * y) / sum(below) for x, y in zip(above, below, strict=True)]

    now, ours = rest(("own", "full"), SECOND, DOCUMENTS)
    before, theirs = rest(("210m.own", "210m.full"), ORDERS, SHORT_DOCUMENTS)
    assert 100 * before == pytest.approx(collected("branches_ten/210m", "own")[0], abs=1e-3)
    error = _of_rests([ours, theirs], (1, -1))
    apart = f"{100 * (now - before):.2f} ± {100 * error:.2f} points"
    assert f"{apart} more" in PAGE
    assert f"{apart} less after 800 than after 400" in ANSWERS
    third = compare_losses("210m.own", "210m.full", SECOND, SHORT_DOCUMENTS)
    assert f"order 3 alone was {percent(third.relative)}% there" in PAGE
    far, far_error = collected("branches_ten/210m", "own", to="16384")
    text = f"{far:+.2f} ± {far_error:.2f}%"
    here = percent(_documents("own", "full", [row for row in DOCUMENTS if row["from"] == "8192"]).relative)
    assert f"Beyond 8,192 tokens, where 400 steps had {text}, it is {here}%." in PAGE
    assert f"{text} with 210M parameters after 400 steps ({here}% after 800)" in ANSWERS


def _training(arm: str, first: int, orders: Sequence[int]) -> Ratio:
    return compare_training(arm, "full", orders, (first, first + 199), TRAINING)


@pytest.mark.parametrize("first", range(1, 800, 200))
def test_losses_of_training(first: int) -> None:
    cells = [percent(_training("own", first, (n,))) for n in ORDERS]
    cells.append(percent(_training(INFLLM, first, SECOND)))
    assert f"| {first}-{first + 199} | {' | '.join(cells)} |" in PAGE


def test_the_loss_of_training_at_the_end() -> None:
    bases = [_training("own", 601, orders) for orders in (FIRST, SECOND)]
    first, second = (f"{100 * x.value:+.2f} ± {100 * larger(x):.2f}%" for x in bases)
    assert f"25% ends {first} from full attention on the first base and {second} on the second" in PAGE
    assert f"in training loss {second} and on another base {first}" in ANSWERS
    assert f"{second} and on another base {first} | one; one and two |" in ANSWERS
    assert f"over {sum(int(row['step']) > 600 for row in TRAINING)} logged steps a branch" in PAGE
    values = [100 * x.value for x in bases]
    assert f"{fmean(values):+.2f} ± {stdev(values) / 2**0.5:.2f}% over bases" in PAGE
    before, error = collected("branches_ten/210m", "own", "loss")
    assert f"the last quarter of 400 steps had {before:+.2f} ± {error:.2f}%" in PAGE
    assert f"in training loss, which was {before:+.2f} ± {error:.2f}% after 400 steps" in ANSWERS


def test_what_the_shares_gain_on_400_steps() -> None:
    gains = {}
    for task in TASKS:
        before, error = collected("branches_ten/210m", "own", task)
        gains[task] = (1 + BOTH[task].value - before, hypot(larger(BOTH[task]), error))
    single, _, recall = (f"{gain:.3f} ± {error:.3f}" for gain, error in gains.values())
    assert f"recall gains at least {recall} and single needles {single}" in PAGE
    assert f"recall by at least {recall} more of full attention's, single needles by {single}" in ANSWERS
    assert gains[TASKS[1]][0] < 0.003
    assert [gain > 2 * error for gain, error in gains.values()] == [True, False, True]
    for study in ("branches_second_base", "branches_longer/long"):
        share_of_62m, error = collected(study, "own", TASKS[0])
        assert f"{share_of_62m:.2f} ± {error:.2f} after" in PAGE


def test_infllmv2_by_how_far_back() -> None:
    near, far = ([_right(INFLLM, SECOND, task, reach) for task in (TASKS[0], TASKS[2])] for reach in (NEAR, FAR))  # fmt: skip
    text = "{} of {} single needles and {} of {} pairs up to 14K back, {} of {} and {} of {} further back"
    assert text.format(*near[0], *near[1], *far[0], *far[1]) in PAGE
    shares = [share(_retrieval(INFLLM, other, task).relative) for other in ("full", "own") for task in TASKS]
    assert "{}, {} and {} of full attention's, {}, {} and {} of what 25% finds".format(*shares) in PAGE
    with_62m, error = collected("branches_needles/orders", INFLLM)
    assert f"with 62M and 5% retrieval text it had {with_62m:+.2f} ± {error:.2f}%" in PAGE
    rows = read_rows(QUALITY / "branches_needles/orders" / "comparisons.csv")
    single = next(float(x["value"]) for x in rows if (x["arm"], x["task"]) == (INFLLM, TASKS[0]))
    assert f"and found {single:.2f} of single needles." in PAGE


def test_densities_and_scales() -> None:
    layers = [[float(row[f"layer_{n}"]) for n in range(16)] for row in DENSITIES]
    names = ("order 1, seed 31", "order 2, seed 31", "order 3, seed 32")
    for name, each in zip(names, layers, strict=True):
        assert f"| {name} | {' | '.join(f'{x:.2f}' for x in each)} |" in PAGE
    first = [each[0] for each in layers]
    assert f"The first layer reads {100 * min(first):.0f} to {max(first):.0%} in all three" in PAGE
    last = [each[15] for each in layers]
    assert f"the last {100 * min(last[:2]):.0f} to {max(last[:2]):.0%} on the first base and {last[2]:.0%} on the second" in PAGE  # fmt: skip
    assert max(layers[2]) == layers[2][9]
    assert f"where layer 9 reads most, {layers[2][9]:.0%}" in PAGE
    apart = [abs(x - y) for x, y in zip(layers[0], layers[1], strict=True)]
    moved = [n for n, x in enumerate(apart) if x >= 0.1]
    assert moved == [1, 3, 7]
    assert f"layers 1, 3 and 7 differ by {min(apart[n] for n in moved):.2f} to {max(apart):.2f}" in PAGE
    starts, ends = ([float(row[f"scaling_{step}"]) for row in DENSITIES] for step in (1, 800))
    assert "falls from {:.2f}, {:.2f} and {:.2f} at the first step to {:.3f}, {:.3f} and {:.3f}".format(*starts, *ends) in PAGE  # fmt: skip
    density = [float(row["density"]) for row in RUNS if row["density"] and row["base"]]
    text = "Density of the last tenth of the steps is {:.1f}, {:.1f} and {:.1f}%, of InfLLMv2 {:.1f}%."
    assert text.format(*(100 * x for x in density)) in PAGE


def test_what_was_predicted() -> None:
    def loss(arm: str) -> float:
        return 100 * sure(_documents(arm, "full").relative).value

    def training(arm: str) -> float:
        return 100 * _training(arm, 601, SECOND).value

    for name, cell in (
        ("25%, documents, %", guess(-0.30, -0.55, -0.05, loss("own"), "+.2f")),
        ("25%, training, %", guess(-0.16, -0.30, 0.0, training("own"), "+.2f")),
        ("InfLLMv2, documents, %", guess(1.6, 0.8, 2.5, loss(INFLLM), "+.2f")),
        ("InfLLMv2, training, %", guess(2.5, 1.5, 4.0, training(INFLLM), "+.2f")),
    ):
        assert f"| {name} |" in PAGE
        assert cell in PAGE
    ours = ((0.975, 0.94, 1), (0.975, 0.94, 1), (0.96, 0.91, 1))
    others = ((0.10, 0.03, 0.3), (0.10, 0.03, 0.3), (0.15, 0.05, 0.4))
    before = ((0.97, 0.93, 1), (0.975, 0.95, 1), (0.92, 0.86, 0.97))
    for task, first, second, infllm in zip(TASKS, before, ours, others, strict=True):
        name = {TASKS[0]: "single needles", TASKS[1]: "multi-key needles", TASKS[2]: "recall"}[task]
        cells = f"{guess(*first, 1 + _share(task, FIRST).value, '.3f')} {guess(*second, 1 + _share(task, SECOND).value, '.3f')}"
        assert f"| 25%, {name}, share | {cells}" in PAGE
        value = sure(_retrieval(INFLLM, "full", task).relative).value
        assert f"| InfLLMv2, {name}, share | | | {guess(*infllm, 1 + value, '.3f')}" in PAGE
    for task, guesses in zip(TASKS, ((0.98, 0.97), (0.98, 0.98), (0.92, 0.95)), strict=True):
        cells = []
        for n, guessed in zip((1, 3), guesses, strict=True):
            found = _asked(f"full_order{n}", task)
            cells.append(guess_share(guessed, fmean(right for right, _ in found.values()), len(found)))
        assert f"| {' | '.join(cells)} |" in PAGE


def test_what_was_collected_is_what_the_page_computes() -> None:
    for arm, loss in (("own", LOSS), (INFLLM, LOSS_OF_INFLLM)):
        row = next(x for x in COMPARISONS if (x["arm"], x["task"], x["to"]) == (arm, "documents", ""))
        assert f"{100 * float(row['relative']):+.2f} ± {100 * float(row['relative_error_items']):.2f}" == loss
        for task in TASKS:
            row = next(x for x in COMPARISONS if (x["arm"], x["task"]) == (arm, task))
            found = _retrieval(arm, "full", task)
            assert float(row["value"]) == pytest.approx(found.value.value, abs=1e-6)


def test_the_study_file_makes_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = {(x.name, str(x.config.training.steps), str(x.tokens)) for x in expand(load_study(FOLDER / "study.yaml"))}  # fmt: skip
    assert {(x["run"], x["steps"], x["tokens"]) for x in RUNS} < made
    assert [x["run"] for x in RUNS if x["base"]] == [
        *(f"{arm}_order{n}_from_full_seed31" for n in FIRST for arm in ("full", "own")),
        *(f"{arm}_order3_from_full_seed32" for arm in ("full", "own", INFLLM)),
    ]
    valid = [float(row["valid_loss"]) for row in RUNS if not row["base"]]
    assert "to {:.3f} and {:.3f} nats of validation".format(*valid) in PAGE
    sizes = {row["variant"]: int(row["parameters"]) for row in RUNS}
    assert f"The model of {sizes['full'] / 1e6:.1f}M" in PAGE
    assert f"with {sizes['own'] / 1e6:.1f}M at 25%" in PAGE
    assert {row["step"] for row in RUNS if row["base"]} == {"800"}
    ours, earlier = (path.read_text().splitlines()[1:] for path in (FOLDER / "study.yaml", QUALITY / "branches_ten" / "210m" / "study.yaml"))  # fmt: skip
    changed = {x.split(":")[0].strip(" -{") for x in set(ours) ^ set(earlier)}
    assert changed == {"output", "seeds", "training.steps", "retrieval", "name"}
