"""Draw the pictures of `docs/results/quality.md`: `python -m docs.tools.branch_pictures --output docs/results/`.

Two studies have a summary of their runs (`STUDIES`), the later ones what `study collect` wrote (`COLLECTED`).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import hypot
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from dash_megatron.command_line import ending_with_reader
from dash_megatron.drawing import COLORS, GRID, line_style, plt, save, tokens_axis

QUALITY = Path(__file__).parents[1] / "results" / "quality"
STUDIES = ("branches_held_out", "branches_factors")
POSITIONS = (0, 64, 512, 2048, 4096, 8192, 16384)
"""Ends of the ranges of positions in the summaries."""
# by label: study and arm in what `study collect` wrote
COLLECTED = {
    "the recipe, 25%": ("branches_projections", "own"),
    "the recipe, 25%, second base": ("branches_second_base", "own"),
    "the recipe, 25%, third base": ("branches_needles/orders", "own"),
    "the recipe, 11%, second base": ("branches_second_base", "own11"),
    "the recipe, 25%, 2,400 steps": ("branches_longer/long", "own"),
    "the recipe, 25%, fourth base, 10% retrieval": ("branches_ten/62m", "ret10"),
    "the recipe, 25%, fifth base, 10% retrieval": ("branches_fifth_base/dense", "ret10"),
    "the recipe, 11%, fifth base, 10% retrieval": ("branches_fifth_base/dense", "dash_11"),
    "the recipe, 25%, seed 71, 400 steps, 10% retrieval": ("branches_arms", "recipe_25"),
    "the recipe, 11%, seed 71, 400 steps, 10% retrieval": ("branches_arms", "recipe_11"),
    "heads of 128, 25%, 400 steps, 10% retrieval": ("branches_arms/heads", "recipe_25"),
    "heads of 128, 11%, 400 steps, 10% retrieval": ("branches_arms/heads", "recipe_11"),
    "the recipe, 25%, 210M, 400 steps": ("branches_longer/210m", "own"),
    "the recipe, 25%, 210M, 400 steps, 10% retrieval": ("branches_ten/210m", "own"),
    "the recipe, 25%, 210M, 800 steps, 10% retrieval": ("branches_210m_longer", "own"),
    "the recipe, 11%, 210M, 400 steps, 10% retrieval": ("branches_210m_11", "dash_11"),
    "without router projections, 25%, 210M, 400 steps": ("branches_210m", "dash_25"),
    "InfLLMv2, 25%, beside the recipe": ("branches_needles/orders", "infllmv2_25"),
    "InfLLMv2, 25%, the recipe's text": ("branches_longer/others", "infllmv2"),
    "InfLLMv2, 25%, 210M, 800 steps, 10% retrieval": ("branches_210m_longer", "infllmv2_25"),
    "NSA, 25%, the recipe's text": ("branches_longer/others", "nsa"),
    "NSA, 25%, fourth base, 10% retrieval": ("branches_ten/nsa", "nsa_25"),
    "NSA, 25%, fifth base, 10% retrieval": ("branches_fifth_base/nsa", "nsa_25"),
    "InfLLMv2, 11%, 210M, 400 steps, 10% retrieval": ("branches_210m_11", "infllmv2_11"),
    "NSA, 11%, 210M, 400 steps, 10% retrieval": ("branches_210m_11", "nsa_11"),
}
# by label: how an arm is called in the first and in the second study; "" where it was not run
BARS = {
    "without router projections, 25%": ("p25-g-l-sh", "k25"),
    "without, 25%, 1,600 steps": ("x2.p25-g-l-sh", ""),
    "without, 25%, 199M, chunks of 16, 400 steps": ("big.p25-g-l-sh-c16-w8", ""),
    "without, 25%, a λ a layer, no learned factors": ("p25", ""),
    "without, 25%, from scratch: 95% in the base": ("", "scd.k25"),
    "InfLLMv2, 25%": ("inf25", ""),
    "NSA, 25%, 400 steps": ("", "h.nsa25"),
    "without router projections, 11%": ("p11-g-l-sh", "k11"),
    "InfLLMv2, 11%": ("inf11", "inf11"),
    "NSA, 11%, 400 steps": ("", "h.nsa11"),
}
OTHERS = ("InfLLMv2", "NSA")
LINES = (
    "the recipe, 25%", "the recipe, 25%, fifth base, 10% retrieval",
    "the recipe, 25%, 210M, 400 steps, 10% retrieval", "the recipe, 11%, fifth base, 10% retrieval",
    "without router projections, 25%", "without router projections, 11%", "InfLLMv2, 25%",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """How far the losses of an arm lie above others in the same order of the data, in percent of full attention's loss."""

    by_order: tuple[float, ...]
    documents: float
    """Standard error of their mean over pieces of documents."""

    @property
    def mean(self) -> float:
        return fmean(self.by_order)

    @property
    def orders(self) -> float | None:
        """Standard error of the mean over orders of the data; None for one order."""
        return stdev(self.by_order) / len(self.by_order) ** 0.5 if len(self.by_order) > 1 else None

    @classmethod
    def pooled(cls, differences: Sequence[Difference]) -> Difference:
        """Orders of several studies together. Their pieces are the same, and their errors count as if they were equal."""
        sizes = [len(x.by_order) for x in differences]
        error = sum(n * x.documents for n, x in zip(sizes, differences, strict=True)) / sum(sizes)
        return cls(tuple(chain.from_iterable(x.by_order for x in differences)), error)


@dataclass(frozen=True)
class Study:
    """The summary of a study of branches and its losses by piece of a document."""

    runs: dict[str, dict[str, Any]]
    """By name: `[KIND.]ARM[@ORDER]`."""
    pieces: list[dict[str, str]]

    @classmethod
    def read(cls, name: str) -> Study:
        """Read `summary.json` and `documents.csv` of one of `STUDIES`."""
        runs = json.loads((QUALITY / name / "summary.json").read_text())["runs"]
        return cls(runs, list(csv.DictReader((QUALITY / name / "documents.csv").open())))

    def orders(self, arm: str) -> list[str]:
        """The runs of an arm, one an order of the data."""
        return sorted(run for run in self.runs if run.partition("@")[0] == arm)

    def full(self, run: str) -> str | None:
        """The run of full attention that a run is compared with; None where there is none."""
        arm, at, order = run.partition("@")
        kind = arm.rpartition(".")[0]
        if kind in {"base", "dense"}:
            return None
        twin = "full-conv" if arm.endswith("conv") else "full"
        return (f"{kind}." if kind not in {"", "scr", "scd"} else "") + twin + at + order

    def difference(self, arm: str, loss: str = "valid_loss") -> Difference:
        """An arm's difference to full attention, in the loss of held-out documents or another one."""
        runs = self.orders(arm)
        fulls = [full for run in runs if (full := self.full(run))]
        percent = tuple(
            100 * (self.runs[run][loss] / self.runs[full][loss] - 1)
            for run, full in zip(runs, fulls, strict=True)
        )
        if len(runs) == 1:
            return Difference(percent, float(self.runs[runs[0]]["documents_error_percent"]))
        return Difference(percent, self._documents_error(runs, fulls, fulls))

    def paired(self, arm: str, other: str) -> Difference:
        """An arm's difference to another, in the orders that both have, in points of full attention's loss."""
        pairs = [(run, other + run.removeprefix(arm)) for run in self.orders(arm)]
        runs, others = zip(*(pair for pair in pairs if pair[1] in self.runs), strict=True)
        fulls = [full for run in runs if (full := self.full(run))]
        points = tuple(
            100
            * (self.runs[run]["valid_loss"] - self.runs[twin]["valid_loss"])
            / self.runs[full]["valid_loss"]
            for run, twin, full in zip(runs, others, fulls, strict=True)
        )
        return Difference(points, self._documents_error(runs, others, fulls))

    def _documents_error(self, runs: Sequence[str], others: Sequence[str], fulls: Sequence[str]) -> float:
        """Standard error over pieces of the mean difference of several orders, in percent of full attention's loss."""
        tokens = np.array([float(piece["tokens"]) for piece in self.pieces])
        above = np.array(
            [
                fmean(float(x[run]) - float(x[twin]) for run, twin in zip(runs, others, strict=True))
                for x in self.pieces
            ]
        )
        mean = (above * tokens).sum() / tokens.sum()
        spread = (
            (((above - mean) * tokens) ** 2).sum() * len(tokens) / (len(tokens) - 1)
        ) ** 0.5 / tokens.sum()
        return float(100 * spread / fmean(self.runs[full]["valid_loss"] for full in fulls))

    def by_position(self, arm: str) -> list[tuple[float, ...]]:
        """Differences to full attention in percent: for each range of `POSITIONS`, one an order."""
        pairs = [(self.runs[run]["by_position"], self.full(run)) for run in self.orders(arm)]
        ratios = [
            [100 * (x / y - 1) for x, y in zip(own, self.runs[full]["by_position"], strict=True)]
            for own, full in pairs
            if full
        ]
        return list(zip(*ratios, strict=True))

    def share(self, arm: str, task: str) -> tuple[float, float]:
        """Right answers at 16K as a share of full attention's, with the standard error over samples, paired."""
        runs = self.orders(arm)
        fulls = [full for run in runs if (full := self.full(run))]
        own, others = (
            np.array([[int(x) for x in self.runs[name]["right_at_16k"][task]] for name in names])
            for names in (runs, fulls)
        )
        share = own.sum() / others.sum()
        # the samples are the same in every order
        rest = (own - share * others).sum(0)
        return float(share), float(
            (rest**2).sum() ** 0.5 * (rest.size / (rest.size - 1)) ** 0.5 / others.sum()
        )


@dataclass(frozen=True)
class Collected:
    """Differences of an arm to full attention that `study collect` wrote, in percent, the first of whole documents."""

    rows: list[dict[str, str]]

    @classmethod
    def read(cls, study: str, arm: str) -> Collected:
        """Read the held-out documents of an arm from a study's `comparisons.csv`."""
        with (QUALITY / study / "comparisons.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["arm"] == arm and row["task"] == "documents"]
        return cls(sorted(rows, key=lambda row: int(row["to"] or 0)))

    @property
    def orders(self) -> int:
        """How many orders of the data the differences are means over."""
        return len(self.rows[0]["orders"].split())

    def means_and_errors(self) -> list[tuple[float, float]]:
        """By range of positions: the difference, and its standard error over documents and orders together."""
        return [
            (
                100 * float(row["relative"]),
                # there is none over one order
                100 * hypot(float(row["relative_error_items"]), float(row["relative_error_orders"] or 0)),
            )
            for row in self.rows
        ]


def draw_losses(studies: Sequence[Study], output: Path) -> Path:
    """Difference to full attention by arm; a dot an order, bars of two standard errors."""
    figure, axis = plt.subplots(figsize=(9, 6.5), layout="constrained")
    found: list[tuple[str, float, float, int, tuple[float, ...]]] = []
    for label, source in COLLECTED.items():
        arm = Collected.read(*source)
        found.append((label, *arm.means_and_errors()[0], arm.orders, ()))
    for label, arms in BARS.items():
        difference = Difference.pooled(
            [x.difference(arm) for x, arm in zip(studies, arms, strict=True) if arm]
        )
        error = hypot(difference.documents, difference.orders or 0)
        found.append((label, difference.mean, error, len(difference.by_order), difference.by_order))
    # kinds of others below DashAttention
    found.sort(key=lambda row: row[0].startswith(OTHERS))
    for place, (label, mean, error, branches, by_order) in enumerate(reversed(found)):
        color = COLORS[1] if label.startswith(OTHERS) else COLORS[0]
        axis.errorbar(mean, place, xerr=2 * error, fmt="s", color=color, capsize=4)
        axis.plot(by_order, [place + 0.25] * len(by_order), ".", color=color, alpha=0.6)
        axis.annotate(
            f"{mean:+.2f}  ({_number(branches)})",
            (mean + 2 * error, place),
            (6, -3),
            textcoords="offset points",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        axis.annotate(label, (0, place), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="center")  # fmt: skip
    axis.axvline(0, color="gray", linewidth=1)
    axis.set(xlabel="loss on held-out documents above full attention's (%)", yticks=[], xlim=(-1, 10.4))
    axis.grid(alpha=GRID, axis="x")
    return save(figure, output / "quality_losses.png")


def draw_positions(studies: Sequence[Study], output: Path) -> Path:
    """Difference to full attention by position in the document, mean over orders, bars of two standard errors over them."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for number, label in enumerate(LINES):
        if label in COLLECTED:
            arm = Collected.read(*COLLECTED[label])
            branches, bars = arm.orders, arm.means_and_errors()[1:]
            ends = [0, *(int(row["to"]) for row in arm.rows[1:])]
        else:
            found = [x.by_position(arm) for x, arm in zip(studies, BARS[label], strict=True) if arm]
            columns = [tuple(chain.from_iterable(x)) for x in zip(*found, strict=True)]
            branches, bars = len(columns[0]), [(fmean(x), stdev(x) / len(x) ** 0.5) for x in columns]
            ends = list(POSITIONS)
        _draw_line(axis, number, f"{label} ({_number(branches)})", ends, bars)
    axis.axhline(0, color="gray", linewidth=1)
    tokens_axis(axis, POSITIONS[1:])
    axis.set(xlabel="position in the document (tokens)", ylabel="loss above full attention's (%)")
    axis.grid(alpha=GRID)
    axis.legend(fontsize=8)
    return save(figure, output / "quality_position.png")


def _draw_line(
    axis: Any, number: int, label: str, ends: Sequence[int], bars: Sequence[tuple[float, float]]
) -> None:
    """A line through means with bars of two errors, each in the middle of its range of positions."""
    color, marker = line_style(number)
    # lines stand a little beside each other, so that bars do not hide each other
    middles = [1.03**number * (max(first, last / 4) * last) ** 0.5 for first, last in pairwise(ends)]
    axis.errorbar(
        middles, [mean for mean, _ in bars], yerr=[2 * error for _, error in bars],
        color=color, marker=marker, capsize=3, linewidth=1, label=label,
    )  # fmt: skip


def _number(branches: int) -> str:
    return f"{branches} branch{'es' if branches > 1 else ''}"


@ending_with_reader()
def main(arguments: list[str] | None = None) -> None:
    """Draw into a folder, which is made where it is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output, studies = parser.parse_args(arguments).output, [Study.read(name) for name in STUDIES]
    output.mkdir(parents=True, exist_ok=True)
    print(draw_losses(studies, output), draw_positions(studies, output))


if __name__ == "__main__":
    main()
