"""Attention to selected chunks by the list-driven kernels against the reference: interpreted on CPU, compiled on a GPU."""

import pytest
import torch

from dash_megatron.ops.topk import grid as grids
from dash_megatron.ops.topk import triton as topk_triton
from dash_megatron.ops.topk.infllmv2 import infllmv2_attention
from dash_megatron.ops.topk.nsa import Compression, nsa_attention
from dash_megatron.topk_selection import Selection
from tests.ops.kernels_under_test import CUDA, DEVICE, TOLERANCE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SELECTION = Selection(kernel_size=8, kernel_stride=4, top_k=1, initial_blocks=1, local_blocks=2)


@pytest.fixture(autouse=True)
def lists_in_several_blocks(monkeypatch):
    monkeypatch.setattr(grids, "MAX_BLOCK_SCORES", {"cpu": 16 * 16 * 12, "cuda": 2**20})


def inputs(N, Hq, Hkv, D, dtype, B=1):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (B, N, Hq, D),
        (B, N, Hkv, D),
        (B, N, Hkv, D),
        (B, N, Hq, 3),
        (Hkv, 8, D),
        (Hkv, D, D),
        (Hkv, D, D),
    ]
    shapes += shapes[4:]
    return [torch.randn(*s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def run(kind, leaves, **options):
    if kind == "infllmv2":
        leaves = leaves[:3]
        out, routing = infllmv2_attention(*leaves, SELECTION, **options)
    else:
        compressions = Compression(*leaves[4:7]), Compression(*leaves[7:])
        out, routing = nsa_attention(*leaves[:4], *compressions, SELECTION, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), torch.autograd.grad(out, leaves, upstream), routing


@pytest.mark.parametrize(
    ("kind", "N", "shape", "dtype", "lengths"),
    [
        ("infllmv2", 90, {"Hq": 4, "Hkv": 2, "D": 16}, torch.float32, None),
        ("infllmv2", 90, {"Hq": 3, "Hkv": 1, "D": 24}, torch.float32, [3, 16, 70, 1]),
        ("infllmv2", 50, {"Hq": 2, "Hkv": 2, "D": 16, "B": 2}, torch.float32, None),
        ("infllmv2", 90, {"Hq": 4, "Hkv": 2, "D": 16}, torch.bfloat16, None),
        ("nsa", 90, {"Hq": 4, "Hkv": 2, "D": 16}, torch.float32, None),
        ("nsa", 90, {"Hq": 4, "Hkv": 1, "D": 24}, torch.float32, [3, 16, 70, 1]),
        ("nsa", 50, {"Hq": 2, "Hkv": 2, "D": 16, "B": 2}, torch.float32, None),
        ("nsa", 75, {"Hq": 4, "Hkv": 2, "D": 16}, torch.bfloat16, [20, 55]),
    ],
)
def test_kernels_agree_with_the_reference(kind, N, shape, dtype, lengths):
    # among many chunks the rounding of averaged keys to half precision would change some selections
    if CUDA and lengths is None and dtype == torch.float32:
        N *= 30
    leaves = inputs(N, dtype=dtype, **shape)
    bounds = None
    if lengths:
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    options = {"chunk_size": 16, "cu_seqlens": bounds} | ({"window": 32} if kind == "nsa" else {})
    out, gradients, routing = run(kind, leaves, backend="triton", **options)
    expected, right, expected_routing = run(kind, leaves, backend="reference", **options)
    assert torch.equal(routing.chunks_selected, expected_routing.chunks_selected)
    assert out.dtype == dtype
    allowed, allowed_gradient = TOLERANCE[dtype]
    assert relative_error(out, expected) <= allowed
    assert relative_error(routing.density, expected_routing.density) == 0
    for gradient, reference in zip(gradients, right, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, reference) <= allowed_gradient


def test_lists_hold_what_any_token_of_a_tile_selected(monkeypatch):
    # two chunks at a time
    monkeypatch.setattr(grids, "MAX_BLOCK_SCORES", {"cpu": 2 * 16 * 10, "cuda": 2 * 16 * 10})
    grid = grids.make_grid(1, 80, 16, None, DEVICE)
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(5).repeat_interleave(16)
    picked = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(160)]).view(80, 2, 3)
    picked = picked.masked_fill(picked >= own[:, None, None], -1).to(DEVICE)
    q = torch.zeros(80, 2 * 16, 16, device=DEVICE)
    _, sizes = topk_triton.prepare(q, 2, grid)
    lists, T = topk_triton.make_lists(picked, grid, sizes), sizes.tile_tokens
    assert sizes.tiles_per_chunk > 1
    for h in range(2):
        for tile in range(80 // T):
            place = h * sizes.tiles_per_head + tile
            entries = slice(int(lists.offset[place]), int(lists.offset[place] + lists.counts[place]))
            tokens = [set(picked[tile * T + t, h].tolist()) - {-1} for t in range(T)]
            chunks = lists.chunk[entries].tolist()
            assert chunks == sorted(set().union(*tokens))
            expected = [[0.0 if chunk in token else -torch.inf for token in tokens] for chunk in chunks]
            assert lists.log_prior[entries].tolist() == expected


@pytest.mark.parametrize("above", [0.9, 100.0], ids=["pairs", "tiles"])
def test_the_device_takes_pairs_or_tiles_of_lists_without_a_router(above, monkeypatch):
    leaves, find_launches = inputs(60, Hq=2, Hkv=1, D=16, dtype=torch.float32), topk_triton.find_launches

    def launches(*args):
        found = find_launches(*args)
        slabs = found.attend_pairs._replace(block=16)
        by_pair = {"attend_pairs": slabs, "backward_pairs": slabs}
        return found._replace(**by_pair, attend_pairs_above=above, backward_pairs_above=above)

    options = {"chunk_size": 16}
    expected = run("infllmv2", leaves, backend="reference", **options)
    monkeypatch.setattr(topk_triton, "find_launches", launches)
    out, gradients, _ = run("infllmv2", leaves, backend="triton", **options)
    for x, y in zip((out, *gradients), (expected[0], *expected[1]), strict=True):
        assert relative_error(x, y) < TOLERANCE[torch.float32][1]
