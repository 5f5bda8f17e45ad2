"""The page on arms of the recipe, and on heads of 128, against the answers by sample and losses beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from dash_megatron.studies.paired import Comparison, Ratio
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    ROOT,
    TASKS,
    Row,
    below,
    compare_losses,
    compare_scores,
    errors,
    larger,
    losses,
    percent,
    places,
    read_pages,
    read_rows,
    read_words,
    rows_at,
    share,
    sure,
    without_one,
)

FOLDER = QUALITY / "branches_arms"
PAGE, ANSWERS, RECIPE, _ = read_pages(FOLDER.with_suffix(".md"))
SAMPLES, DOCUMENTS, NATS, VISITED = (
    read_rows(FOLDER / f"{name}.csv") for name in ("samples", "documents", "answers", "visited")
)
RUNS, COMPARISONS = (
    {study: read_rows(FOLDER / study / f"{name}.csv") for study in ("", "heads")}
    for name in ("results", "comparisons")
)
LENGTHS = (4096, 8192, 16384)
COLUMNS = list(DOCUMENTS[0])[4:]
ORDERS = {
    arm: tuple(n for n in (1, 2) if f"{arm}_order{n}" in COLUMNS)
    for arm in dict.fromkeys(column.rpartition("_order")[0] for column in COLUMNS)
}
HEADS = [arm for arm in ORDERS if arm.startswith("heads_")]
OWN = ("recipe_25", "recipe_11")
ARMS = [arm for arm in ORDERS if arm[-2:] in {"25", "11"} and arm not in (*OWN, *HEADS)]


def _recipe(arm: str) -> str:
    """What an arm is compared with: the recipe at its density."""
    return f"recipe_{arm[-2:]}"


def _full(arm: str) -> str:
    return "heads_full" if arm in HEADS else "full"


def _documents(arm: str, reference: str, rows: Sequence[Row] = DOCUMENTS, order: int = 0) -> Comparison:
    return compare_losses(arm, reference, (order,) if order else ORDERS[arm], rows)


def _answers(arm: str, reference: str, task: str, length: int = 16384) -> Comparison:
    rows = [row for row in SAMPLES if row["length"] == str(length)]
    return compare_scores(arm, reference, task, ORDERS[arm], rows)


def _line(cells: Iterable[str]) -> str:
    """A line of a table, with one space between words, as the page is read."""
    return " ".join(f"| {' | '.join(cells)} |".split())


def _apart(found: Ratio) -> str:
    return f"{found.value:+.3f}{errors(found, digits=3)}"


def _beyond(found: Comparison) -> str:
    return {"unknown": "one order", "within": "no", "above": "above", "below": "below"}[found.verdict]


def _of_61(arm: str, reference: str) -> str:
    return " and ".join(map(str, below(arm, reference, ORDERS[arm], DOCUMENTS)))


def _short(found: Ratio | None) -> str:
    """A difference in percent with the larger of its errors."""
    return f"{100 * sure(found).value:+.2f} ± {100 * larger(sure(found)):.2f}"


def _short_share(found: Ratio | None) -> str:
    return f"{1 + sure(found).value:.3f} ± {larger(sure(found)):.3f}"


def to_the_recipe(arm: str) -> str:
    found = _documents(arm, _recipe(arm))
    answers = (_apart(_answers(arm, _recipe(arm), task).difference) for task in TASKS)
    cells = [f"`{arm}`", percent(found.relative), _beyond(found), percent(found.median), _of_61(arm, _recipe(arm)), *answers]  # fmt: skip
    return _line(cells)


def to_full(arm: str) -> str:
    found = _documents(arm, "full")
    by_order = [percent(_documents(arm, "full", order=n).relative) for n in ORDERS[arm]]
    shares = (share(_answers(arm, "full", task).relative) for task in TASKS)
    cells = [f"`{arm}`", percent(found.relative), _beyond(found), *[*by_order, ""][:2], *shares]
    return _line(cells)


def found_by_length(arm: str) -> str:
    cells = (" ".join(f"{_answers(arm, arm, task, length).reference:.3f}" for length in LENGTHS) for task in TASKS)  # fmt: skip
    return _line([f"`{arm}`", *cells])


def share_by_length(arm: str, task: str) -> str:
    cells = (share(_answers(arm, _full(arm), task, length).relative) for length in LENGTHS)
    return _line([f"`{arm}`, {task}", *cells])


POSITIONS = ("before_rope_25", "conv_25", "means4_of_64_25", "before_rope_11", "rise_11", "teach_11")


def by_position(place: tuple[int, int]) -> str:
    name, rows = rows_at(place, DOCUMENTS)
    cells = [percent(_documents(arm, "full", rows).relative) for arm in OWN]
    cells += [percent(_documents(arm, _recipe(arm), rows).relative) for arm in POSITIONS]
    return _line([name, *cells])


def _tiles(arm: str, tile: int) -> tuple[float, float]:
    """Visited over selected pairs, of all layers together and as a mean of layers."""
    rows = [row for row in VISITED if row["arm"] == arm]
    selected, visited = ([float(row[f"at_{n}"]) for row in rows] for n in (1, tile))
    return sum(visited) / sum(selected), fmean(b / a for a, b in zip(selected, visited, strict=True))


def tiles(arm: str) -> str:
    rows = [float(row["at_1"]) for row in VISITED if row["arm"] == arm]
    loss = "" if arm in OWN else _short(_documents(arm, _recipe(arm), order=1).relative)
    cells = [f"{fmean(rows):.1%}", f"{_tiles(arm, 8)[0]:.2f}", f"{_tiles(arm, 32)[0]:.2f}", f"{_tiles(arm, 32)[1]:.2f}", loss]  # fmt: skip
    return _line([f"`{arm}`", *cells])


def of_heads(arm: str) -> str:
    found = _documents(arm, "heads_full")
    shares = (share(_answers(arm, "heads_full", task).relative) for task in TASKS)
    cells = [f"`{arm.removeprefix('heads_')}`", percent(found.relative), percent(found.median), _of_61(arm, "heads_full"), *shares]  # fmt: skip
    return _line(cells)


# by arm, and what it is compared with: points that were predicted, for order 1
PREDICTED = {
    ("recipe_25", "full"): -0.40,
    ("recipe_11", "full"): 0.35,
    ("before_rope_25", "recipe_25"): 0.20,
    ("before_rope_11", "recipe_11"): 0.40,
    ("means2_25", "recipe_25"): -0.05,
    ("means2_11", "recipe_11"): -0.10,
    ("means4_of_64_25", "recipe_25"): 0.15,
    ("means4_of_64_11", "recipe_11"): 0.20,
    ("of_64_25", "recipe_25"): 0.45,
    ("conv_25", "recipe_25"): -0.50,
    ("conv_11", "recipe_11"): -0.60,
    ("full_conv", "full"): -0.50,
    ("conv_25", "full_conv"): 0.0,
    ("rise_25", "recipe_25"): 0.10,
    ("rise_11", "recipe_11"): 0.15,
    ("teach_25", "recipe_25"): -0.10,
    ("teach_11", "recipe_11"): -0.15,
    ("heads_recipe_25", "heads_full"): -0.20,
    ("heads_recipe_11", "heads_full"): 0.50,
}


def _wrong(pair: tuple[str, str]) -> bool:
    """Whether order 1 is two standard errors over documents and more from what was predicted."""
    found = sure(_documents(*pair, order=1).relative)
    return abs(100 * found.value - PREDICTED[pair]) >= 200 * larger(found)


NAMES = {
    "before_rope": "routing before RoPE",
    "means2": "two means a chunk",
    "means4_of_64": "chunks of 64, four means",
    "of_64": "chunks of 64, one mean",
    "conv": "keys convolved",
    "rise": "α and density that change over 200 steps",
    "teach": "a taught router",
}


def in_evidence(arm: str) -> str:
    pairs = [(f"{arm}_{density}", f"recipe_{density}") for density in ("25", "11")]
    more, less = (_short(_documents(*pair).relative) if pair[0] in ORDERS else "not run" for pair in pairs)
    return _line([NAMES[arm], more, ("one", "two")[len(ORDERS[f"{arm}_25"]) - 1], less])


def predicted(pair: tuple[str, str]) -> str:
    arm, reference = pair
    bold = "**" if _wrong(pair) else ""
    first = percent(_documents(arm, reference, order=1).relative)
    both = percent(_documents(arm, reference).relative) if len(ORDERS[arm]) == 2 else ""
    return _line([f"`{arm}` to `{reference}`", f"{PREDICTED[pair]:+.2f}", f"{bold}{first}{bold}", both])


@pytest.mark.parametrize("arm", ARMS)
def test_arms_to_the_recipe(arm: str) -> None:
    assert to_the_recipe(arm) in PAGE


@pytest.mark.parametrize("arm", ["full_conv", *OWN, *ARMS])
def test_arms_to_full_attention(arm: str) -> None:
    assert to_full(arm) in PAGE


@pytest.mark.parametrize("arm", ORDERS)
def test_what_each_finds_by_length(arm: str) -> None:
    assert found_by_length(arm) in PAGE


@pytest.mark.parametrize(("arm", "task"), itertools.product(OWN, TASKS))
def test_shares_of_the_recipe_by_length(arm: str, task: str) -> None:
    assert share_by_length(arm, task) in PAGE


@pytest.mark.parametrize("place", places(DOCUMENTS), ids=str)
def test_losses_by_position(place: tuple[int, int]) -> None:
    assert by_position(place) in PAGE


@pytest.mark.parametrize("arm", dict.fromkeys(row["arm"] for row in VISITED))
def test_tiles_visited(arm: str) -> None:
    assert tiles(arm) in PAGE


@pytest.mark.parametrize("arm", HEADS[1:])
def test_heads_of_128(arm: str) -> None:
    assert of_heads(arm) in PAGE


@pytest.mark.parametrize("pair", PREDICTED, ids=str)
def test_what_was_predicted(pair: tuple[str, str]) -> None:
    assert predicted(pair) in PAGE


def test_no_arm_ends_below_the_recipe() -> None:
    assert "**No arm ends below the recipe beyond two standard errors**" in PAGE
    for arm in ARMS:
        relative = sure(_documents(arm, _recipe(arm)).relative)
        assert relative.value > -2 * larger(relative)
    above = [arm for arm in ARMS if _documents(arm, _recipe(arm)).verdict == "above"]
    assert above == ["before_rope_25"]
    found = {
        (arm, task): _answers(arm, _recipe(arm), task).verdict
        for arm, task in itertools.product(ARMS, TASKS)
        if len(ORDERS[arm]) == 2
    }
    assert [key for key, verdict in found.items() if verdict in {"above", "below"}] == [("means4_of_64_25", TASKS[1])]  # fmt: skip
    assert f"one of {len(found)} such comparisons of two orders" in PAGE


def test_the_first_lines() -> None:
    to_recipe = {arm: percent(_documents(arm, _recipe(arm)).relative).strip("+") for arm in ARMS}
    told = "**Routing before RoPE loses {} points at 25%**, in both of two orders, and {} at 11%"
    assert told.format(to_recipe["before_rope_25"], to_recipe["before_rope_11"]) in PAGE
    told = "At 11% a router that was taught ends {} points behind the recipe, an α that rises {}"
    assert told.format(to_recipe["teach_11"], to_recipe["rise_11"]) in PAGE
    full, own, low = (percent(_documents(*pair).relative) for pair in (("full_conv", "full"), ("conv_25", "full_conv"), ("conv_11", "full_conv")))  # fmt: skip
    assert f"full attention with convolved keys has {full}% to full attention" in PAGE
    assert f"the recipe with them {own}% to that, {low}% at 11%" in PAGE
    assert f"The recipe has {percent(_documents('recipe_25', 'full').relative)}% at 25%" in PAGE
    assert f"and {percent(_documents('recipe_11', 'full').relative)}% at 11% in one order" in PAGE
    of_64 = _documents("of_64_25", "recipe_25").relative, _documents("of_64_25", "full").relative
    assert "chunks of 64 with one mean have {} points to the recipe and {}% to full".format(*map(percent, of_64)) in PAGE  # fmt: skip
    for arm in ("means2_11", "means4_of_64_11", "conv_11"):
        cells = (_apart(_answers(arm, "recipe_11", task).difference) for task in TASKS[:2])
        assert "`{}` {} and {}".format(arm, *cells) in PAGE
    heads = [percent(_documents(arm, "heads_full").relative) for arm in HEADS[1:]]
    assert "end {}% to their own full attention at 25% and {}% at 11%".format(*heads) in PAGE
    apart = percent(_documents("heads_chunks16_25", "heads_recipe_25").relative)
    assert f"chunks of 16 with 8 local ones have {heads[2]}%, {apart} points to chunks of 32" in PAGE


def test_the_document_that_matters_most_to_convolved_keys() -> None:
    first, second = (percent(_documents("conv_25", "recipe_25", order=n).relative) for n in (1, 2))
    rest = without_one("conv_25", "recipe_25", (1, 2), DOCUMENTS)
    median = percent(_documents("conv_25", "recipe_25").median)
    assert f"By order it has {first} and {second} points to the recipe, the median document {median}%, and without the one document that matters most it is {rest}" in PAGE  # fmt: skip
    median = percent(_documents("conv_25", "full_conv").median)
    assert f"To `full_conv` the median document has {median}%" in PAGE


def test_what_the_text_says_of_answers() -> None:
    by_order = [
        compare_scores(arm, arm, TASKS[2], (2,), [x for x in SAMPLES if x["length"] == "4096"]).reference
        for arm in ("full", "recipe_25")
    ]
    assert "it finds {:.3f} of recall at 4K, the recipe {:.3f}".format(*by_order) in PAGE
    few = [sure(_answers("recipe_11", "full", task, length).relative).value for length in (4096, 8192) for task in TASKS]  # fmt: skip
    assert min(few[:2]) > -0.0105
    told = "**At 11% it finds the needles of 4K**, {:.2f} of recall there, and {:.2f} to {:.2f} of all at 8K."
    assert told.format(1 + few[2], 1 + min(few[3:]), 1 + max(few[3:])) in PAGE
    told = "finds {} of the single needles, {} of multi-key ones and {} of recall"
    shares = [[_answers(own, "full", task).relative for task in TASKS] for own in OWN]
    assert told.format(*map(share, shares[0])) in PAGE
    assert told.format(*map(share, shares[1])) in PAGE
    assert f"{_apart(_answers('teach_11', 'recipe_11', TASKS[2]).difference)} of recall" in PAGE
    assert f"multi-key needles by {_apart(_answers('means4_of_64_25', 'recipe_25', TASKS[1]).difference).strip('+')}" in PAGE  # fmt: skip


def test_predictions_that_were_wrong_are_named() -> None:
    wrong = [pair for pair in PREDICTED if _wrong(pair)]
    assert f"**Wrong were {len(wrong)} of {len(PREDICTED)}**" in PAGE
    shares = {
        (own, length): sure(_answers(own, "full", TASKS[0], length).relative)
        for own in OWN
        for length in LENGTHS
    }
    cells = (f"{1 + shares[key].value:.3f}" for key in ((OWN[0], 16384), (OWN[1], 16384), (OWN[0], 4096), (OWN[1], 4096)))  # fmt: skip
    assert "0.93 and 0.80 at 16K and 0.98 at 4K; they are {} and {}, and {} and {}".format(*cells) in PAGE


@pytest.mark.parametrize("arm", NAMES)
def test_the_page_of_every_figure_has_the_arms(arm: str) -> None:
    assert in_evidence(arm) in ANSWERS


def test_what_other_pages_say() -> None:
    own, low = (_documents(arm, "full").relative for arm in OWN)
    shares, few = ([_answers(arm, "full", task).relative for task in TASKS] for arm in OWN)
    assert f"| 62M, 400 steps, 10% retrieval text | {_short(own)}% | two | fourteenth |" in ANSWERS
    cells = " | ".join(map(_short_share, few))
    assert f"| 62M, 400 steps, 10% retrieval text | {_short(low)}% | {cells} | one | fourteenth |" in ANSWERS
    assert "it is {}, {} and {} of the three.".format(*map(_short_share, shares)) in ANSWERS
    assert "{}, {} and {} at 16K".format(*map(_short_share, few)) in ANSWERS
    heads = [_short(_documents(arm, "heads_full").relative) for arm in HEADS[1:]]
    assert "{}%, at 11% {}%, with chunks of 16 {}%".format(*heads) in ANSWERS
    assert "{}% to their own full attention at 25%, {}% at 11% and {}% with chunks of 16".format(*heads) in ANSWERS  # fmt: skip
    assert "{}% to their own full attention at 25% and {}% at 11%".format(*heads) in RECIPE
    conv, beside = (_short(_documents(*pair).relative) for pair in (("full_conv", "full"), ("conv_25", "full_conv")))  # fmt: skip
    assert f"with convolved keys has {conv}% to full attention, the recipe with them {beside}%" in ANSWERS
    assert f"Full attention gains {conv.strip('-')}% from convolved keys" in ANSWERS
    assert f"({_short(_documents('of_64_25', 'full').relative)}% to full attention, one order)" in ANSWERS
    assert f"level with 32 ({_short(_documents('of_64_25', 'recipe_25').relative)} points at 25%" in RECIPE
    assert f"after 400 steps on another ({_short(low)}%, one order)" in RECIPE
    before = [_short(_documents(f"before_rope_{d}", f"recipe_{d}").relative).strip("+") for d in ("25", "11")]
    assert "loses {} points, {} at 11%".format(*before) in RECIPE
    told = f"loses {_short(_documents('rise_11', 'recipe_11').relative).strip('+')} points at 11%"
    assert told in read_words(ROOT / "docs" / "configuration-evidence.md")


def test_retrieval_at_4k_and_8k_on_other_pages() -> None:
    of = {
        (arm, task, length): _answers(arm, "full", task, length).relative
        for arm, task, length in itertools.product(OWN, TASKS, LENGTHS[:2])
    }

    def least(arm: str, lengths: Sequence[int]) -> Ratio:
        return min((sure(of[arm, task, n]) for task in TASKS[:2] for n in lengths), key=lambda x: x.value)

    needles, recall = least(OWN[0], LENGTHS[:2]), of[OWN[0], TASKS[2], 8192]
    assert f"25% finds at least {_short_share(needles)} of needles there and {_short_share(recall)} of recall at 8K" in ANSWERS  # fmt: skip
    near, far = (least(OWN[1], (n,)) for n in LENGTHS[:2])
    assert f"11% finds at least {_short_share(near)} of needles at 4K, {_short_share(far)} at 8K" in ANSWERS
    told = "25% finds at least {:.2f} of the needles that full attention finds, and {:.2f} of recall at 8K"
    assert told.format(1 + needles.value, 1 + sure(recall).value) in RECIPE
    single, multi, pairs = (1 + sure(of[OWN[1], task, 8192]).value for task in TASKS)
    assert f"11% finds {multi:.2f} to {single:.2f} of needles and {pairs:.2f} of recall at 8K" in RECIPE


@pytest.mark.parametrize(("arm", "label"), [(OWN[0], "400 steps ([branches_arms](branches_arms.md#tiles-visited))"), (OWN[1], "400 steps, at 11%")])  # fmt: skip
def test_tiles_visited_on_other_pages(arm: str, label: str) -> None:
    rows = [[float(row[f"at_{n}"]) for n in (1, 32)] for row in VISITED if row["arm"] == arm]
    whole, ratios = [_tiles(arm, n)[0] for n in (8, 32)], [visited / selected for selected, visited in rows]
    cells = [f"{fmean(selected for selected, _ in rows):.1%}", *(f"{x:.2f}" for x in whole), f"{min(ratios):.2f} to {max(ratios):.2f}"]  # fmt: skip
    assert f"| 62M, its own, {label} | {len(rows)} | {' | '.join(cells)} |" in read_words(QUALITY / "routing.md")  # fmt: skip
    assert f"{whole[1]:.2f} times" in ANSWERS
    assert f"{whole[1]:.2f}" in RECIPE


def test_what_was_collected_is_what_the_page_computes() -> None:
    for study, row in ((study, row) for study, rows in COMPARISONS.items() for row in rows):
        arm, task = f"{study and study + '_'}{row['arm']}", row["task"]
        if row["arm"] == "full" or task == "loss" or row["to"]:
            continue
        if task == "documents":
            found = sure(_documents(arm, _full(arm)).relative)
        else:
            found = sure(_answers(arm, _full(arm), task, int(row["length"])).relative)
        assert float(row["relative"]) == pytest.approx(found.value, abs=2e-6)
        for over, error in (("items", found.error_items), ("orders", found.error_orders)):
            assert (row[f"relative_error_{over}"] == "") == (error is None)
            assert float(row[f"relative_error_{over}"] or 0) == pytest.approx(error or 0, abs=2e-6)
    for row in NATS:
        answers = [float(x[row["run"]]) for x in SAMPLES if (x["task"], x["length"]) == (row["task"], row["length"])]  # fmt: skip
        assert (int(row["samples"]), float(row["score"])) == (len(answers), pytest.approx(fmean(answers), abs=1e-6))  # fmt: skip


def test_the_study_files_make_the_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    study = yaml.safe_load((FOLDER / "study.yaml").read_text())
    arms = study["branches"]["arms"]
    assert {arm["name"] for arm in arms} == {row["variant"] for row in RUNS[""]}
    # the others have keys that only the patch knows
    patch = (FOLDER / "arms.patch").read_text()
    study["branches"]["arms"] = [
        arm for arm in arms if not any(f"+    {key.removeprefix('attention.')}: " in patch for key in arm)
    ]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    for path, rows in ((tmp_path / "study.yaml", RUNS[""]), (FOLDER / "heads" / "study.yaml", RUNS["heads"])):
        made = {(x.name, str(x.config.training.steps), str(x.tokens)) for x in expand(load_study(path))}
        variants = {name.partition("_order")[0].partition("_seed")[0] for name, *_ in made}
        known = {(x["run"], x["steps"], x["tokens"]) for x in rows if x["variant"] in variants}
        assert len(known) >= 5
        assert known < made
    names = {x["run"].partition("_from")[0] for x in RUNS[""] if x["base"]}
    heads = {"heads_" + x["run"].partition("_from")[0] for x in RUNS["heads"] if x["base"]}
    assert names | heads == set(COLUMNS)


def test_how() -> None:
    (base, heads) = ([x for x in RUNS[study] if not x["base"]] for study in ("", "heads"))
    told = "Bases of {:.1f}M end at {:.3f} (seed 71) and {:.3f} nats of validation (seed 72, heads of 128)"
    assert told.format(int(base[0]["parameters"]) / 1e6, float(base[0]["valid_loss"]), float(heads[0]["valid_loss"])) in PAGE  # fmt: skip
    tokens = sum(size for _, size in losses(COLUMNS[0], DOCUMENTS).values())
    assert f"the first 16K tokens count, {tokens / 1000:.0f}K in all" in PAGE
    densities = {d: [100 * float(x["density"]) for rows in RUNS.values() for x in rows if x["variant"].endswith(d)] for d in ("25", "11")}  # fmt: skip
    spans = (f"{min(found):.1f} to {max(found):.1f}%" for found in densities.values())
    assert "is {} at 25% and {} at 11%".format(*spans) in PAGE
    loss = _documents("recipe_25", "full").reference, _documents("heads_recipe_25", "heads_full").reference
    assert "Full attention has {:.4f} nats, with heads of 128 {:.4f}".format(*loss) in PAGE
