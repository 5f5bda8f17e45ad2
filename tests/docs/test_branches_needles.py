"""The page on what finds more needles against the losses by document, the answers by sample and the probe beside it."""

import csv
from math import hypot
from statistics import fmean, stdev

import pytest
import yaml

from dash_megatron.studies.paired import Comparison
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    TASKS,
    Row,
    below,
    compare_all,
    compare_losses,
    compare_scores,
    errors,
    losses,
    percent,
    read_pages,
    read_rows,
    share,
    without_one,
)

FOLDER = QUALITY / "branches_needles"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
ORDERS = (1, 2, 3)
DOCUMENTS, SAMPLES, PROBE, WRONG, CHANGED = (
    read_rows(FOLDER / f"{name}.csv") for name in ("documents", "samples", "probe", "wrong_digits", "changed")
)


def _documents(arm: str, reference: str, orders: tuple[int, ...] = (1,), rows: list[Row] = DOCUMENTS) -> Comparison:  # fmt: skip
    return compare_losses(arm, reference, orders, rows)


def _retrieval(arm: str, reference: str, task: str, orders: tuple[int, ...] = (1,)) -> Comparison:
    return compare_scores(arm, reference, task, orders, SAMPLES)


def _cell(found: Comparison) -> str:
    return f"{found.value.value:.3f}, {found.difference.value:+.3f}{errors(found.difference, digits=3)}"


def test_three_orders_to_more_digits() -> None:
    own = [share(_retrieval("own", "full", task, ORDERS).relative) for task in TASKS]
    assert "single needles {}, multi-key needles {}, recall {}.".format(*own) in PAGE
    others = [share(_retrieval("infllmv2_25", "own", task, ORDERS).relative) for task in TASKS]
    assert "InfLLMv2 has {}, {} and {} of what the recipe finds".format(*others) in PAGE
    behind = _documents("infllmv2_25", "own", ORDERS)
    assert f"{percent(behind.relative)} points behind the recipe" in PAGE
    assert f"to the recipe at {percent(behind.median)}%" in PAGE
    by_order = [percent(_documents("own", "full", (n,)).relative).split(" ")[0] for n in ORDERS]
    assert "by order 25% has {}, {} and {}% here".format(*by_order) in PAGE
    found = [f"{_retrieval('own', 'full', TASKS[0], (n,)).value.value:.3f}" for n in ORDERS]
    assert "itself finds {}, {} and {} of single needles".format(*found) in PAGE


def test_how_many_documents_are_below_full_attention() -> None:
    counts = below("own", "full", ORDERS, DOCUMENTS)
    assert f"{min(counts)} to {max(counts)} of {len(DOCUMENTS)} are below full attention at 25%" in PAGE
    own, infllm = (without_one(arm, "full", ORDERS, DOCUMENTS) for arm in ("own", "infllmv2_25"))
    assert f"matters most takes 25% to {own}, InfLLMv2 to {infllm}" in PAGE


@pytest.mark.parametrize("far", [False, True])
def test_needles_by_how_far_back_they_stand(far: bool) -> None:
    found = [
        [
            float(row[f"{arm}_order{n}"])
            for row in SAMPLES
            if row["task"] == TASKS[0]
            and ((1 - float(row["place"])) * int(row["tokens"]) >= 14 * 1024) == far
            for n in ORDERS
        ]
        for arm in ("own", "full")
    ]
    own, full = (f"{sum(x):.0f}" for x in found)
    text = "further back {} and {} of {}" if far else "25% finds {1} of {2} and full attention {0}"
    sides = (own, full) if far else (full, own)
    assert text.format(*sides, len(found[0])) in PAGE


def _bases(task: str) -> list[tuple[float, float, float]]:
    """Share or difference to full attention with its errors over items and orders, base by base."""
    found = []
    for name in ("branches_projections", "branches_second_base", "branches_needles/orders"):
        with (QUALITY / name / "comparisons.csv").open() as file:
            row = next(
                row
                for row in csv.DictReader(file)
                if (row["arm"], row["task"], row["to"], row["evaluation"] != "training")
                == ("own", task, "", True)
            )
        value, *errors = (float(row[f"relative{part}"]) for part in ("", "_error_items", "_error_orders"))
        found.append((100 * value if task == "documents" else 1 + value, *errors))
    return found


def test_shares_over_three_bases() -> None:
    shares = [[value for value, _, _ in _bases(task)] for task in TASKS]
    means = [f"{fmean(x):.2f} ± {stdev(x) / 3**0.5:.2f}" for x in shares]
    differences = [value for value, _, _ in _bases("documents")]
    mean = f"{fmean(differences):+.2f}"
    assert (
        f"| mean, ± over bases | {' | '.join(means)} | {mean} ± {stdev(differences) / 3**0.5:.2f} |" in PAGE
    )
    spread = [f"{stdev(x):.2f}" for x in (*shares, differences)]
    assert f"| standard deviation of a base | {' | '.join(spread)} |" in PAGE
    over_items = [hypot(*(error for _, error, _ in _bases(task))) / 3 for task in TASKS]
    # the first two bases have the same documents
    with (QUALITY / "branches_second_base" / "documents.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"order{n}_from_full{seed}" for seed in ("", "_seed7") for n in ORDERS]
    two = compare_all(
        *({n: losses(f"{arm}_{name}", rows) for n, name in enumerate(names)} for arm in ("own", "full"))
    ).relative
    third = _documents("own", "full", ORDERS).relative
    assert two is not None
    assert third is not None
    documents, orders = (
        100 * hypot(2 * (first or 0), second or 0) / 3
        for first, second in ((two.error_items, third.error_items), (two.error_orders, third.error_orders))
    )
    assert (
        "errors of {:.2f}, {:.2f}, {:.2f} and {:.2f}.".format(*(round(x, 2) for x in (*over_items, documents)))
        in PAGE
    )  # fmt: skip
    ends = f"{mean.strip('-')} ± {max(documents, orders):.2f}%"
    assert f"With 5% it is {ends} below" in ANSWERS
    assert f"**With 5% retrieval text** it ends {ends} below full attention" in RECIPE
    assert f"**{mean}% ± {max(documents, orders):.2f}%**" in README
    for text in (ANSWERS, RECIPE):
        assert f"{means[0]} of " in text or f"{means[0]} of the single needles" in text
    values, errors = zip(*(each.split(" ± ") for each in means), strict=True)
    assert f"{', '.join(values)} (± {', '.join(errors)})" in README


@pytest.mark.parametrize(
    ("arm", "full", "other"),
    [("c16", "full", "own"), ("overlap", "full", "own"), ("late", "full", "own"), ("ret10", "full_ret10", "own"),
     ("full_ret10", "", "full"), ("late_ret10", "full_ret10", "ret10"), ("three", "full_ret10", "ret10")],
)  # fmt: skip
def test_arms_are_compared_by_document_and_sample(arm: str, full: str, other: str) -> None:
    to_full = f" {percent(_documents(arm, full).relative)}" if full else ""
    cells = [
        percent(_documents(arm, other).relative),
        *(_cell(_retrieval(arm, other, task)) for task in TASKS),
    ]
    assert f"| `{arm}` |{to_full} | `{other}` | {' | '.join(cells)} |" in PAGE


def _moved(arm: str, other: str, task: str) -> str:
    pairs = [
        (row[f"{arm}_order1"], row[f"{other}_order1"]) for row in SAMPLES if row["task"] == task
    ]  # fmt: skip
    return f"{pairs.count(('1', '0'))} and {pairs.count(('0', '1'))}"


def test_what_more_retrieval_text_does() -> None:
    assert [_moved("ret10", "own", task) for task in (TASKS[0], TASKS[2])] == ["9 and 0", "36 and 1"]
    assert "9 single needles of 128 are gained and none is lost, and of recall 36 and 1" in PAGE
    assert [_moved("full_ret10", "full", task) for task in (TASKS[0], TASKS[2])] == ["4 and 0", "36 and 4"]
    assert "Full attention gains 4 and none, and 36 and 4" in PAGE
    missed = [
        {row["sample"] for row in SAMPLES if row["task"] == TASKS[0] and row[f"{arm}_order1"] == "0"}
        for arm in ("ret10", "full_ret10")
    ]
    assert missed[0] == missed[1]
    assert len(missed[0]) == 2
    before = [share(_retrieval("own", "full", task).relative) for task in TASKS]
    assert "the shares of this order are {}, {} and {}:".format(*before) in PAGE
    after = [share(_retrieval("ret10", "full_ret10", task).relative) for task in TASKS[1:]]
    assert "multi-key needles to {}, recall to {}.".format(*after) in PAGE
    full, own = (_documents(f"{arm}ret10", other) for arm, other in (("full_", "full"), ("", "own")))
    assert (
        f"full attention {percent(full.relative)}%, the recipe {percent(own.relative)} points (from "
        f"{percent(_documents('own', 'full').relative)[:5]} to {percent(_documents('ret10', 'full').relative)[:5]}%"
        in PAGE
    )
    assert f"In the median document it is {percent(full.median)}% and {percent(own.median)}." in PAGE
    found = [f"{_retrieval('ret10', 'own', task).value.value:.3f}" for task in TASKS]
    assert "{} of single needles, {} of multi-key ones and {} of recall, where it finds".format(*found) in PAGE  # fmt: skip


def _probed(arm: str, digits: str, what: str) -> float:
    """Of the head that finds digits."""
    head = ("layer", "4"), ("kv_head", "0"), ("arm", arm), ("digits", digits)
    return float(next(row for row in PROBE if all(row[key] == value for key, value in head))[what])


def test_what_is_missed_is_selected() -> None:
    assert [_probed("own", digits, "digit_in") for digits in ("right", "wrong")] == [1, 1]
    assert [f"{_probed(arm, 'right', 'digit_mass'):.2f}" for arm in ("full", "own")] == ["0.89", "0.86"]
    assert "it puts 0.89 of its attention on the digit if it is right, at 25% 0.86" in PAGE
    masses = [float(row["digit_mass"]) for row in PROBE if (row["layer"], row["kv_head"]) != ("4", "0")]
    assert max(masses) <= 0.001
    wrong = [
        _probed(arm, "wrong", what)
        for arm, what in (("own", "digit_mass"), ("full", "digit_mass"), ("own", "free_mass"))
    ]
    assert (
        "{:.2f} of its attention, with full attention {:.2f}, and without selection and prior it would be {:.2f}".format(
            *wrong
        )
        in PAGE
    )  # fmt: skip
    selected, past = (_probed("own", "right", what) for what in ("selected", "routed"))
    assert f"It selects {selected:.0f} of {past:.0f} past chunks" in PAGE
    digits = {arm: [row for row in WRONG if row["arm"] == arm] for arm in ("own", "full", "c16")}
    assert [len(rows) for rows in digits.values()] == [5, 4, 5]
    answers = [{row["sample"] for row in digits[arm]} for arm in ("own", "full")]
    assert [len(answers[0]), len(answers[1]), len(answers[0] & answers[1])] == [4, 2, 1]
    outside = [row for row in digits["c16"] if row["digit_in"] == "0"]
    assert [f"{float(row['free_mass']):.2f}" for row in outside] == ["0.99", "0.87"]
    assert len({row["sample"] for row in outside}) == 1


def test_changes_after_training() -> None:
    for row in CHANGED:
        share, found, nats = (float(row[name]) for name in ("density", "single", "nats"))
        assert f"| {row['case']} | {share:.1%} | {found:.3f} | {nats:.4f} |" in PAGE
    for arm, now, before in (("full", 128, 122), ("own", 125, 117)):
        runs = [[row[f"{how}{arm}_order1"] for row in SAMPLES if row["task"] == TASKS[0]] for how in ("yarn.", "")]  # fmt: skip
        assert [run.count("1") for run in runs] == [now, before]
        assert f"{now} of 128 in place of {before}" in PAGE or f"{now} in place of {before}" in PAGE


def test_the_study_file_of_arms_names_the_runs() -> None:
    study = yaml.safe_load((FOLDER / "arms" / "study.yaml").read_text())
    names = {f"{arm['name']}_order1_from_full_seed7" for arm in study["branches"]["arms"]}
    assert {row["run"] for row in read_rows(FOLDER / "arms/results.csv")} == names | {"full_seed7"}
    assert {row["run"] for row in read_rows(FOLDER / "arms/answers.csv")} == names
