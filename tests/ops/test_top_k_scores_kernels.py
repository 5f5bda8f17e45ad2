"""Scores of chunks by the kernel against plain torch, and the selection: interpreted on CPU, compiled on a GPU."""

import pytest
import torch

from dash_megatron.ops.kernels import chunk_scores
from dash_megatron.ops.topk import grid as grids
from dash_megatron.ops.topk import reference
from dash_megatron.ops.topk import triton as topk_triton
from dash_megatron.topk_selection import Selection
from tests.ops.kernels_under_test import CUDA, DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = [3, 40, 1, 150, 16]
# Of float32 scores, relative: order of summation. Sums over overlapping keys are a few times their terms.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(grids, "MAX_BLOCK_SCORES", {"cpu": 2**13, "cuda": 2**25})


def packed_grid(lengths, C):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return grids.make_grid(1, sum(lengths), C, bounds, DEVICE)


def tensors(grid, group, stride, dtype=torch.float32, H=2, D=16):
    """Queries, large enough for the selection to matter, and pooled keys."""
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(grid.num_rows, H * group, D, generator=generator)
    pooled = torch.randn(grid.num_rows // stride, H, D, generator=generator)
    return q.to(DEVICE, dtype), pooled.to(DEVICE, dtype)


def scores_by_torch(q, pooled, grid, block, selection, reduce):
    C, per_chunk = grid.chunk_size, grid.chunk_size // selection.kernel_stride
    q_THGD = q[block.start * C : block.end * C].unflatten(1, (pooled.shape[1], -1)) * q.shape[-1] ** -0.5
    pooled_JHD = pooled[block.first * per_chunk : block.end * per_chunk]
    weights = reference.kernel_weights(q_THGD, pooled_JHD, reference.visible_kernels(grid, block, selection))
    return reference.chunk_scores(weights.sum(1), grid, selection, reduce)


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "stride", "C"), [(8, 4, 16), (16, 16, 16), (16, 4, 16), (8, 8, 32), (32, 16, 64)]
)
def test_kernel_scores_a_documents_past_chunks_as_torch_does(size, stride, C, group, reduce):
    grid, selection = packed_grid(LENGTHS, C), Selection(kernel_size=size, kernel_stride=stride)
    q, pooled = tensors(grid, group, stride)
    launches, sizes = topk_triton.prepare(q, pooled.shape[1], grid)
    for block in grid.blocks(1, most_rows=2 * C):
        found = chunk_scores.score_chunks(
            q, pooled, grid.first_c, *block, size, stride, reduce, sizes, launches.route
        )
        expected = scores_by_torch(q, pooled, grid, block, selection, reduce)
        own_T = torch.arange(block.start, block.end, device=DEVICE).repeat_interleave(C)[:, None]
        chunk_c = torch.arange(block.first, block.end, device=DEVICE)
        past_Tc = (chunk_c < own_T) & (chunk_c >= grid.first_c[own_T])
        expected = expected.masked_fill(~past_Tc, -torch.inf)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_kernel_and_torch_select_alike_in_half_precision(reduce):
    C = 64 if CUDA else 16
    grid = packed_grid([16384, 5000, 900] if CUDA else LENGTHS, C)
    selection = Selection(kernel_size=C // 2, kernel_stride=C // 4, top_k=16 if CUDA else 2)
    q, pooled = tensors(grid, 4, C // 4, torch.bfloat16)
    found = topk_triton.select_chunks_triton(q, pooled, grid, selection, reduce)
    # the same rounded operands, so that only the order of sums differs
    expected = reference.select_chunks_reference(q, pooled, grid, selection, reduce)
    differ = (found.sort(-1).values != expected.sort(-1).values).any(-1)
    assert differ.float().mean() <= (1e-3 if CUDA else 0)
    assert torch.equal(found, topk_triton.select_chunks_triton(q, pooled, grid, selection, reduce))


@pytest.mark.parametrize("top_k", [0, 3, 50])
def test_top_chunks_are_those_of_a_stable_sort_despite_ties(top_k):
    C, H = 16, 2
    grid = packed_grid([16 * 5, 16 * 30 + 3], C)
    selection = Selection(kernel_size=8, kernel_stride=4, top_k=top_k, initial_blocks=1, local_blocks=2)
    for block in grid.blocks(1, most_rows=12 * C):
        T, num = (block.end - block.start) * C, block.end - block.first
        scores = torch.randint(4, (H, T, num), generator=torch.Generator().manual_seed(0)) / 7
        own_T = torch.arange(block.start, block.end).repeat_interleave(C)[:, None]
        chunk_c, first_T1 = torch.arange(block.first, block.end), grid.first_c.cpu()[own_T]
        free_Tc = (chunk_c >= first_T1 + 1) & (chunk_c < own_T - 1)
        ranked, place = scores.masked_fill(~free_Tc, -1).sort(dim=-1, descending=True, stable=True)
        expected = (place + block.first).masked_fill(ranked < 0, -1)[..., :top_k]
        # what may not be selected may be anything
        scores = scores.masked_fill(~free_Tc & (chunk_c % 2 == 0), -torch.inf).to(DEVICE)
        found = grids.top_chunks(scores, grid, block, selection)[..., 2:].transpose(0, 1).cpu()
        assert torch.equal(found[..., : expected.shape[-1]], expected)
        assert (found[..., expected.shape[-1] :] == -1).all()
