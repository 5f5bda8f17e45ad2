"""What sparse exchange must send, and when zigzag balances."""

import pytest
import torch

from dash_megatron.planning.routing import coverage_of_topics
from docs.tools.balance import denser_part, draw_documents, growing, imbalance, packed
from docs.tools.simulation import RouterInputs, simulate, zigzag_owner


def test_zigzag_gives_every_rank_a_piece_from_the_front_and_one_from_the_back() -> None:
    assert zigzag_owner(8, 2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="chunks=6 must be a multiple of 4"):
        zigzag_owner(6, 2)


def test_topics_set_the_density_and_without_locality_every_chunk_is_needed_somewhere() -> None:
    found = simulate(RouterInputs(topics=10))
    assert found.density == pytest.approx(0.1, abs=0.03)
    assert found.coverage_of_past > 0.95
    # chunks that lie after all queries of a rank are never needed: about a quarter
    assert found.coverage < 0.8


@pytest.mark.parametrize("locality", [0.9, 0.99])
def test_the_formula_of_coverage_follows_the_simulated_router(locality: float) -> None:
    found = [
        simulate(RouterInputs(context=8, chunks=512, topics=20, locality=locality, seed=seed))
        for seed in range(4)
    ]
    mean = sum(one.coverage_of_past for one in found) / len(found)
    density = sum(one.density for one in found) / len(found)
    assert coverage_of_topics(density, locality, 512 * 2 / 8) == pytest.approx(mean, abs=0.1)


def test_coverage_grows_with_density_and_falls_with_locality() -> None:
    assert coverage_of_topics(1.0, 1.0, 10) == 1.0
    assert coverage_of_topics(0.1, 0.0, 2) == pytest.approx(0.1 * 2 / 3 + 0.19 / 3)
    dense = [coverage_of_topics(density, 0.95, 512) for density in (0.01, 0.1, 0.5)]
    local = [coverage_of_topics(0.05, locality, 512) for locality in (1.0, 0.9, 0.0)]
    assert dense == sorted(dense)
    assert local == sorted(local)


def test_own_and_future_chunks_are_never_needed_from_others() -> None:
    found = simulate(RouterInputs(context=2, chunks=8, topics=2))
    # rank 1 holds the middle: nothing after it lies in its past
    assert not found.needed[1, 6:].any()
    # rank 0 ends the sequence, and its last chunk is its own query's chunk
    assert not found.needed[0, 7]


def test_nearby_topics_need_fewer_chunks_than_topics_found_anywhere() -> None:
    near, far = (
        simulate(RouterInputs(context=8, chunks=512, topics=4, regions=regions)).coverage_of_past
        for regions in (16, 1)
    )
    assert near < 0.5 < far


def test_work_that_is_a_straight_line_in_position_is_balanced_and_no_other() -> None:
    for power in (0.0, 1.0):
        assert imbalance(growing(256, power), 8) == pytest.approx(1.0)
    assert imbalance(growing(256, 2.0), 8) > 1.3
    # twice as dense in the last eighth of 4 ranks: rank 0 has the last piece, which is just that eighth
    line = growing(256, 1.0)
    expected = (line[:32].sum() + 2 * line[224:].sum()) / ((line.sum() + line[224:].sum()) / 4)
    assert imbalance(denser_part(256, 0.875, 0.125, 2), 4) == pytest.approx(expected.item())


def test_zigzag_balances_the_simulated_router() -> None:
    even = simulate(RouterInputs(context=8, topics=10)).per_rank
    assert (even.max() / even.mean()).item() < 1.15


def test_documents_fill_the_sequence_and_their_work_begins_anew() -> None:
    lengths = draw_documents(256, 16, torch.Generator().manual_seed(0))
    assert lengths.sum() == 256
    assert packed(torch.tensor([2, 3])).tolist() == [0.5, 1.5, 0.5, 1.5, 2.5]
    assert imbalance(packed(torch.tensor([256])), 8) == pytest.approx(1.0)
