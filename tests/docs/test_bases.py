"""The page on what bases differ by, and on bases that are sparse from their first step, against the files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil, exp
from statistics import fmean, stdev

import pytest

from dash_megatron.config import load_config
from dash_megatron.studies.paired import Measured, Ratio
from docs.tools.branch_pictures import QUALITY
from tests.docs.branches import (
    ROOT,
    TASKS,
    compare_all,
    losses,
    percent,
    read_pages,
    read_rows,
    read_words,
    scores,
    share,
)

FOLDER = QUALITY / "bases"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
FIFTH = read_words(QUALITY / "branches_fifth_base.md")
LOSSES, BRANCHES, DOCUMENTS, SAMPLES, RUNS = (
    read_rows(FOLDER / f"{name}.csv") for name in ("losses", "branches", "documents", "samples", "runs")
)
FULL = ("full0", "full1", "full2")
AGAIN = ("full0_again", "plain0_again")
DASH = ("dash0", "dash1", "dash2")
PLAIN = ("plain0", "plain0_again")
ALIKE, LATE, LAST = (1001, 1200), (1101, 1500), (301, 400)
"""Steps that all bases have, the last that those of 1,500 steps have, and the last of branches."""
KINDS = {
    "95%, the recipe's router": DASH,
    "the same at 99%": ("dash99_0",),
    "the same with σ = 8": ("soft0",),
    "95% without projections, factors and shared budget": PLAIN,
}
RUN_NAMES = {"full0": "full attention", "full1": "other initial weights", "full2": "others", "full0_again": "the first initial weights again", "dash0": "95%, the recipe's router", "dash1": "other initial weights", "dash2": "others", "dash99_0": "the same at 99%", "soft0": "the same with σ = 8", "plain0": "95% without projections, factors and shared budget", "plain0_again": "the same initial weights again"}  # fmt: skip


def _mean(run: str, steps: tuple[int, int]) -> float:
    """The mean training loss of logged steps."""
    return fmean(float(row[run]) for row in LOSSES if steps[0] <= int(row["step"]) <= steps[1])


def _to(run: str, references: Sequence[str], steps: tuple[int, int]) -> float:
    """The mean training loss to that of the references, in percent."""
    return 100 * (_mean(run, steps) / fmean(_mean(each, steps) for each in references) - 1)


def _by_step(run: str, steps: tuple[int, int], rows: list[dict[str, str]]) -> dict[int, Measured]:
    return {1: {(x["step"],): (float(x[run]), 1.0) for x in rows if steps[0] <= int(x["step"]) <= steps[1]}}


def _paired(run: str, reference: str, steps: tuple[int, int], rows: list[dict[str, str]] = LOSSES) -> str:
    """The difference in training loss in percent, with its error over steps."""
    return percent(compare_all(*(_by_step(each, steps, rows) for each in (run, reference))).relative)


def _spread(runs: Sequence[str], steps: tuple[int, int]) -> float:
    """The standard deviation over bases, in percent of their mean."""
    means = [_mean(run, steps) for run in runs]
    return 100 * stdev(means) / fmean(means)


def _documents(run: str) -> Ratio:
    """Held-out documents to the mean of three bases of full attention."""
    three = [losses(each, DOCUMENTS) for each in FULL]
    mean = {key: (fmean(each[key][0] for each in three), tokens) for key, (_, tokens) in three[0].items()}
    found = compare_all({1: losses(run, DOCUMENTS)}, {1: mean}).relative
    assert found is not None
    return found


FOUR = (*FULL, AGAIN[0])
SPREAD = _spread(FOUR, ALIKE)


def _error(arm: Sequence[str], reference: Sequence[str] = FOUR) -> float:
    """Of a difference between means of bases, if all kinds differ as much as those of full attention."""
    return SPREAD * (1 / len(arm) + 1 / len(reference)) ** 0.5


def _behind(arm: Sequence[str], reference: Sequence[str] = FOUR) -> float:
    return 100 * (fmean(_mean(x, ALIKE) for x in arm) / fmean(_mean(x, ALIKE) for x in reference) - 1)


def test_every_base_has_its_row() -> None:
    for run, name in RUN_NAMES.items():
        again = run in AGAIN
        cells = [
            f"{_to(run, FULL, (401, 500)):+.2f}",
            f"{_to(run, FULL, ALIKE):+.2f}",
            "" if again else f"{_to(run, FULL, LATE):+.2f}",
            "" if again else percent(_documents(run)),
        ]
        assert f"| {name} | {' | '.join(cells)} |".replace("  ", " ") in PAGE, run


def test_what_bases_differ_by() -> None:
    windows = [_spread(FOUR, (first, 1200)) for first in (801, 901, 1001, 1101)]
    assert f"standard deviation of {SPREAD:.2f}% in steps 1,001 to 1,200" in PAGE
    assert f"{min(windows):.2f} to {max(windows):.2f}% in the last 400 to 100 steps" in PAGE
    assert f"three initial weights alone {_spread(FULL, ALIKE):.2f}%, and {_spread(FULL, LATE):.2f}% in" in PAGE  # fmt: skip
    assert f"trained again, end {_paired('full0_again', 'full0', ALIKE).strip('-')}% lower" in PAGE
    assert f"again, by {_paired('plain0_again', 'plain0', ALIKE)}%" in PAGE
    # quantiles of chi-squared with three degrees of freedom
    least, most = (SPREAD * (3 / quantile) ** 0.5 for quantile in (9.348, 0.2158))
    assert f"{least:.2f} to {most:.2f}% with 95% confidence" in PAGE
    assert f"differ by {SPREAD * 2**0.5:.2f} points" in PAGE
    for text in (ANSWERS, RECIPE):
        assert f"{SPREAD:.1f}%" in text
    by_step = {int(row["step"]): row for row in LOSSES}
    assert by_step[1]["full0"] == by_step[1]["full0_again"]
    assert by_step[1]["plain0"] == by_step[1]["plain0_again"]
    first, again = (float(by_step[5][run]) for run in ("full0", "full0_again"))
    assert f"at step 5 they are {first:.5f} and {again:.5f}" in PAGE
    parted = [_to("full0_again", ("full0",), (n - 99, n)) for n in (100, 200, 300, 400)]
    assert max(abs(x) for x in parted) < 0.25
    later = [_to("full0_again", ("full0",), (n - 99, n)) for n in range(500, 1201, 100)]
    assert f"{-max(later):.1f} to {-min(later):.1f}% lower from step 401 on" in PAGE


def test_kinds_of_bases() -> None:
    for name, runs in KINDS.items():
        assert f"| {name} | {len(runs)} | {_behind(runs):+.2f} ± {_error(runs):.2f} |" in PAGE
    assert _behind(DASH) > 5 * _error(DASH)
    assert 2 * _error(PLAIN) > 0.5 > abs(_behind(PLAIN))
    apart = f"{_behind(DASH, PLAIN):.2f} ± {_error(DASH, PLAIN):.2f}"
    assert f"{apart} points apart from bases" in PAGE
    early = [_to(run, FULL, (401, 500)) for run in DASH]
    assert f"{min(early):.0f} to {max(early):.0f}% behind in steps 401 to 500" in PAGE
    late = [_to(run, FULL, LATE) for run in DASH]
    assert f"{min(late):.1f} to {max(late):.1f}%" in PAGE
    assert f"{_to('plain0', FULL, LATE):+.1f}%" in PAGE
    for text in (ANSWERS, RECIPE, FIFTH):
        assert f"{min(late):.1f} to {max(late):.1f}%" in text
    before, after = ([_to(run, FULL, (last - 99, last)) for run in DASH] for last in (1200, 1500))
    assert f"from {before[0]:.1f} and {before[2]:.1f}% in steps 1,101 to 1,200 to {after[0]:.1f}% in the last 100; the other stays at {after[1]:.1f}%" in PAGE  # fmt: skip
    assert f"{after[2]:.1f} {before[1]:.1f}" == f"{after[0]:.1f} {after[1]:.1f}"


def test_validation_ranks_them_otherwise() -> None:
    nats = {row["run"]: float(row["validation"]) for row in RUNS if row["validation"]}
    for runs in (FULL, DASH):
        ends = [nats[run] for run in runs]
        assert f"{min(ends):.3f} to {max(ends):.3f}" in PAGE
    assert f"{nats['plain0_again']:.3f} and {nats['full0_again']:.3f}" in PAGE


def test_scales_and_densities() -> None:
    rows = {row["run"]: row for row in RUNS}

    def values(run: str, what: str) -> list[float]:
        return [float(rows[run][f"{what}_{n}"]) for n in range(5)]

    scales = [values(run, "scaling")[0] for run in (*DASH, "dash99_0")]
    assert f"λ falls to {1e5 * min(scales):.1f}e-5 to {1e5 * max(scales):.1f}e-5" in PAGE
    assert f"{1e4 * values('soft0', 'scaling')[0]:.1f}e-4 with σ = 8" in PAGE
    plain = [x for run in PLAIN for x in values(run, "scaling")]
    assert f"{min(plain):.2f} to {max(plain):.2f} without" in PAGE
    assert max(scales) * exp(10 / 3) < 1.5e-3
    least = [min(values(run, "density")) for run in DASH]
    assert f"{min(least):.2f} to {max(least):.2f} in one layer" in PAGE
    others = [x for run in DASH for x in sorted(values(run, "density"))[1:]]
    assert f"{min(others):.2f} to {max(others):.2f} in the others" in PAGE
    flat = [x for run in PLAIN for x in values(run, "density")]
    assert max(abs(x - 0.95) for x in flat) < 0.005


def test_the_pair_of_branches() -> None:
    assert f"{_paired('own_plain', 'own_full', LAST, BRANCHES)}% in the last 100 steps" in PAGE
    assert f"was {_paired('plain0_again', 'full0_again', ALIKE).strip('+')}% ahead" in PAGE
    assert _mean("full0_again", ALIKE) == min(_mean(run, ALIKE) for run in FOUR)
    for task in TASKS:
        rows = [row for row in SAMPLES if row["task"] == task]
        found = compare_all(*({1: scores(run, task, rows)} for run in ("own_plain", "own_full")))
        cells = f"{len(rows)} | {found.reference:.3f} | {found.value.value:.3f} | {share(found.relative)}"
        assert f"| {task} | {cells} |" in PAGE


def test_the_bases_that_a_goal_takes() -> None:
    """Two standard errors of the difference between means of n bases each must be at most 0.5 points."""
    needed = [ceil(8 * (spread / 0.5) ** 2) for spread in (_spread(FOUR, (n, 1200)) for n in (801, 1101))]
    assert f"{needed[0]} to {needed[1]} bases of each kind" in PAGE
    assert f"{needed[0]} to {needed[1]} bases of each kind" in ANSWERS
    assert f"With one of each two errors are {2 * SPREAD * 2**0.5:.1f} points" in PAGE


@pytest.mark.parametrize(
    ("name", "found", "guess", "least", "most"),
    [
        ("standard deviation over three initial weights of full attention", _spread(FULL, LATE), "0.3", 0.1, 0.6),
        ("95%, the recipe's router, mean of three", fmean(_to(x, FULL, LATE) for x in DASH), "+0.8", 0.3, 1.2),
        ("the same at 99%", _to("dash99_0", FULL, LATE), "+0.5", 0.0, 1.0),
        ("the same with σ = 8", _to("soft0", FULL, LATE), "+0.3", -0.3, 0.8),
        ("95% without projections, factors and shared budget", _to("plain0", FULL, LATE), "+0.9", 0.3, 1.3),
    ],
)  # fmt: skip
def test_what_was_predicted(name: str, found: float, guess: str, least: float, most: float) -> None:
    text = f"{found:+.2f}" if guess[0] == "+" else f"{found:.2f}"
    bold = "" if least <= found <= most else "**"
    assert f"| {name} | {guess} ({least:g} to {most:g}) | {bold}{text}{bold} |" in PAGE


def test_the_settings_of_a_sparse_start_are_what_configs_have() -> None:
    keys = re.findall(r"`(attention\.(?:router_projections|learned_scaling|density_budget)=\w+)`", PAGE)
    assert len(keys) == 3
    config = ROOT / "configs" / "60m_16k.yaml"
    assert load_config(config, keys).attention == load_config(config).attention
    assert "bases.md" in (ROOT / "docs" / "configuration-evidence.md").read_text()


def test_files_are_small() -> None:
    assert all(path.stat().st_size <= 100_000 for path in FOLDER.iterdir())
