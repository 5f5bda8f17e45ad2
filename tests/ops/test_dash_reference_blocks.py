"""Blocks of the plain torch DashAttention: however many there are the result is the same, and little is kept for the backward."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dash_megatron.ops import dash_attention, sequence_reference
from dash_megatron.ops.chunk_grid import ChunkGrid
from tests.ops.reference_runs import assert_close, bounds_of, make_inputs, run_reference, with_defaults


@pytest.mark.parametrize("cu_seqlens", [None, bounds_of(70, 1, 120, 9)], ids=["one-document", "packed"])
@pytest.mark.parametrize("kept_scores", [2**25, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("max_scores", "num_blocks"), [(2**24, 9), (0, 17)], ids=["large", "halved"])
def test_many_blocks_equal_a_single_block(max_scores, num_blocks, kept_scores, cu_seqlens, monkeypatch):
    leaves, upstream = make_inputs(N=200)
    monkeypatch.setattr(sequence_reference, "MAX_BLOCK_TOKENS", 256)
    options = {"cu_seqlens": cu_seqlens, "local_chunks": 1, "query_pool": 6}
    single = run_reference(leaves, upstream, **options)
    # 24 divides neither the chunks nor the documents
    monkeypatch.setattr(sequence_reference, "MAX_BLOCK_TOKENS", 24)
    monkeypatch.setattr(sequence_reference, "MAX_KEPT_SCORES", kept_scores)
    monkeypatch.setattr(sequence_reference, "MAX_BLOCK_SCORES", max_scores)
    grid = ChunkGrid.of(200, 4, cu_seqlens, leaves[0].device)
    assert len(sequence_reference.query_blocks(grid, 200, 4)[0]) == num_blocks
    many = run_reference(leaves, upstream, **options)
    assert torch.equal(single[2], many[2])
    for a, b in zip([single[0], *single[1]], [many[0], *many[1]], strict=True):
        assert_close(a, b, torch.float64)


def test_recomputed_blocks_keep_no_scores_for_the_backward(monkeypatch):
    leaves, _ = make_inputs(N=200, dtype=torch.float32)

    def kept_elements():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            dash_attention(*leaves, **with_defaults())
        return sum(sizes)

    num_weights = 4 * 200 * 200 // 2
    assert kept_elements() > num_weights
    monkeypatch.setattr(sequence_reference, "MAX_KEPT_SCORES", 0)
    assert kept_elements() < num_weights / 2


MEMORY_SCRIPT = """
import resource, torch
from dash_megatron.ops import dash_attention
torch.set_num_threads(1)
torch.manual_seed(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q = torch.randn(1, 4096, 8, 64, requires_grad=True)
k, v = (torch.randn(1, 4096, 2, 64, requires_grad=True) for _ in range(2))
w = torch.randn(2, 64, requires_grad=True)
dash_attention(q, k, v, w, chunk_size=64, backend="reference").square().sum().backward()
assert all(x.grad.isfinite().all() for x in (q, k, v, w))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_4096_tokens_of_8_heads_forward_and_backward_take_less_than_1_gib():
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    # Linux counts in KiB, macOS in bytes
    grown_gib = int(run.stdout) / (2**30 if sys.platform == "darwin" else 2**20)
    assert grown_gib < 1
