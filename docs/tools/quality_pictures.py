"""Draw the picture of `docs/results/quality/from_scratch.md` from its summary: `python -m docs.tools.quality_pictures --output docs/results/`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dash_megatron.command_line import ending_with_reader
from dash_megatron.drawing import GRID, line_style, plt, save

SUMMARY = Path(__file__).parents[1] / "results" / "quality" / "quality_16k.json"
KNEE_LOSS = 3.3
"""Nats: a run is taken to be in its knee where validation loss passes this."""
LAST_STEP = 2289
KINDS = {
    "full": "full attention",
    "dash_25": "DashAttention 25%",
    "dash_25_c32": "DashAttention 25%, chunks of 32",
    "dash_11": "DashAttention 11%",
    "dash_11_c32": "DashAttention 11%, chunks of 32",
    "infllmv2_25": "InfLLMv2 25%",
    "infllmv2_11": "InfLLMv2 11%",
    "nsa_25": "NSA 25%",
    "nsa_11": "NSA 11%",
}


@dataclass(frozen=True)
class Run:
    """The validations of one finished run."""

    kind: str
    """A key of `KINDS`."""
    seed: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """Nats per token."""

    @property
    def knee(self) -> float:
        """Step at which the loss passes `KNEE_LOSS`, interpolated between validations."""
        points = zip(self.steps, self.losses, strict=True)
        for (before, high), (after, low) in pairwise(points):
            if high > KNEE_LOSS >= low:
                return before + (after - before) * (high - KNEE_LOSS) / (high - low)
        raise ValueError(f"{self.kind}, seed {self.seed}, does not pass {KNEE_LOSS} nats")


@dataclass(frozen=True)
class Fit:
    """End loss = slope x knee + a constant for each seed, by least squares."""

    slope: float
    """Nats a step."""
    constants: tuple[float, float]
    """Nats, of seeds 1 and 2."""
    explained: float
    """Share of the variance of the end losses, R²."""


def read_runs() -> list[Run]:
    """The finished runs of the summary, which `docs.tools.study_summary` made."""
    found = []
    for name, run in json.loads(SUMMARY.read_text())["runs"].items():
        kind, _, rest = name.partition("-")
        steps, losses = zip(*((point["step"], point["loss"]) for point in run["validations"]), strict=True)
        if steps[-1] == LAST_STEP:
            found.append(Run(kind, int(rest[-1]), steps, losses))
    return found


def fit_knee(runs: list[Run]) -> Fit:
    """Fit the end losses of runs of seeds 1 and 2."""
    inputs = np.array([[run.knee, run.seed == 1, run.seed == 2] for run in runs], dtype=float)
    ends = np.array([run.losses[-1] for run in runs])
    slope, *constants = np.linalg.lstsq(inputs, ends, rcond=None)[0]
    left = ends - inputs @ np.array([slope, *constants])
    explained = 1 - (left**2).sum() / ((ends - ends.mean()) ** 2).sum()
    return Fit(float(slope), (float(constants[0]), float(constants[1])), float(explained))


def draw_curves(runs: list[Run], output: Path) -> Path:
    """Curves of all runs, and their end loss against their knee."""
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for run in sorted(runs, key=lambda run: (list(KINDS).index(run.kind), run.seed)):
        color, marker = line_style(list(KINDS).index(run.kind))
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 6}
        if run.seed == 2:
            style |= {"markerfacecolor": "white", "linestyle": "--"}
        curves.plot(run.steps, run.losses, linewidth=1, **style)
        label = KINDS[run.kind] if run.seed == 1 else None
        ends.plot(run.knee, run.losses[-1], label=label, **(style | {"linestyle": "", "markersize": 8}))
    curves.axhline(KNEE_LOSS, color="gray", linewidth=1)
    curves.annotate(
        f"{KNEE_LOSS} nats", (LAST_STEP, KNEE_LOSS), (0, 4), textcoords="offset points", ha="right"
    )
    curves.set(title="Every curve has a knee", xlabel="step", ylabel="validation loss (nats)")
    fit = fit_knee(runs)
    knees = np.array([min(run.knee for run in runs), max(run.knee for run in runs)])
    for seed, constant in enumerate(fit.constants, 1):
        ends.plot(
            knees, constant + fit.slope * knees, color="gray", linestyle="-" if seed == 1 else "--", zorder=0
        )
    ends.set(
        title=f"Who comes to it later ends higher (R² = {fit.explained:.2f})",
        xlabel=f"step at which validation loss passes {KNEE_LOSS} nats",
        ylabel="validation loss at the end (nats)",
    )
    ends.legend(fontsize=8, title="filled: seed 1, hollow: seed 2")
    for axis in (curves, ends):
        axis.grid(alpha=GRID)
    return save(figure, output / "quality_curves.png")


@ending_with_reader()
def main(arguments: list[str] | None = None) -> None:
    """Draw into a folder, which is made where it is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output, runs = parser.parse_args(arguments).output, read_runs()
    output.mkdir(parents=True, exist_ok=True)
    print(draw_curves(runs, output))


if __name__ == "__main__":
    main()
