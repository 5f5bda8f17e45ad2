"""The kernel-time model against the tables it was fitted to."""

from dataclasses import replace
from pathlib import Path

import pytest

from dash_megatron.planning.kernel_times import (
    CASES,
    DENSE_CASES,
    GROUP_CASES,
    NARROW_CASES,
    NARROW_DENSE_CASES,
    SMALL_CHUNK_CASES,
    STAGES,
    AttentionWork,
    KernelCase,
    dash_seconds,
    dash_stages,
    dense_seconds,
)

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "kernels.md"
WORK = AttentionWork(65536, 32, 8, 65536**2 / 2, 0.1 * 65536**2 / 2)


@pytest.mark.parametrize(
    ("case", "allowed"),
    # two lengths share one factor a stage where heads have 64 dimensions
    [(case, 0.15) for case in CASES + GROUP_CASES]
    + [(case, 0.2) for case in NARROW_CASES + SMALL_CHUNK_CASES],
    ids=lambda x: f"{x.tokens}-{x.kv_heads}-{x.density}" if isinstance(x, KernelCase) else None,
)
def test_fitted_times_are_within_15_percent_of_the_measured_ones(case: KernelCase, allowed: float) -> None:
    time = dash_seconds(case.work)
    assert 1e3 * time.forward == pytest.approx(case.forward, rel=0.15)
    assert 1e3 * (time.forward + time.backward) == pytest.approx(case.total, rel=0.15)
    for stage, modelled in dash_stages(case.work).items():
        # the transposition's time hardly depends on anything and varies by a third of a millisecond
        if stage != "transpose":
            assert modelled == pytest.approx(getattr(case, stage), rel=allowed), stage


@pytest.mark.parametrize(
    ("head_dim", "tokens"),
    [(128, tokens) for tokens in DENSE_CASES] + [(64, tokens) for tokens in NARROW_DENSE_CASES],
)
def test_fitted_dense_times_are_within_15_percent_of_the_measured_ones(head_dim: int, tokens: int) -> None:
    time = dense_seconds(AttentionWork(tokens, 32, 32, tokens**2 / 2, 0, head_dim=head_dim))
    measured = (DENSE_CASES if head_dim == 128 else NARROW_DENSE_CASES)[tokens]
    assert (1e3 * time.forward, 1e3 * (time.forward + time.backward)) == pytest.approx(measured, rel=0.15)


def test_factors_of_shapes_follow_the_logarithm_of_the_size_and_end_where_nothing_is_gained() -> None:
    def keys(head_dim: int, chunk_size: int) -> float:
        work = replace(WORK, head_dim=head_dim, chunk_size=chunk_size)
        return dash_stages(work)["keys"] / work.units()["listed"]

    def dense(head_dim: int) -> float:
        return dense_seconds(replace(WORK, head_dim=head_dim)).forward / head_dim

    assert keys(128, 128) == keys(128, 64) < keys(128, 32)
    assert keys(128, 16) / keys(128, 32) == pytest.approx(keys(128, 32) / keys(128, 64))
    assert keys(64, 32) / keys(64, 64) == pytest.approx(keys(128, 32) / keys(128, 64))
    assert dense(256) == pytest.approx(dense(128), rel=0.01)
    assert dense(128) < dense(96) < dense(64)


def test_a_group_size_between_the_fitted_ones_is_predicted() -> None:
    # 64K, 32/4, 11.2%: 11.21 ms and 44.41 ms, not among the fitted rows; its lists are those of 32/8
    work = replace(GROUP_CASES[0].work, kv_heads=4)
    time = dash_seconds(work)
    assert 1e3 * time.forward == pytest.approx(11.21, rel=0.1)
    assert 1e3 * (time.forward + time.backward) == pytest.approx(44.41, rel=0.1)


def test_the_numbers_held_here_are_those_of_the_page() -> None:
    lines = RESULTS.read_text().splitlines()
    for case in CASES + GROUP_CASES:
        name = f"| {case.tokens // 1024}K, {case.heads}/{case.kv_heads}"
        one, by_stage = (
            line
            for line in lines
            if line.startswith(f"{name} | {case.density:.1%} |")
            or line.startswith(f"{name}, {case.density:.1%} |")
        )
        cells = [cell.strip() for cell in one.split("|")]
        assert (float(cells[5]), float(cells[10])) == (case.forward, case.total)
        cells = [cell.strip() for cell in by_stage.split("|")][2:8]
        assert [float(cell.split()[0]) for cell in cells] == [getattr(case, stage) for stage in STAGES]
        assert cells[1].endswith(f"({case.attend_tflops:.0f})")


def test_the_numbers_held_for_heads_of_64_are_those_of_the_page() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in RESULTS.read_text().splitlines()]
    for case in NARROW_CASES + SMALL_CHUNK_CASES:
        named = [f"{case.tokens // 1024}K", str(case.chunk_size)]
        whole, by_stage = (cells for cells in lines if cells[:2] == named)
        assert whole[2] == f"{case.density:.1%}"
        assert (float(whole[4]), float(whole[7])) == (case.forward, case.total)
        assert (float(whole[3]), float(whole[6])) == NARROW_DENSE_CASES[case.tokens]
        assert [float(cell.split()[0]) for cell in by_stage[2:8]] == [
            getattr(case, stage) for stage in STAGES
        ]
        assert by_stage[3].endswith(f"({case.attend_tflops:.0f})")


def test_time_grows_with_every_kind_of_work() -> None:
    base = dash_seconds(WORK)
    for more in (
        {"rows": 2 * WORK.rows},
        {"pairs": 2 * WORK.pairs},
        {"listed": 2 * WORK.listed},
        {"passes": 8},
        {"chunk_size": 32},
    ):
        longer = dash_seconds(replace(WORK, **more))
        assert longer.forward + longer.backward > base.forward + base.backward, more


def test_smaller_groups_are_slower_at_the_same_work() -> None:
    times = [dash_seconds(replace(WORK, kv_heads=kv_heads)).backward for kv_heads in (2, 8, 32)]
    assert times == sorted(times)
