"""How many pairs kernels visit for each that is selected."""

import pytest

from benchmarks.choices import TILES, layers_of, load_selected, router_of
from benchmarks.choices import visited_over_selected as measure
from benchmarks.persistence import routed_available
from dash_megatron.config import AttentionConfig
from dash_megatron.planning.choices import (
    POOLS,
    TRAINED,
    check_choices,
    shares_of_pairs,
    visited_over_selected,
)


@pytest.mark.parametrize("model", TRAINED)
def test_the_curves_are_those_of_the_files_of_trained_choices(model: str) -> None:
    available = selected = 0.0
    visited = dict.fromkeys(TILES, 0.0)
    for layer in layers_of(model):
        selected_HNc = load_selected(model, layer)
        heads, tokens, chunks = selected_HNc.shape
        available_Nc = routed_available(tokens, chunks, router_of(model).local_chunks)
        pairs = (selected_HNc & available_Nc).sum().item()
        available += heads * available_Nc.sum().item()
        selected += pairs
        for tile, ratio in measure(selected_HNc & available_Nc).items():
            visited[tile] += ratio * pairs
    assert selected / available == pytest.approx(TRAINED[model].density, abs=5e-4)
    assert [visited[tile] / selected for tile in TILES] == pytest.approx(TRAINED[model].ratios, abs=5.1e-3)


def test_trained_choices_meet_what_was_measured_and_follow_pool_tile_and_density() -> None:
    for pool, names in POOLS.items():
        for name in names:
            assert visited_over_selected("trained", TRAINED[name].density, 8, pool) == TRAINED[name].ratios[3]

    def ratio(density: float = 0.1, tile: int = 32, pool: int = 1) -> float:
        return visited_over_selected("trained", density, tile, pool)

    assert ratio(pool=1) > ratio(pool=4) > ratio(pool=16) == ratio(pool=128) > 1
    assert ratio(tile=64) > ratio(tile=32) > ratio(tile=24) > ratio(tile=16) > ratio(tile=1) == 1
    # below the least density measured nothing is known
    assert ratio(0.01) == ratio(0.05) > ratio(0.1) > ratio(0.5) > ratio(1.0) == 1


@pytest.mark.parametrize(
    ("choices", "density", "tile", "measured"),
    # docs/results/kernel_stages.csv: groups of 4, 16 and 1 head; routed density
    [
        ("independent", 0.099, 32, 9.59),
        ("independent", 0.218, 32, 4.26),
        ("independent", 0.101, 8, 5.60),
        ("independent", 0.230, 8, 3.64),
        ("independent", 0.095, 64, 10.22),
        ("runs", 0.099, 32, 1.02),
        ("runs", 0.101, 8, 1.01),
        ("runs", 0.095, 64, 1.99),
    ],
)
def test_made_choices_are_those_of_the_benchmark(
    choices: str, density: float, tile: int, measured: float
) -> None:
    assert visited_over_selected(choices, density, tile) == pytest.approx(measured, rel=0.1)


def test_tiles_never_visit_more_than_there_is() -> None:
    for choices in ("trained", "runs", "independent", 9.0):
        assert 1 <= visited_over_selected(choices, 0.5, 64) <= 2


def test_own_and_local_chunks_are_selected_and_visited_once_whatever_the_density() -> None:
    attention = AttentionConfig(chunk_size=64, local_chunks=3)
    # of 100 chunks and 5050 pairs of chunks 4 a token
    always = 400 / 5050
    assert shares_of_pairs(attention, 4, 6400, 1e-4, 3.0) == pytest.approx((always, always))
    shares = shares_of_pairs(attention, 4, 6400, always + 0.1, 3.0)
    assert shares == pytest.approx((always + 0.1, always + 0.3))
    topk = AttentionConfig(chunk_size=64, local_chunks=3, query_pool=16, kind="infllmv2")
    plain = AttentionConfig(chunk_size=64)
    assert shares_of_pairs(topk, 4, 6400, 0.2, "trained") == shares_of_pairs(plain, 4, 6400, 0.2, "trained")


@pytest.mark.parametrize("choices", ["some", 0.5, float("nan"), float("inf")])
def test_other_choices_are_an_error_that_says_what_there_is(choices: str | float) -> None:
    with pytest.raises(
        ValueError, match=f"--routing {choices} must be trained, runs, independent, or a number"
    ):
        check_choices(choices)
