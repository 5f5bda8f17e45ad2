"""Draw the pictures of `docs/results/quality.md` from its summary: `python -m docs.tools.branch_pictures --output docs/results/`."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from dash_megatron.drawing import COLORS, GRID, line_style, plt, save

FOLDER = Path(__file__).parents[1] / "results" / "quality" / "branches_held_out"
POSITIONS = ("0-64", "64-512", "512-2K", "2K-4K", "4K-8K", "8K-16K")
BARS = {
    "inf25": "InfLLMv2, 25%",
    "p25": "DashAttention, 25%,\na λ a layer",
    "p25-g-l-sh": "one λ for all layers,\nlearned factors, 25%",
    "x2.p25-g-l-sh": "the same, 1,600 steps",
    "big.p25-g-l-sh-c16-w8": "the same, 199M parameters,\nchunks of 16, 400 steps",
    "inf11": "InfLLMv2, 11%",
    "p11-g-l-sh": "one λ for all layers,\nlearned factors, 11%",
}
LINES = ("inf11", "inf25", "p11-g-l-sh", "p25", "p25-g-l-sh")


@dataclass(frozen=True)
class Difference:
    """How far the losses of an arm lie above those of full attention in the same order of the data, in percent."""

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


@dataclass(frozen=True)
class Study:
    """The summary of a study of branches and its losses by piece of a document."""

    runs: dict[str, dict[str, Any]]
    """By name: `[KIND.]ARM[@ORDER]`."""
    pieces: list[dict[str, str]]

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Study:
        """Read `summary.json` and `documents.csv`."""
        runs = json.loads((folder / "summary.json").read_text())["runs"]
        return cls(runs, list(csv.DictReader((folder / "documents.csv").open())))

    def orders(self, arm: str) -> list[str]:
        """The runs of an arm, one an order of the data."""
        return sorted(run for run in self.runs if run.partition("@")[0] == arm)

    def full(self, run: str) -> str | None:
        """The run of full attention that a run is compared with; None where there is none."""
        arm, at, order = run.partition("@")
        kind = arm.rpartition(".")[0]
        if kind == "base":
            return None
        twin = "full-conv" if arm.endswith("conv") else "full"
        return (f"{kind}." if kind not in {"", "scr"} else "") + twin + at + order

    def difference(self, arm: str, loss: str = "valid_loss") -> Difference:
        """An arm's difference to full attention, in the loss of held-out documents or another one."""
        runs = self.orders(arm)
        fulls = [self.runs[full][loss] for run in runs if (full := self.full(run))]
        percent = tuple(
            100 * (self.runs[run][loss] / full - 1) for run, full in zip(runs, fulls, strict=True)
        )
        return Difference(percent, self.documents_error(runs))

    def documents_error(self, runs: Sequence[str]) -> float:
        """Standard error over pieces of the mean of several orders, in percent of full attention's loss."""
        if len(runs) == 1:
            return float(self.runs[runs[0]]["documents_error_percent"])
        fulls = [full for run in runs if (full := self.full(run))]
        tokens = np.array([float(piece["tokens"]) for piece in self.pieces])
        above = np.array(
            [
                fmean(float(x[run]) - float(x[full]) for run, full in zip(runs, fulls, strict=True))
                for x in self.pieces
            ]
        )
        mean = (above * tokens).sum() / tokens.sum()
        spread = (
            (((above - mean) * tokens) ** 2).sum() * len(tokens) / (len(tokens) - 1)
        ) ** 0.5 / tokens.sum()
        return float(100 * spread / fmean(self.runs[full]["valid_loss"] for full in fulls))

    def by_position(self, arm: str) -> list[tuple[float, ...]]:
        """Differences to full attention in percent: for each of `POSITIONS`, one an order."""
        pairs = [(self.runs[run]["by_position"], self.full(run)) for run in self.orders(arm)]
        ratios = [
            [100 * (x / y - 1) for x, y in zip(own, self.runs[full]["by_position"], strict=True)]
            for own, full in pairs
            if full
        ]
        return list(zip(*ratios, strict=True))


def draw_losses(study: Study, output: Path) -> Path:
    """Difference to full attention by arm; a dot an order, bars of two standard errors."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for place, (arm, label) in enumerate(reversed(BARS.items())):
        found = study.difference(arm)
        error = found.documents if found.orders is None else (found.documents**2 + found.orders**2) ** 0.5
        color = COLORS[1] if arm.startswith("inf") else COLORS[0]
        axis.errorbar(found.mean, place, xerr=2 * error, fmt="s", color=color, capsize=4)
        axis.plot(found.by_order, [place + 0.25] * len(found.by_order), ".", color=color, alpha=0.6)
        orders = f"{len(found.by_order)} order{'s' if len(found.by_order) > 1 else ''}"
        axis.annotate(
            f"{found.mean:+.2f}  ({orders})",
            (found.mean + 2 * error, place),
            (6, -3),
            textcoords="offset points",
        )
        axis.annotate(label, (0, place), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="center")  # fmt: skip
    axis.axvline(0, color="gray", linewidth=1)
    axis.set(xlabel="loss on held-out documents above full attention's (%)", yticks=[], xlim=(-0.2, 5.5))
    axis.grid(alpha=GRID, axis="x")
    return save(figure, output / "quality_losses.png")


def draw_positions(study: Study, output: Path) -> Path:
    """Difference to full attention by position in the document, mean over orders, bars of two standard errors over them."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for number, arm in enumerate(LINES):
        color, marker = line_style(number)
        columns = study.by_position(arm)
        errors = [2 * stdev(x) / len(x) ** 0.5 if len(x) > 1 else 0.0 for x in columns]
        label = BARS[arm].replace("\n", " ")
        axis.errorbar(
            range(len(columns)), [fmean(x) for x in columns], yerr=errors, color=color, marker=marker,
            capsize=3, linewidth=1, label=f"{label} ({len(columns[0])} order{'s' if len(columns[0]) > 1 else ''})",
        )  # fmt: skip
    axis.axhline(0, color="gray", linewidth=1)
    axis.set_xticks(range(len(POSITIONS)), POSITIONS)
    axis.set(xlabel="position in the document (tokens)", ylabel="loss above full attention's (%)")
    axis.grid(alpha=GRID)
    axis.legend(fontsize=9)
    return save(figure, output / "quality_position.png")


def main(arguments: list[str] | None = None) -> None:
    """Draw into a folder, which is made where it is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output, study = parser.parse_args(arguments).output, Study.read()
    output.mkdir(parents=True, exist_ok=True)
    print(draw_losses(study, output), draw_positions(study, output))


if __name__ == "__main__":
    main()
