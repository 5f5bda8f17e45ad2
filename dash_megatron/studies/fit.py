"""`study fit`: loss against parameters, tokens and compute, each with intervals.

loss = E + A N^-a + B D^-b is fitted as in Hoffmann et al., Training Compute-Optimal Large Language Models
(arXiv 2203.15556): Huber loss on the difference of logarithms. Intervals are of a bootstrap over runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from dash_megatron.studies.collect import rows_with_quality

Array = NDArray[np.float64]
HUBER_DELTA = 1e-3
MIN_RUNS = 7
MIN_POINTS = 4
_EXPONENTS = np.array([0.05, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0])


@dataclass(frozen=True)
class Fit:
    """Values by name, and their intervals; `intervals` hold 95% of the bootstrap's fits."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    runs: int
    error: float
    """Root mean square of log(predicted / observed)."""


def fit_parametric(parameters: Array, tokens: Array, loss: Array, draws: int = 200) -> Fit:
    """Fit loss = E + A N^-a + B D^-b.

    Args:
        parameters, tokens, loss: float [runs], each above 0; loss in nats.
        draws: bootstrap fits.

    Returns:
        E, A, a, B, b, and `optimal`, the exponent of compute-optimal parameters in compute, b / (a + b).

    Raises:
        ValueError: too few runs, sizes or token counts, or tokens that go with parameters everywhere.
    """
    columns = (np.asarray(parameters, float), np.asarray(tokens, float))
    if len(columns[0]) < MIN_RUNS:
        raise ValueError(
            f"{len(columns[0])} runs are too few for a fit of 5 values; {MIN_RUNS} or more are needed"
        )
    if problem := _not_separable(*columns):
        raise ValueError(problem)
    names = ("E", "A", "a", "B", "b")
    return _fit(columns, np.asarray(loss, float), names, draws, _not_separable)


def fit_compute(flops: Array, loss: Array, draws: int = 200) -> Fit:
    """Fit loss = E + K C^-c to the runs that no other run beats with less compute.

    Args:
        flops, loss: float [runs], each above 0.
        draws: as in `fit_parametric`.

    Raises:
        ValueError: fewer than four such runs.
    """
    flops, loss = np.asarray(flops, float), np.asarray(loss, float)
    best = frontier(flops, loss)
    if len(best) < MIN_POINTS:
        raise ValueError(
            f"{len(best)} runs at distinct compute lie on the frontier of loss and compute, and a fit of 3 values needs "
            f"{MIN_POINTS}; train more sizes or budgets"
        )
    few = lambda x: "few" if len(np.unique(x)) < 3 else None  # noqa: E731
    return _fit((flops[best],), loss[best], ("E", "K", "c"), draws, few)


def frontier(flops: Array, loss: Array) -> list[int]:
    """Runs that have a lower loss than every run of as much compute or less, by compute."""
    best: list[int] = []
    for index in np.lexsort((loss, flops)):
        if not best or loss[index] < loss[best[-1]]:
            best.append(int(index))
    return best


def _not_separable(parameters: Array, tokens: Array) -> str | None:
    """Why the effects of two columns could not be told apart, or None; also asked of every bootstrap draw."""
    for name, values in (("parameter counts", parameters), ("token counts", tokens)):
        if len(np.unique(values)) < 3:
            return f"{len(np.unique(values))} distinct {name}; 3 or more are needed for an exponent"
    if abs(np.corrcoef(np.log(parameters), np.log(tokens))[0, 1]) > 0.995:
        return (
            "tokens go with parameters in every run, so that their effects cannot be told apart; give several "
            "budgets, such as tokens_per_parameter: [5, 10, 20]"
        )
    return None


def _fit(
    columns: tuple[Array, ...],
    loss: Array,
    names: tuple[str, ...],
    draws: int,
    not_enough: Callable[..., str | None],
) -> Fit:
    # in units of the geometric mean, so that all unknowns are near 1
    scales = [float(np.exp(np.log(column).mean())) for column in columns]
    logs = np.stack([np.log(column / scale) for column, scale in zip(columns, scales, strict=True)])
    best = min((_refine(logs, loss, start) for start in _starts(logs, loss)), key=lambda result: result[1])[0]
    generator = np.random.default_rng(0)
    samples: list[dict[str, float]] = []
    for _ in range(10 * draws):
        if len(samples) == draws:
            break
        drawn = generator.integers(len(loss), size=len(loss))
        if not_enough(*(column[drawn] for column in columns)) is None:
            samples.append(_named(_refine(logs[:, drawn], loss[drawn], best)[0], scales, names))
    values = _named(best, scales, names)
    intervals = {}
    if len(samples) >= draws // 2:  # fewer tell nothing: almost every draw lacks sizes or budgets
        for name in values:
            low, high = np.percentile([sample[name] for sample in samples], [2.5, 97.5])
            intervals[name] = (float(low), float(high))
    error = float(np.sqrt(np.mean(_residuals(best, logs, np.log(loss)) ** 2)))
    return Fit(values, intervals, len(loss), error)


def _residuals(theta: Array, logs: Array, log_loss: Array) -> Array:
    """theta: log E, then log factor and exponent of each column; log predicted - log observed."""
    terms = [np.full(log_loss.shape, theta[0])]
    terms += [theta[1 + 2 * i] - theta[2 + 2 * i] * column for i, column in enumerate(logs)]
    return np.logaddexp.reduce(terms) - log_loss


def _refine(logs: Array, loss: Array, start: Array) -> tuple[Array, float]:
    lower = np.array([-12.0] + [-12.0, 1e-3] * len(logs))
    upper = np.array([5.0] + [12.0, 3.0] * len(logs))
    found = least_squares(
        _residuals,
        np.clip(start, lower + 1e-6, upper - 1e-6),
        bounds=(lower, upper),
        loss="huber",
        f_scale=HUBER_DELTA,
        args=(logs, np.log(loss)),
        max_nfev=300,
    )
    return found.x, float(found.cost)


def _starts(logs: Array, loss: Array) -> list[Array]:
    """The four exponents of a grid with which non-negative E and factors fit best."""
    tried = []
    for exponents in np.stack(np.meshgrid(*[_EXPONENTS] * len(logs)), -1).reshape(-1, len(logs)):
        design = np.stack([np.ones_like(loss), *np.exp(-exponents[:, None] * logs)], 1) / loss[:, None]
        factors, rest = nnls(design, np.ones_like(loss))
        theta = np.empty(1 + 2 * len(logs))
        theta[0], theta[1::2], theta[2::2] = (
            np.log(max(factors[0], 1e-4)),
            np.log(np.maximum(factors[1:], 1e-4)),
            exponents,
        )
        tried.append((rest, theta))
    return [theta for _, theta in sorted(tried, key=lambda pair: pair[0])[:4]]


def _named(theta: Array, scales: list[float], names: tuple[str, ...]) -> dict[str, float]:
    values = {names[0]: float(np.exp(theta[0]))}
    for index, scale in enumerate(scales):
        exponent = float(theta[2 + 2 * index])
        values[names[1 + 2 * index]] = float(np.exp(theta[1 + 2 * index]) * scale**exponent)
        values[names[2 + 2 * index]] = exponent
    if "b" in values:
        values["optimal"] = values["b"] / (values["a"] + values["b"])
    return values


def fit_study(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Both fits for every variant with finished runs; where one cannot be made, the reason.

    Args:
        rows: as `collect` gives them.

    Raises:
        ValueError: no run is finished.
    """
    rows, quality = rows_with_quality(rows)
    document: dict[str, Any] = {"quality": quality, "variants": {}}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        flops, parameters, tokens, loss = (
            np.array([row[key] for row in own], float) for key in ("flops", "parameters", "tokens", "quality")
        )
        fits: dict[str, Any] = {}
        for name, make in (
            ("parameters and tokens", lambda n=parameters, d=tokens, y=loss: fit_parametric(n, d, y)),
            ("compute", lambda c=flops, y=loss: fit_compute(c, y)),
        ):
            try:
                _check_finite(own, quality)
                fit = make()
                fits[name] = {
                    "values": fit.values,
                    "intervals": fit.intervals,
                    "runs": fit.runs,
                    "error": fit.error,
                }
            except ValueError as error:
                fits[name] = {"refused": str(error)}
        document["variants"][variant] = fits
    return document


def _check_finite(rows: list[dict[str, Any]], quality: str) -> None:
    if lost := [row["run"] for row in rows if not np.isfinite(row["quality"])]:
        raise ValueError(
            f"{', '.join(lost)}: {quality} is not finite; take them out of the study, or train them again"
        )


def render_fits(document: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = [f"of {document['quality']}, in nats; [95% of bootstrap fits over runs]"]
    formulas = {"parameters and tokens": "E + A N^-a + B D^-b", "compute": "E + K C^-c"}
    for variant, fits in document["variants"].items():
        for name, fit in fits.items():
            if "refused" in fit:
                lines.append(f"{variant}, {name}: no fit: {fit['refused']}")
                continue
            lines.append(
                f"{variant}, {name}: {formulas[name]}, {fit['runs']} runs, log error {fit['error']:.1e}"
            )
            for key, value in fit["values"].items():
                low, high = fit["intervals"].get(key, (None, None))
                interval = "no interval: too few runs" if low is None else f"[{low:.4g}, {high:.4g}]"
                lines.append(f"  {key:<8} {value:<10.4g} {interval}")
    return lines
