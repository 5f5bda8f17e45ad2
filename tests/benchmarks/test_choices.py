"""The reader of chunks that trained routers selected, and what the files beside it hold."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import choices
from benchmarks.persistence import (
    Persistence,
    fit_persistence,
    make_selected,
    routed_available,
    selected_side_by_side,
)

LIMIT = 2_000_000
ROUTING = (choices.FOLDER.parents[1] / "docs/results/quality/routing.md").read_text()
TABLE = (choices.FOLDER / "README.md").read_text()


def _own_chunk(selected_HNc: Tensor) -> Tensor:
    """Chunk of each token, [N, 1]."""
    _, tokens, chunks = selected_HNc.shape
    return (torch.arange(tokens) // (tokens // chunks))[:, None]


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Random past chunks of 2 heads, 16 tokens and 4 chunks, written the way the files are."""
    selected_HNc = torch.rand(2, 16, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    selected_HNc &= torch.arange(4) < _own_chunk(selected_HNc)
    bits_HcN = selected_HNc.transpose(1, 2).numpy()
    np.savez(tmp_path / "made.npz", layer_3=np.packbits(bits_HcN, axis=-1))
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    return selected_HNc


def test_packed_chunks_are_read_as_they_were(packed: Tensor) -> None:
    assert choices.model_names() == ["made"]
    assert choices.layers_of("made") == [3]
    selected_HNc = choices.load_selected("made", 3)
    assert selected_HNc.dtype == torch.bool
    assert torch.equal(selected_HNc, packed)
    with pytest.raises(KeyError):
        choices.load_selected("made", 0)
    with pytest.raises(FileNotFoundError):
        choices.load_selected("missing", 0)


def test_tiles_visit_the_union_of_what_their_tokens_selected(packed: Tensor) -> None:
    visited = choices.visited_over_selected(packed, (1, 4))
    unions = sum(
        4 * len({int(c) for n in range(first, first + 4) for c in packed[h, n].nonzero()})
        for h in range(2)
        for first in range(0, 16, 4)
    )
    assert visited == {1: 1.0, 4: unions / packed.sum().item()}
    assert choices.past_density(packed) == packed.sum().item() / (2 * 4 * (1 + 2 + 3))
    for tile in (3, 32):
        with pytest.raises(ValueError, match=f"whole number of tiles of \\[{tile}\\]"):
            choices.visited_over_selected(packed, (tile,))
    with pytest.raises(ValueError, match="of \\[3\\], all of them powers of two"):
        choices.visited_over_selected(packed[:, :15], (3,))


def test_densities_by_position_are_of_the_chunks_available_there(packed: Tensor) -> None:
    by_hand = [packed[:, a:b].sum().item() / (2 * 4 * own) for a, b, own in ((4, 8, 1), (8, 16, 2 + 3))]
    assert choices.density_by_position("made", (4, 8, 16)) == pytest.approx(by_hand)


def test_the_page_on_routing_has_the_densities_by_position() -> None:
    rows = re.findall(r"^\| `(d\d+_c32_w4m16gp?)`[^|]* ((?:\| 0\.\d{3} ){5})\|$", ROUTING, re.MULTILINE)
    assert len(rows) == 3
    for model, cells in rows:
        assert [f"{x:.3f}" for x in choices.density_by_position(model)] == re.findall(r"0\.\d{3}", cells)


def test_files_are_small_and_all_described() -> None:
    paths = list(choices.FOLDER.glob("*"))
    assert sum(path.stat().st_size for path in paths) <= LIMIT
    described = re.findall(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)
    assert sorted(described) == choices.model_names()


@pytest.mark.parametrize("model", choices.model_names())
def test_trained_choices_are_of_the_past_and_as_the_table_says(model: str) -> None:
    row = next(line for line in TABLE.splitlines() if line.startswith(f"| `{model}` |"))
    _, _, _, size, layers, density, at_8, at_32 = (cell.strip() for cell in row.strip("|").split("|"))
    assert [int(x) for x in layers.split(", ")] == choices.layers_of(model)
    for layer, *figures in zip(*(cell.split(", ") for cell in (layers, density, at_8, at_32)), strict=True):
        selected_HNc = choices.load_selected(model, int(layer))
        assert selected_HNc.shape == (2, 16384, 16384 // int(size))
        own_N1 = _own_chunk(selected_HNc)
        chunk_c = torch.arange(selected_HNc.shape[2])
        assert not (selected_HNc & (chunk_c >= own_N1)).any()
        if local := re.search(r"_w(\d)", model):
            assert (selected_HNc | (chunk_c >= own_N1) | (chunk_c < own_N1 - int(local[1]))).all()
        visited = choices.visited_over_selected(selected_HNc, (8, 32))
        measured = f"{choices.past_density(selected_HNc):.3f}", f"{visited[8]:.2f}", f"{visited[32]:.2f}"
        assert list(measured) == figures


@pytest.mark.parametrize("model", choices.model_names())
def test_made_choices_have_the_density_and_the_union_curve_of_those_they_are_like(model: str) -> None:
    layers = choices.layers_of(model)
    # of five the third and the fourth, which tell every mistake that any of them tells
    for layer in layers[2:4] or layers:
        found_HNc = choices.load_selected(model, layer)
        heads, tokens, chunks = found_HNc.shape
        # neighbouring chunks that are alike leave more to chance: two heads would be too few
        made_HNc = make_selected(model, layer, 2 * heads, tokens, tokens // chunks, "cpu")
        assert made_HNc[:heads].shape == found_HNc.shape
        assert not (made_HNc & (torch.arange(chunks) >= _own_chunk(made_HNc))).any()
        assert choices.past_density(made_HNc) == pytest.approx(choices.past_density(found_HNc), rel=0.04)
        found, made = (choices.visited_over_selected(x) for x in (found_HNc, made_HNc))
        for tile in choices.TILES:
            assert made[tile] == pytest.approx(found[tile], rel=0.04), (layer, tile)


@pytest.mark.parametrize("model", ["d11_c32_w4m16g", "d25_c32_w4m16g"])
def test_neighbouring_chunks_are_selected_together_as_often_as_in_those_they_are_like(model: str) -> None:
    """What keys and values by pair cost with chunks below 64 follows this."""
    found_HNc, made_HNc = choices.load_selected(model, 3), make_selected(model, 3, 2, 16384, 32, "cpu")
    routed_Nc = routed_available(16384, 512, choices.router_of(model).local_chunks)
    for width, allowed in ((2, 0.04), (4, 0.1)):
        found, made = (selected_side_by_side(x & routed_Nc, width) for x in (found_HNc, made_HNc))
        assert made == pytest.approx(found, rel=allowed), width


def test_made_choices_of_more_tokens_and_heads_persist_alike() -> None:
    like, made_HNc = fit_persistence("d11_w2m16", 2), make_selected("d11_w2m16", 2, 3, 32768, 64, "cpu")
    own_N1 = _own_chunk(made_HNc)
    local_Nc = (torch.arange(512) < own_N1) & (torch.arange(512) >= own_N1 - 2)
    assert (made_HNc | ~local_Nc).all()
    routed_HNc = made_HNc & ~local_Nc
    assert choices.past_density(routed_HNc) == pytest.approx(like.density, rel=0.04)
    expected = like.union_curve()
    for curve in (choices.visited_over_selected(head_Nc[None]) for head_Nc in routed_HNc):
        assert list(curve.values()) == pytest.approx(expected, rel=0.02)


def test_a_union_curve_is_that_of_all_ways_to_select() -> None:
    like = Persistence(density=0.4, steady=0.5, redrawn=0.3, flicker=0.6)
    share, again = like.flickering_set, 0.3 * 0.6
    # two tokens, by whether the steady chunk and the set are drawn anew between them
    steady_none = 0.8 * (0.7 * 1 + 0.3 * 0.8)
    flicker_none = share * ((1 - again) * 0.4**2 + again * 0.4 * (1 - share * 0.6)) + (1 - share) * (
        1 - again + again * (1 - share * 0.6)
    )
    assert like.union_curve((1, 2)) == pytest.approx([1.0, (1 - steady_none * flicker_none) / 0.4])
