"""Paired differences and their standard errors, against computations item by item."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from dash_megatron.studies.paired import Measured, compare, median_of_items, standard_error

SIZES = [3.0, 10.0, 40.0, 5.0, 80.0]


def measured(losses: list[float], sizes: list[float] = SIZES) -> Measured:
    """Documents with these losses a token."""
    return {(n,): (loss * size, size) for n, (loss, size) in enumerate(zip(losses, sizes, strict=True))}


def drawn(seed: int, shift: float) -> Measured:
    return measured((2.0 + shift + 0.3 * np.random.default_rng(seed).normal(size=len(SIZES))).tolist())


def test_the_error_of_equal_sizes_is_that_of_a_mean() -> None:
    values = np.array([1.0, 4.0, 2.0, 8.0])
    expected = stdev(values.tolist()) / 2
    assert standard_error(values, np.ones(4)) == pytest.approx(expected)
    assert standard_error(values[:1], np.ones(1)) is None


def test_the_error_of_a_ratio_is_what_repeated_draws_of_documents_spread() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.lognormal(3, 1, 200)
    sums = sizes * (0.1 + generator.normal(0, 0.5, 200))
    chosen = generator.integers(0, 200, (4000, 200))
    spread = (sums[chosen].sum(1) / sizes[chosen].sum(1)).std()
    assert standard_error(sums, sizes) == pytest.approx(spread, rel=0.05)


def test_differences_and_both_errors_are_those_computed_by_hand() -> None:
    arm, reference = (
        {order: drawn(10 * order + shift, 0.1 * shift) for order in (1, 2, 3)} for shift in (1, 0)
    )
    found = compare(arm, reference)
    assert found is not None
    total = sum(SIZES)
    by_order = [
        sum(arm[order][item][0] - reference[order][item][0] for item in arm[order]) / total
        for order in (1, 2, 3)
    ]
    assert found.difference.value == pytest.approx(fmean(by_order))
    assert found.difference.error_orders == pytest.approx(stdev(by_order) / math.sqrt(3))
    mean = found.difference.value
    rest = [
        fmean(arm[order][item][0] - reference[order][item][0] for order in (1, 2, 3)) - mean * size
        for item, size in (((n,), size) for n, size in enumerate(SIZES))
    ]
    by_items = math.sqrt(5 / 4 * sum(x * x for x in rest)) / total
    assert found.difference.error_items == pytest.approx(by_items)
    assert found.difference.error == max(by_items, found.difference.error_orders or 0)
    sums = [sum(value for order in runs for value, _ in runs[order].values()) for runs in (arm, reference)]
    assert found.relative is not None
    assert found.relative.value == pytest.approx(sums[0] / sums[1] - 1)
    assert (found.value.value, found.reference) == (
        pytest.approx(sums[0] / total / 3), pytest.approx(sums[1] / total / 3),
    )  # fmt: skip
    assert (found.orders, found.items) == ((1, 2, 3), 5)


def test_pairing_takes_out_what_documents_share() -> None:
    hard = measured([1.0, 2.0, 3.0, 4.0, 5.0])
    same = {item: (value + 0.1 * size, size) for item, (value, size) in hard.items()}
    found = compare({1: same, 2: same}, {1: hard, 2: hard})
    assert found is not None
    assert found.difference.value == pytest.approx(0.1)
    assert found.difference.error == pytest.approx(0.0, abs=1e-12)
    assert found.value.error_items == pytest.approx(0.71569, abs=1e-5)
    assert found.verdict == "above"


@pytest.mark.parametrize(
    ("shifts", "verdict"),
    [([0.1, 0.1001], "above"), ([-0.1, -0.1001], "below"), ([0.3, -0.1], "within"), ([0.1], "unknown"), ([0.0, 0.0], "within")],
)  # fmt: skip
def test_the_larger_error_decides(shifts: list[float], verdict: str) -> None:
    reference = measured([2.0] * 5)
    arms = {order: measured([2.0 + shift] * 5) for order, shift in enumerate(shifts)}
    found = compare(arms, dict.fromkeys(arms, reference))
    assert found is not None
    assert found.verdict == verdict


def test_what_was_measured_on_one_item_is_not_told_apart_however_many_orders_agree() -> None:
    arms = {order: measured([2.1 + shift], [1.0]) for order, shift in enumerate((0.0, 0.001, 0.002))}
    found = compare(arms, dict.fromkeys(arms, measured([2.0], [1.0])))
    assert found is not None
    assert found.difference.value > 2 * (found.difference.error_orders or 0)
    assert found.verdict == "unknown"


def test_documents_that_differ_either_way_are_not_told_apart_by_orders_that_agree() -> None:
    reference, arm = measured([2.0] * 5), measured([2.5, 1.5, 2.6, 1.5, 1.95])
    found = compare({1: arm, 2: arm}, {1: reference, 2: reference})
    assert found is not None
    assert found.difference.error_orders == pytest.approx(0.0)
    assert found.difference.error == found.difference.error_items
    assert found.difference.value > 0
    assert found.verdict == "within"


def test_one_large_document_moves_the_total_and_not_the_median() -> None:
    reference, arm = measured([2.0] * 5), measured([1.98, 1.96, 1.98, 1.99, 2.2])
    other = measured([1.96, 1.96, 1.92, 1.99, 2.2])
    found = compare({1: arm, 2: other}, {1: reference, 2: reference})
    assert found is not None
    assert found.relative is not None
    assert found.median is not None
    assert found.relative.value > 0.04
    # in order 1 the median is -0.01, in order 2 it is -0.02
    assert found.median.value == pytest.approx(-0.015)
    assert found.median.error_orders == pytest.approx(0.005)
    low, high = np.quantile([-0.015, -0.02, -0.025, -0.005, 0.1], [0.5 - 0.5 / 5**0.5, 0.5 + 0.5 / 5**0.5])
    assert found.median.error_items == pytest.approx((high - low) / 2)


def test_the_error_of_a_median_is_what_other_documents_would_change() -> None:
    generator = np.random.default_rng(0)
    draws = generator.standard_t(3, (2000, 101))
    spread = np.median(draws, axis=1).std()
    errors = [median_of_items(draw[None]).error_items or 0.0 for draw in draws]
    assert fmean(errors) == pytest.approx(spread, rel=0.05)
    alone = median_of_items(np.array([[0.5]]))
    assert (alone.value, alone.error_items, alone.error_orders) == (0.5, None, None)


def test_only_what_both_have_is_compared() -> None:
    reference = {1: measured([2.0] * 5), 3: measured([2.0] * 5)}
    arm = {1: measured([2.5] * 4, SIZES[:4]), 2: measured([9.0] * 5)}
    found = compare(arm, reference)
    assert found is not None
    assert (found.orders, found.items, found.difference.value) == ((1,), 4, pytest.approx(0.5))
    assert compare({2: arm[2]}, reference) is None


def test_a_reference_that_scores_nothing_has_no_ratio() -> None:
    zero, one = measured([0.0] * 5), measured([1.0, 0.0, 0.0, 0.0, 0.0])
    found = compare({1: one, 2: zero}, {1: zero, 2: zero})
    assert found is not None
    assert (found.relative, found.median) == (None, None)
    assert found.difference.value > 0


def test_documents_of_another_length_are_not_the_same() -> None:
    with pytest.raises(ValueError, match=r"item \(0,\) has size 3 in one run and 4 in another"):
        compare({1: measured([2.0], [4.0])}, {1: measured([2.0], [3.0])})
