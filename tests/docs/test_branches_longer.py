"""The page on longer branches, 210M and others against the losses by document, the answers by sample and the training losses beside it."""

import csv
from statistics import fmean, median

import pytest

from benchmarks import choices
from dash_megatron.studies.paired import Comparison, Measured, compare
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import read_answers, read_words

FOLDER = QUALITY / "branches_longer"
PAGE, STEPS = (read_words(path) for path in (FOLDER.with_suffix(".md"), QUALITY.parent / "training.md"))
ANSWERS = read_answers()
LONG, MEDIUM, OTHERS = "long.{}_order1_from_full_seed7", "210m.{}_order{}_from_full", "others.{}_order1_from_full_seed7"  # fmt: skip
"""Names of runs by arm and, of 210M, order."""


def _read(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open() as file:
        return list(csv.DictReader(file))


DOCUMENTS, SAMPLES, TRAINING, ALONE = (
    _read(f"{name}.csv") for name in ("documents", "samples", "training", "alone")
)


def _compared(rows: list[dict[str, str]], arm: str, full: str, item: str, size: str | None = None) -> str:
    """Mean and standard error over items in percent of full attention's."""

    def measured(run: str) -> Measured:
        sizes = [float(row[size]) if size else 1.0 for row in rows]
        return {(row[item],): (each * float(row[run]), each) for row, each in zip(rows, sizes, strict=True)}

    found: Comparison | None = compare({1: measured(arm)}, {1: measured(full)})
    assert found is not None
    assert found.relative is not None
    return f"{100 * found.relative.value:+.2f} ± {100 * (found.relative.error_items or 0):.2f}"


def _below(arm: str, full: str) -> int:
    return sum(float(row[arm]) < float(row[full]) for row in DOCUMENTS)


def test_differences_by_document_are_those_of_the_page_and_of_the_answers() -> None:
    long = _compared(DOCUMENTS, LONG.format("own"), LONG.format("full"), "document", "tokens")
    assert f"25% ends {long}% below full attention" in PAGE
    assert f"after 2,400 steps {long}%" in ANSWERS
    orders = [
        _compared(DOCUMENTS, MEDIUM.format("own", n), MEDIUM.format("full", n), "document", "tokens")
        for n in (1, 2)
    ]
    first, second = (each.partition(" ")[0] for each in orders)
    assert f"in two orders ({first} and {second}%)" in PAGE
    nsa, infllmv2 = (
        _compared(DOCUMENTS, OTHERS.format(arm), OTHERS.format("full"), "document", "tokens")
        for arm in ("nsa", "infllmv2")
    )
    assert f"**NSA and InfLLMv2 at 25% end {nsa}% and {infllmv2}% above full attention**" in PAGE
    assert nsa in ANSWERS
    assert infllmv2 in ANSWERS


def test_what_the_longer_branch_gave_full_attention() -> None:
    tokens = [float(row["tokens"]) for row in DOCUMENTS]
    short, long, own = (
        sum(float(row[run]) * size for row, size in zip(DOCUMENTS, tokens, strict=True)) / sum(tokens)
        for run in (OTHERS.format("full"), LONG.format("full"), LONG.format("own"))
    )
    assert f"full attention went from {short:.4f} to {long:.4f} nats" in PAGE
    assert round((short - long) / (long - own)) == 13
    before = _read("../branches_second_base/documents.csv")
    runs = (f"{arm}_order1_from_full_seed7" for arm in ("own", "full"))
    assert f"{_compared(before, *runs, 'document', 'tokens')}% in this one" in PAGE


def test_how_many_documents_are_below_full_attention() -> None:
    assert f"{_below(LONG.format('own'), LONG.format('full'))} of {len(DOCUMENTS)} are below" in PAGE
    below = [_below(MEDIUM.format("own", n), MEDIUM.format("full", n)) for n in (1, 2)]
    assert f"{min(below)} to {max(below)} of {len(DOCUMENTS)} documents are below" in PAGE


def _needles(arm: str, names: list[str], nearest: int, furthest: int) -> str:
    there = [
        row
        for row in SAMPLES
        if 1024 * nearest <= (1 - float(row["place"])) * int(row["tokens"]) < 1024 * furthest
    ]
    runs = [name.format(arm) for name in names]
    right = [int(row[run]) for row in there for run in runs]
    nats = fmean(float(row[f"nats.{run}"]) for row in there for run in runs)
    return f"{sum(right)} of {len(right)}, {nats:.2f}"


@pytest.mark.parametrize(
    ("model", "names"),
    [("62M, 2,400 steps", [LONG]), ("210M, 400 steps", [MEDIUM.format("{}", n) for n in (1, 2)])],
)
@pytest.mark.parametrize(("back", "nearest", "furthest"), [("up to 8K", 0, 8), ("8K to 16K", 8, 16)])
def test_needles_by_how_far_back_they_stand(
    model: str, names: list[str], back: str, nearest: int, furthest: int
) -> None:
    cells = [_needles(arm, names, nearest, furthest) for arm in ("full", "own")]
    assert f"| {model}, {back} back | {' | '.join(cells)} |" in PAGE


def test_which_needles_are_missed() -> None:
    back = [round((1 - float(row["place"])) * int(row["tokens"]), -1) for row in SAMPLES]
    missed = sorted(b for b, row in zip(back, SAMPLES, strict=True) if row[LONG.format("own")] == "0")
    assert missed[:3] == [520, 7550, 7690]
    for arm in ("nsa", "infllmv2"):
        found = [b for b, row in zip(back, SAMPLES, strict=True) if row[OTHERS.format(arm)] == "1"]
        assert len(found) == 2
        assert max(found) < 2048
    assert sum(b < 2048 for b in back) == 6
    furthest = [
        row[MEDIUM.format(arm, n)]
        for arm in ("full", "own")
        for n in (1, 2)
        for b, row in zip(back, SAMPLES, strict=True)
        if b > 12 * 1024
    ]
    assert [furthest[:14].count("1"), furthest[14:].count("1")] == [1, 1]


@pytest.mark.parametrize("begin", range(0, 2400, 400))
def test_training_losses_by_step(begin: int) -> None:
    cells = []
    for arm in ("own", "own11"):
        rows = [row for row in TRAINING if begin < int(row["step"]) <= begin + 400 and row[arm]]
        until = f", to step {int(rows[-1]['step']):,}" if rows and int(rows[-1]["step"]) < begin + 400 else ""
        cells.append(_compared(rows, arm, "full", "step") + until if rows else "")
    assert f"| {begin + 1}-{begin + 400} | {' | '.join(cells)} |".replace("|  |", "| |") in PAGE


def test_speed_of_whole_steps_alone() -> None:
    # the first lines have kernels compiled and caches filled
    full, own, own11 = (median(float(row[arm]) for row in ALONE[3:]) for arm in ("full", "own", "own11"))
    for arm, density in (("own", "25%"), ("own11", "11%")):
        share = fmean(float(row[f"density_{arm}"]) for row in ALONE[3:])
        speed = own if arm == "own" else own11
        assert f"| the recipe, {density} | {share:.1%} | {speed / 1000:.1f}K | {speed / full:.2f} |" in STEPS
    assert f"| full attention, FlashAttention-2 | | {full / 1000:.1f}K | |" in STEPS
    assert f"{own / full:.2f} times as fast at 25% and {own11 / full:.2f} times at 11%" in PAGE
    for speed in (full, own, own11):
        assert f"{speed / 1000:.0f}K" in ANSWERS


def _visited(layers: list[tuple[float, float, float]]) -> str:
    """Cells of a model from past density and visited over selected at 8 and at 32 tokens of its layers."""
    densities = [density for density, _, _ in layers]
    whole = (
        sum(d * row[n] for d, row in zip(densities, layers, strict=True)) / sum(densities) for n in (1, 2)
    )
    at_32 = [row[2] for row in layers]
    cells = [str(len(layers)), f"{fmean(densities):.1%}", *(f"{ratio:.2f}" for ratio in whole)]
    return " | ".join([*cells, f"{min(at_32):.2f} to {max(at_32):.2f}"])


def test_chunks_visited_by_routers_with_projections_of_their_own() -> None:
    page = " ".join((QUALITY / "routing.md").read_text().split())
    for name, model in (
        ("shared projections, 800 steps", "d25_c32_w4m16g"),
        ("its own, 2,400 steps", "d25_c32_w4m16gp"),
    ):
        found = [choices.load_selected(model, layer) for layer in choices.layers_of(model)]
        ratios = [choices.visited_over_selected(each, (8, 32)) for each in found]
        layers = [(choices.past_density(x), y[8], y[32]) for x, y in zip(found, ratios, strict=True)]
        assert f"| 62M, {name} (`{model}`) | {_visited(layers)} |" in page
    rows = _read("visited.csv")
    layers = [(float(row["past_density"]), float(row["at_8"]), float(row["at_32"])) for row in rows]
    assert f"| 210M, its own, 400 steps | {_visited(layers)} |" in page
