"""The page on bases, where it compares branches of sparse bases with those of dense ones, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist, correlation, fmean, median, stdev

from dash_megatron.config import load_config
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    ROOT,
    TASKS,
    compare_all,
    losses,
    mean_loss,
    percent,
    read_rows,
)
from tests.docs.test_bases import ANSWERS, EVIDENCE, FIFTH, FOLDER, PAGE, README, RECIPE

BASE_LOSSES, BRANCH_LOSSES, DOCUMENTS, SAMPLES = (
    read_rows(FOLDER / f"{name}.csv") for name in ("losses", "branches", "documents_16k", "samples")
)
SIX = (3, 4, 5, 6, 7, 8)
SEVEN = (0, *SIX)
"""Initial weights. The first pair went on from bases that were trained again, and has no documents."""
KINDS = ("full", "plain")


@dataclass(frozen=True)
class Pairs:
    """Values of the dense and of the sparse one of each pair."""

    dense: list[float]
    sparse: list[float]

    @property
    def value(self) -> float:
        """What the sparse ones have more, in the mean."""
        return fmean(self.sparse) - fmean(self.dense)

    @property
    def spreads(self) -> list[float]:
        """Standard deviations of dense ones, of sparse ones, and of the difference."""
        apart = [y - x for x, y in zip(self.dense, self.sparse, strict=True)]
        return [stdev(each) for each in (self.dense, self.sparse, apart)]

    @property
    def independent(self) -> float:
        """The standard error if a pair has nothing in common."""
        dense, sparse, _ = self.spreads
        return float(((dense**2 + sparse**2) / len(self.dense)) ** 0.5)

    @property
    def paired(self) -> float:
        """The standard error over pairs."""
        return float(self.spreads[2] / len(self.dense) ** 0.5)

    @property
    def alike(self) -> float:
        return correlation(self.dense, self.sparse)


def _percent(dense: Sequence[float], sparse: Sequence[float]) -> Pairs:
    """Losses in percent of the dense ones' mean."""
    unit = fmean(dense) / 100
    return Pairs([x / unit for x in dense], [x / unit for x in sparse])


def _document_loss(run: str) -> float:
    items = losses(run, DOCUMENTS).values()
    return sum(loss for loss, _ in items) / sum(tokens for _, tokens in items)


def _base(kind: str, initial: int) -> str:
    return f"{kind}{initial}" if initial else f"{kind}0_again"


def _bases(initial: Sequence[int]) -> Pairs:
    return _percent(
        *([mean_loss(_base(kind, n), (1001, 1200), BASE_LOSSES) for n in initial] for kind in KINDS)
    )


def _training(initial: Sequence[int]) -> Pairs:
    return _percent(
        *([mean_loss(f"own_{kind}{n}", (301, 400), BRANCH_LOSSES) for n in initial] for kind in KINDS)
    )


def _retrieval(task: str, initial: Sequence[int]) -> Pairs:
    """Shares of the samples that all have."""
    rows = [row for row in SAMPLES if row["task"] == task and row["own_full3"]]
    assert len(rows) == 64
    return Pairs(*([fmean(float(x[f"own_{kind}{n}"]) for x in rows) for n in initial] for kind in KINDS))


ALL = _training(SEVEN)
OF_SIX = _training(SIX)
OF_DOCUMENTS = _percent(*([_document_loss(f"own_{kind}{n}") for n in SIX] for kind in KINDS))


def _one_by_one(pairs: Pairs) -> list[float]:
    return [100 * (y / x - 1) for x, y in zip(pairs.dense, pairs.sparse, strict=True)]


def test_every_pair_has_its_row() -> None:
    documents = [
        compare_all(*({1: losses(f"own_{kind}{n}", DOCUMENTS)} for kind in ("plain", "full"))).relative
        for n in SIX
    ]
    cells = zip(
        ("the first", *["others"] * 6),
        *([f"{x:+.2f}" for x in _one_by_one(each)] for each in (_bases(SEVEN), ALL)),
        ("", *map(percent, documents)),
        strict=True,
    )
    assert " ".join(f"| {' | '.join(row)} |" for row in cells).replace("  ", " ") in PAGE
    errors = [100 * (each.error_items or 0) for each in documents if each is not None]
    assert f"within a pair the error over documents is {min(errors):.2f} to {max(errors):.2f}" in PAGE
    assert f"between pairs the standard deviation is {OF_DOCUMENTS.spreads[2]:.2f}" in PAGE
    assert max(_one_by_one(ALL)) == _one_by_one(ALL)[0]


def test_the_means_of_pairs() -> None:
    without = "without the first pair"
    every = {
        "bases": _bases(SEVEN),
        "branches, training loss": ALL,
        f"branches, training loss, {without}": OF_SIX,
        f"branches, documents, {without}": OF_DOCUMENTS,
    }
    for name, each in every.items():
        errors = f"{each.independent:.2f} | {each.paired:.2f}"
        spreads = ", ".join(f"{spread:.2f}" for spread in each.spreads)
        cells = f"{len(each.dense)} | {each.value:+.2f} | {errors} | {spreads} | {each.alike:.2f}"
        assert f"| {name} | {cells} |" in PAGE
        # what 5% of uncorrelated pairs go beyond
        assert each.alike < {6: 0.811, 7: 0.754}[len(each.dense)]
    ends = [each.alike for each in every.values()]
    assert f"Correlations of {min(ends):.1f} to {max(ends):.1f} are not told apart from none" in PAGE
    assert f"(correlation of pairs {correlation(_one_by_one(OF_SIX), _one_by_one(OF_DOCUMENTS)):.2f})" in PAGE
    assert f"stand at its {ALL.value:+.2f}, not at {OF_DOCUMENTS.value:.2f}" in PAGE
    means = [[fmean(float(row[f"own_{kind}{n}"]) for n in SIX) for row in DOCUMENTS] for kind in KINDS]
    assert f"The median document stands at {median(_one_by_one(Pairs(*means))):+.2f}%" in PAGE


def test_the_goal_from_scratch_is_reached_and_not_shown() -> None:
    training, documents = (f"{each.value:+.2f} ± {each.paired:.2f}%" for each in (ALL, OF_DOCUMENTS))
    for text in (PAGE, ANSWERS, RECIPE):
        assert f"{training} in training loss" in text
        assert f"{documents} on held-out documents" in text
    for text in (FIFTH, EVIDENCE):
        assert training in text
    assert training.replace(" ± ", "% ± ") in README
    loose = [f"{each.independent:.2f}" for each in (ALL, OF_DOCUMENTS)]
    assert f"Errors of the two means without pairing are {loose[0]} and {loose[1]}." in PAGE
    row = f"{training} to the branch in training loss, {documents} on held-out documents"
    assert f"{row} (± {loose[0]} and ± {loose[1]} if not paired)" in ANSWERS
    ends = [each.value + sign * 2 * each.paired for each in (ALL, OF_DOCUMENTS) for sign in (-1, 1)]
    inside = "{:+.2f} to {:+.2f}% in training loss, paired, and {:+.2f} to {:+.2f}% on documents"
    assert inside.format(*ends) in PAGE
    assert all(abs(each.value) < 0.5 for each in (ALL, OF_DOCUMENTS))
    assert max(ends[0], ends[2]) < -0.5 < 0.5 < ends[1]


def test_what_both_branches_find() -> None:
    every = {task: _retrieval(task, SEVEN) for task in TASKS}
    for task, each in every.items():
        means = f"{fmean(each.dense):.3f} | {fmean(each.sparse):.3f} | {each.value:+.3f}"
        assert f"| {task} | {means} | {each.independent:.3f} | {each.paired:.3f} |" in PAGE
        assert 0 < each.value < 2 * each.independent
        assert (each.value > 2 * each.paired) == (task == "associative_recall")
    found, of_dense = (
        "{:.2f}, {:.2f} and {:.2f}".format(*(fmean(getattr(each, kind)) for each in every.values()))
        for kind in ("sparse", "dense")
    )
    assert f"{found} of the three tasks against {of_dense}" in ANSWERS


def test_the_pairs_that_the_goal_takes() -> None:
    """Two standard errors within 0.5 points of a difference of 0, and of one that is as likely as not no larger."""
    dense, sparse, apart = ALL.spreads
    level, even = (
        ceil((errors * apart / 0.5) ** 2) for errors in (2, 2 + NormalDist().inv_cdf(0.75))
    )  # fmt: skip
    assert f"at a standard deviation of {apart:.2f} two errors are within 0.5 points from {level} pairs on (six more than these)" in PAGE  # fmt: skip
    assert level == len(SEVEN) + 6
    assert f"With {even} pairs two kinds that are truly level have an even chance to show it" in PAGE
    assert f"[{level} to {even} pairs](quality/bases.md#what-follows)" in ANSWERS
    assert f"Without pairing it takes {ceil(4 * (dense**2 + sparse**2) / 0.5**2)} bases of each kind" in PAGE


def _cell(found: Sequence[float], least: float, most: float, form: str = "{:.2f}") -> str:
    """Bold where one is outside."""
    bold = "" if all(least <= each <= most for each in found) else "**"
    return bold + ", ".join(form.format(each) for each in found) + bold


def test_what_was_predicted_of_six_pairs() -> None:
    bases, retrieval = _bases(SIX), [_retrieval(task, SIX) for task in TASKS]
    deviations = "their standard deviation within a kind, dense and sparse"
    apart = [each.value / each.independent for each in retrieval]
    # 0.4 was predicted without a range: within what rounds to it
    for row in (
        f"six pairs: bases without the three, steps 1,001 to 1,200 | 0 (-0.4 to 0.4) | {_cell([bases.value], -0.4, 0.4)}",
        f"{deviations} | 0.45 (0.25 to 0.7) | {_cell(bases.spreads[:2], 0.25, 0.7)}",
        f"branches, training loss of the last 100 steps | +0.2 (-0.2 to 0.6) | {_cell([OF_SIX.value], -0.2, 0.6)}",
        f"{deviations} | 0.4 | {_cell(OF_SIX.spreads[:2], 0.35, 0.45)}",
        f"documents less training loss, points | within 0.2 | {_cell([OF_DOCUMENTS.value - OF_SIX.value], -0.2, 0.2)}",
        f"retrieval of three tasks, independent errors apart | within 2 | {_cell(apart, -2, 2, '{:.1f}')}",
    ):  # fmt: skip
        assert f"| {row} |" in PAGE


def test_the_recipe_says_how_a_sparse_base_starts() -> None:
    """The command of a base, changed as it says, has the attention that was measured."""
    dense, sparse = "attention.kind=full attention.target_density=null", "attention.target_density=0.95"
    assert f"puts `{sparse}` in place of `{dense}` into the base's command" in RECIPE
    assert RECIPE.count(dense) == 3
    study = load_study(QUALITY / "branches_fifth_base" / "scratch" / "study.yaml")
    settings = [f"{key}={value}" for key, value in study.overrides.items() if key.startswith("attention.")]
    keys = ("router_projections=false", "learned_scaling=0", "density_budget=layer")
    config = ROOT / "configs" / "60m_16k.yaml"
    measured = load_config(config, [*settings, *(f"attention.{key}" for key in keys)]).attention
    assert load_config(config, [sparse]).attention == measured
