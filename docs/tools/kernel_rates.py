"""Fit the planner's rates of kernels to the stages timed in `docs/results/kernel_stages.csv`: `python -m docs.tools.kernel_rates`.

Prints `dash_megatron.planning.kernel_times.RATES` and the error of every stage in every row.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from dash_megatron.command_line import ending_with_reader
from dash_megatron.planning.kernel_times import RATES, AttentionWork, Rate

TABLE = Path(__file__).parents[1] / "results" / "kernel_stages.csv"
SHAPES = ("head_dim", "chunk", "tile")


class Row(NamedTuple):
    """One timed case."""

    name: str
    routing: str
    ratio: float
    """Pairs visited over pairs selected."""
    work: AttentionWork
    milliseconds: dict[str, float]
    """Of those of `RATES` that were timed."""
    whole: tuple[float | None, float | None]
    """Milliseconds of a whole forward and backward, where they were timed."""


def read_rows() -> list[Row]:
    """The cases of the table."""
    rows = []
    with TABLE.open(encoding="utf-8") as lines:
        for cells in csv.DictReader(lines):
            batch, tokens, heads, kv_heads, head_dim, chunk_size = (
                int(cells[name])
                for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "chunk_size")
            )
            # millions of pairs of a token and a chunk, of all key/value heads together
            selected, visited = (
                float(cells[name]) * 1e6 * chunk_size / kv_heads for name in ("selected", "visited")
            )
            work = AttentionWork(
                rows=batch * tokens,
                heads=heads,
                kv_heads=kv_heads,
                pairs=batch * tokens**2 / 2,
                selected=selected,
                visited=visited,
                chunk_size=chunk_size,
                head_dim=head_dim,
                pool_heads=cells["pool_heads"] == "yes",
                counted=cells["counted"] == "yes",
            )  # fmt: skip
            times = {stage: float(cells[stage]) for stage in RATES if cells.get(stage)}
            if cells["dense_total"]:
                times["dense_backward"] = float(cells["dense_total"]) - times["dense_forward"]
            length = f"{tokens // 1024}K" if batch == 1 else f"{batch} x {tokens // 1024}K"
            name = f"{length}, {heads}/{kv_heads}, {head_dim}, {chunk_size}" + (
                ", one query a group" if work.pool_heads else ""
            )
            forward, total = (
                float(cells[column]) if cells[column] else None for column in ("forward", "total")
            )
            whole = forward, total - forward if forward and total else None
            rows.append(Row(name, cells["routing"], visited / selected, work, times, whole))
    return rows


def fit(stage: str, rows: list[Row]) -> Rate:
    """The rate of one stage whose relative errors, as logarithms, have the least squares."""
    timed = [row for row in rows if stage in row.milliseconds]
    measured = np.log([row.milliseconds[stage] for row in timed])
    units = list(RATES[stage].work)
    # a launch or power that is 0 stays 0: the stage does not depend on it, or too few rows tell
    launches = RATES[stage].launch > 0
    shapes = [shape for shape in SHAPES if getattr(RATES[stage], shape)]

    def rate(x: np.ndarray) -> Rate:
        numbers = iter(x)
        launch = float(np.exp(next(numbers))) if launches else 0.0
        per_unit = [float(np.exp(next(numbers))) for _ in units]
        powers = {shape: float(next(numbers)) for shape in shapes}
        return replace(RATES[stage], launch=launch, work=dict(zip(units, per_unit, strict=True)), **powers)

    def errors(x: np.ndarray) -> np.ndarray:
        fitted = rate(x)
        modelled = np.log([fitted.milliseconds(row.work, stage) for row in timed])
        # held loosely where the rows say nothing
        return np.concatenate([modelled - measured, 1e-3 * x])

    return rate(least_squares(errors, np.zeros(launches + len(units) + len(shapes))).x)


@ending_with_reader()
def main() -> None:
    """Print the rates and what they miss."""
    rows = read_rows()
    for stage in RATES:
        fitted = fit(stage, rows)
        work = ", ".join(f'"{unit}": {float(f"{rate:.3g}"):g}' for unit, rate in fitted.work.items())
        powers = "".join(
            f", {shape}={getattr(fitted, shape):.2f}" for shape in SHAPES if getattr(fitted, shape)
        )
        print(f'    "{stage}": Rate({fitted.launch:.2g}, {{{work}}}{powers}),')
        for row in rows:
            if stage in row.milliseconds:
                error = fitted.milliseconds(row.work, stage) / row.milliseconds[stage] - 1
                print(f"      {error:+5.0%}  {row.name}, {row.routing}, visited/selected {row.ratio:.2f}")


if __name__ == "__main__":
    main()
