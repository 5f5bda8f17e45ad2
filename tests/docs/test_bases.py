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
    compare_all,
    losses,
    mean_loss,
    percent,
    read_pages,
    read_rows,
    read_words,
)

FOLDER = QUALITY / "bases"
PAGE, ANSWERS, RECIPE, README = read_pages(FOLDER.with_suffix(".md"))
FIFTH = read_words(QUALITY / "branches_fifth_base.md")
EVIDENCE = read_words(ROOT / "docs" / "configuration-evidence.md")
LOSSES, DOCUMENTS, RUNS = (read_rows(FOLDER / f"{name}.csv") for name in ("losses", "documents", "runs"))
FULL = ("full0", "full1", "full2")
AGAIN = ("full0_again", "plain0_again")
DASH = ("dash0", "dash1", "dash2")
OTHERS = [[f"{kind}{n}" for n in range(3, 9)] for kind in ("full", "plain")]
TEN = (*FULL, AGAIN[0], *OTHERS[0])
PLAIN = ("plain0", "plain0_again", *OTHERS[1])
ALIKE, LATE = (1001, 1200), (1101, 1500)
"""Steps that all bases have, and the last that those of 1,500 steps have."""
KINDS = {
    "95%, the recipe's router": DASH,
    "the same at 99%": ("dash99_0",),
    "the same with σ = 8": ("soft0",),
    "95% without projections, factors and shared budget": PLAIN,
}
RUN_NAMES = {"full0": "full attention", "full1": "other initial weights", "full2": "others", "full0_again": "the first initial weights again", "dash0": "95%, the recipe's router", "dash1": "other initial weights", "dash2": "others", "dash99_0": "the same at 99%", "soft0": "the same with σ = 8", "plain0": "95% without projections, factors and shared budget", "plain0_again": "the same initial weights again"}  # fmt: skip


def _mean(run: str, steps: tuple[int, int]) -> float:
    return mean_loss(run, steps, LOSSES)


def _to(run: str, references: Sequence[str], steps: tuple[int, int]) -> float:
    """The mean training loss to that of the references, in percent."""
    return 100 * (_mean(run, steps) / fmean(_mean(each, steps) for each in references) - 1)


def _by_step(run: str, steps: tuple[int, int]) -> dict[int, Measured]:
    return {1: {(x["step"],): (float(x[run]), 1.0) for x in LOSSES if steps[0] <= int(x["step"]) <= steps[1]}}


def _paired(run: str, reference: str, steps: tuple[int, int]) -> str:
    """The difference in training loss in percent, with its error over steps."""
    return percent(compare_all(*(_by_step(each, steps) for each in (run, reference))).relative)


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


SPREAD = _spread(TEN, ALIKE)


def _error(arm: Sequence[str], reference: Sequence[str] = TEN) -> float:
    """Of a difference between means of bases, if all kinds differ as much as those of full attention."""
    return SPREAD * (1 / len(arm) + 1 / len(reference)) ** 0.5


def _behind(arm: Sequence[str], reference: Sequence[str] = TEN) -> float:
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
    for name, runs in zip(("of full attention", "at 95% without the three"), OTHERS, strict=True):
        ends = [[_to(run, FULL, steps) for run in runs] for steps in ((401, 500), ALIKE)]
        cells = [f"{min(end):+.2f} to {max(end):+.2f}" for end in ends]
        assert f"| six others {name} | {' | '.join(cells)} | | |" in PAGE


def test_what_bases_differ_by() -> None:
    windows, sparse = (
        [_spread(runs, (first, 1200)) for first in (801, 901, 1001, 1101)] for runs in (TEN, PLAIN)
    )
    assert f"ten of full attention have a standard deviation of {SPREAD:.2f}% in steps 1,001 to 1,200" in PAGE
    assert f"{min(windows):.2f} to {max(windows):.2f}% in the last 400 to 100 steps" in PAGE
    assert f"of eight sparse ones without the three {min(sparse):.2f} to {max(sparse):.2f}%" in PAGE
    assert f"trained again, end {_paired('full0_again', 'full0', ALIKE).strip('-')}% lower" in PAGE
    assert f"again, by {_paired('plain0_again', 'plain0', ALIKE)}%" in PAGE
    # quantiles of chi-squared with nine degrees of freedom
    least, most = (SPREAD * (9 / quantile) ** 0.5 for quantile in (19.02, 2.700))
    assert f"{least:.2f} to {most:.2f}% with 95% confidence" in PAGE
    for text in (PAGE, FIFTH):
        assert f"differ by {SPREAD * 2**0.5:.2f} points" in text
    assert f"{SPREAD * 2**0.5:.2f} points between two" in ANSWERS
    assert f"With one base of each kind two errors are {2 * SPREAD * 2**0.5:.1f} points" in PAGE
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
    assert _behind(DASH) > 6 * _error(DASH)
    level = f"{_behind(PLAIN):+.2f} ± {_error(PLAIN):.2f}%"
    assert f"{level}, eight against ten" in PAGE
    assert (len(PLAIN), len(TEN)) == (8, 10)
    for text in (ANSWERS, RECIPE):
        assert level in text
    assert f"to within {ceil(10 * (abs(_behind(PLAIN)) + 2 * _error(PLAIN))) / 10}% (two errors)" in PAGE
    apart = f"{_behind(DASH, PLAIN):.2f} ± {_error(DASH, PLAIN):.2f}"
    assert f"{apart} points apart from bases" in PAGE
    early = [_to(run, FULL, (401, 500)) for run in DASH]
    assert f"{min(early):.0f} to {max(early):.0f}% behind in steps 401 to 500" in PAGE
    late = [_to(run, FULL, LATE) for run in DASH]
    assert f"{min(late):.1f} to {max(late):.1f}%" in PAGE
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
    assert "bases.md" in EVIDENCE
