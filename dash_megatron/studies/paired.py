"""Differences between two arms that were measured on the same items, with standard errors over items and over orders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Item = tuple[Any, ...]
"""What names a document, a sample or a step; the same for all arms. Errors over items take items to be independent."""
Measured = Mapping[Item, tuple[float, float]]
"""A sum for each item, such as of losses, and what it is divided by, such as the number of its tokens."""
Verdict = Literal["above", "below", "within", "unknown"]

STANDARD_ERRORS = 2.0
"""How far a difference must be from 0 to be told apart from it."""


@dataclass(frozen=True)
class Ratio:
    """A sum over another sum, with its standard errors; None where there is one item, or one order."""

    value: float
    error_items: float | None
    error_orders: float | None

    @property
    def error(self) -> float | None:
        """The larger error; None with a single order, since errors over items alone mislead.

        Another order of the data moves the loss of an arm by up to ten times what its error over documents says.
        """
        if self.error_orders is None:
            return None
        return max(self.error_orders, self.error_items or 0.0)


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference."""

    value: Ratio
    """Loss per token, or mean score, of the arm."""
    reference: float
    """The same of the reference."""
    difference: Ratio
    """Arm less reference, item by item and order by order."""
    relative: Ratio | None
    """Arm over reference, less 1; None where the reference has 0 everywhere."""
    median: Ratio | None
    """Arm over reference, less 1, of the median item; None where the reference has 0 for an item."""
    orders: tuple[int, ...]
    """Orders that both were trained in."""
    items: int
    """Items that both were measured on."""

    @property
    def verdict(self) -> Verdict:
        """Whether the difference is further from 0 than two standard errors; unknown with a single order or item, or if not finite."""
        error = self.difference.error
        if error is None or self.items < 2 or not math.isfinite(self.difference.value):
            return "unknown"
        if abs(self.difference.value) <= STANDARD_ERRORS * error:
            return "within"
        return "above" if self.difference.value > 0 else "below"


def standard_error(above: np.ndarray, below: np.ndarray) -> float | None:
    """Standard error of `sum(above) / sum(below)` over the entries, by linearization; None for a single one.

    With e = above - ratio * below it is sqrt(k / (k - 1) * sum(e^2)) / sum(below), k the number of entries
    (W. G. Cochran, Sampling Techniques, 3rd edition, 1977, chapter 6). Where all of `below` are equal it is the standard
    error of a mean.
    """
    count, total = len(above), below.sum()
    if count < 2:
        return None
    rest = above - above.sum() / total * below
    return float(math.sqrt(count / (count - 1) * (rest**2).sum()) / abs(total))


def ratio(above_OI: np.ndarray, below_OI: np.ndarray) -> Ratio:
    """Sum of `above` over sum of `below`, each [orders, items].

    Errors over items are those of sums over orders, and errors over orders those of sums over items: each is what other
    items in the same orders, or other orders of the same items, would change.
    """
    return Ratio(
        float(above_OI.sum() / below_OI.sum()),
        standard_error(above_OI.sum(0), below_OI.sum(0)),
        standard_error(above_OI.sum(1), below_OI.sum(1)),
    )


def median_of_items(values_OI: np.ndarray) -> Ratio:
    """Median over items, in the mean over orders, of values [orders, items].

    Half of the items can be moved at will without moving it further than the other half reach, while one large item moves a
    ratio of sums (P. J. Huber, E. M. Ronchetti, Robust Statistics, 2nd edition, 2009, chapter 1). Its error over items is
    half the distance between the quantiles one binomial standard error, 1 / (2 sqrt(items)), below and above the middle
    (R. S. Woodruff, Journal of the American Statistical Association 47, 1952, 635-646).
    """
    orders, items = values_OI.shape
    medians_O = np.median(values_OI, axis=1)
    reach = 0.5 / math.sqrt(items)
    low, high = np.quantile(values_OI.mean(0), [0.5 - reach, 0.5 + reach])
    return Ratio(
        float(medians_O.mean()),
        float(high - low) / 2 if items > 1 else None,
        standard_error(medians_O, np.ones(orders)),
    )


def compare(arm: Mapping[int, Measured], reference: Mapping[int, Measured]) -> Comparison | None:
    """Compare two arms by what both have; None where no order has an item of both.

    Args:
        arm, reference: by order of the data.

    Raises:
        ValueError: an item of one name has another size in another run, so that it is not the same.
    """
    orders = sorted(set(arm) & set(reference))
    measured = [runs[order] for order in orders for runs in (arm, reference)]
    items = sorted(set.intersection(*map(set, measured))) if measured else []
    if not items:
        return None
    for one in measured:
        for item in items:
            if one[item][1] != measured[0][item][1]:
                raise ValueError(
                    f"item {item} has size {one[item][1]:g} in one run and {measured[0][item][1]:g} in another; evaluate "
                    "all branches on the same text"
                )
    arm_OI, reference_OI = (
        np.array([[runs[order][item][0] for item in items] for order in orders]) for runs in (arm, reference)
    )
    sizes_OI = np.array([[arm[order][item][1] for item in items] for order in orders])
    relative = ratio(arm_OI - reference_OI, reference_OI) if reference_OI.sum() else None
    median = median_of_items(arm_OI / reference_OI - 1) if reference_OI.all() else None
    return Comparison(
        value=ratio(arm_OI, sizes_OI),
        reference=float(reference_OI.sum() / sizes_OI.sum()),
        difference=ratio(arm_OI - reference_OI, sizes_OI),
        relative=relative,
        median=median,
        orders=tuple(orders),
        items=len(items),
    )
