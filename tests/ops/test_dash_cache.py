"""The cache of decoding: what is written, and what is refused."""

import re
from itertools import pairwise

import pytest
import torch

from dash_megatron.ops import DashCache, dash_decode
from dash_megatron.ops.pooling import pool_queries
from tests.ops.decode_sequences import C, Sequences
from tests.ops.kernels_under_test import CUDA, DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_prefill_in_pieces_is_prefill_at_once(backend):
    sequences = Sequences((5 * C + 3, 2 * C, 1))
    pieces = [[0, 0, 0], [3, C, 0], [C + 2, C, 1], [4 * C, 2 * C, 1], list(sequences.lengths)]
    at_once, in_pieces = (sequences.cache(2 * C, query_pool=5) for _ in range(2))
    pooled = sequences.prefill(at_once, pieces[0], pieces[-1], backend)
    found = [
        sequences.prefill(in_pieces, start, end, backend).split(
            [j - i for i, j in zip(start, end, strict=True)]
        )
        for start, end in pairwise(pieces)
    ]
    rows = torch.cat([torch.cat(parts) for parts in zip(*found, strict=True)])
    torch.testing.assert_close(rows, pooled)
    expected = [pool_queries(q[None], 5, backend="reference")[0] for q in sequences.q]
    torch.testing.assert_close(pooled, torch.cat(expected))
    torch.testing.assert_close(in_pieces.queries, at_once.queries, rtol=0, atol=0, equal_nan=True)
    assert in_pieces.lengths.tolist() == list(sequences.lengths)
    # what was never written is still NaN in both
    for x, y in ((in_pieces.k, at_once.k), (in_pieces.v, at_once.v), (in_pieces.summary, at_once.summary)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)
    written = sum(n // C for n in sequences.lengths)
    assert int((~in_pieces.summary.isnan()).all(-1).all(-1).sum()) == written


def test_triton_and_reference_write_the_same_cache():
    sequences = Sequences((3 * C + 3, 2 * C, 1), dtype=torch.bfloat16)
    ours, expected = (sequences.cache(2 * C, query_pool=16) for _ in range(2))
    _, pooled = sequences.fill(ours, "triton")
    _, expected_pooled = sequences.fill(expected, "reference")
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-2, atol=1e-3)
    for name in ("k", "v", "lengths", "queries"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
        )
    torch.testing.assert_close(ours.summary, expected.summary, rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_sequences_that_are_not_active_stay_as_they_are(backend):
    sequences = Sequences((2 * C, 1, C))
    cache = sequences.cache(query_pool=4)
    sequences.prefill(cache, [0, 0, 0], [2 * C - 1, 0, C - 1], backend)
    q, k, v = sequences.at([2 * C - 1, 0, C - 1])
    kept = cache.queries.clone()
    active = torch.tensor([True, False, False], device=DEVICE)
    pooled = cache.append(k, v, sequences.w, active, backend, q=q)
    assert torch.equal(pooled[1:], q[1:])
    torch.testing.assert_close(cache.queries[1:], kept[1:], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cache.queries[0, (2 * C - 1) % 4], q[0])
    assert cache.lengths.tolist() == [2 * C, 0, C - 1]
    assert not cache.summary[0, :2].isnan().any()
    assert cache.summary[1:].isnan().all()
    assert cache.k[2, C - 1].isnan().all()


def _contiguous(**changes):
    return DashCache.contiguous(**{"batch": 2, "max_length": 40, "num_kv_heads": 2, "head_dim": 16, "chunk_size": 16, "device": DEVICE, "dtype": torch.float32, **changes})  # fmt: skip


def _ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, device=DEVICE)


WRONG = {
    "max_length=0 must be an int of at least 1": lambda c: _contiguous(max_length=0),
    "chunk_size=24 must be a power of two": lambda c: _contiguous(chunk_size=24),
    "page_size=24 (k.shape[1]) must be a multiple of chunk_size=16": lambda c: DashCache.paged(
        4, _ones(2, 2, dtype=torch.int32), 2, 16, page_size=24, chunk_size=16
    ),
    "page_table=int64 [2, 2]": lambda c: DashCache.paged(4, _ones(2, 2, dtype=torch.int64), 2, 16),
    "lengths=int64 [2]": lambda c: DashCache(c.k, c.v, c.summary, c.lengths.long(), 16),
    "summary=float32 [2, 3, 2, 16]": lambda c: DashCache(c.k, c.v, c.summary, c.lengths, 8),
    "k=float32 [1, 2, 16]": lambda c: c.append(_ones(1, 2, 16), _ones(2, 2, 16), _ones(2, 16)),
    "v=bfloat16 [2, 2, 16]": lambda c: c.append(
        _ones(2, 2, 16), _ones(2, 2, 16, dtype=torch.bfloat16), _ones(2, 16)
    ),
    "summary_query=float32 [32]": lambda c: c.append(_ones(2, 2, 16), _ones(2, 2, 16), _ones(32)),
    "active=float32 [2]": lambda c: c.append(_ones(2, 2, 16), _ones(2, 2, 16), _ones(2, 16), _ones(2)),
    "cu_seqlens=int32 [2]": lambda c: c.prefill(
        _ones(3, 2, 16), _ones(3, 2, 16), _ones(2, 16), _ones(2, dtype=torch.int32)
    ),
    "query_pool=0 must be an int": lambda c: _contiguous(query_pool=0),
    "num_heads=None must be given beside query_pool=4": lambda c: _contiguous(query_pool=4),
    "queries=float32 [2, 3, 4, 16]": lambda c: DashCache(
        c.k, c.v, c.summary, c.lengths, 16, queries=_ones(2, 3, 4, 16), query_pool=4
    ),
    "queries=None with query_pool=4": lambda c: DashCache(c.k, c.v, c.summary, c.lengths, 16, query_pool=4),
    "queries=float32 [2, 4, 4, 16] on": lambda c: DashCache(
        c.k, c.v, c.summary, c.lengths, 16, queries=_ones(2, 4, 4, 16)
    ),
    "q=None must be float32 [2, 4, 16]": lambda c: _contiguous(query_pool=4, num_heads=4).append(
        _ones(2, 2, 16), _ones(2, 2, 16), _ones(2, 16)
    ),
    "routing_q=None must be": lambda c: dash_decode(_ones(2, 4, 16), c, query_pool=4),
    "routing_q=float32 [2, 4, 16] on": lambda c: dash_decode(_ones(2, 4, 16), c, routing_q=_ones(2, 4, 16)),
    "local_chunks=-1 must be": lambda c: dash_decode(_ones(2, 4, 16), c, local_chunks=-1),
    "q.shape=[2, 3, 16] must be [B, Hq, D]": lambda c: dash_decode(_ones(2, 3, 16), c),
    "q=torch.bfloat16": lambda c: dash_decode(_ones(2, 4, 16, dtype=torch.bfloat16), c),
    "sigma=0 must be a finite": lambda c: dash_decode(_ones(2, 4, 16), c, sigma=0),
    "alpha=1 must be": lambda c: dash_decode(_ones(2, 4, 16), c, alpha=1),
    "backend='cuda' must be": lambda c: dash_decode(_ones(2, 4, 16), c, backend="cuda"),
    "cache=Tensor must be a DashCache": lambda c: dash_decode(_ones(2, 4, 16), c.k),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message](_contiguous())


@pytest.mark.skipif(CUDA, reason="needs a CPU: a GPU does not wait to look at lengths")
def test_on_cpu_a_full_sequence_and_wrong_bounds_are_refused_before_anything_is_written():
    cache = _contiguous()
    cache.lengths[1] = 48
    with pytest.raises(ValueError, match=r"lengths\[1\]=49 must be at most the cache's capacity 48"):
        cache.append(_ones(2, 2, 16), _ones(2, 2, 16), _ones(2, 16))
    for bounds in ([0, 2, 2], [0, 4, 3], [1, 2, 3]):
        with pytest.raises(
            ValueError, match=re.escape(f"cu_seqlens={bounds} must rise from 0 to the 3 tokens")
        ):
            cache.prefill(_ones(3, 2, 16), _ones(3, 2, 16), _ones(2, 16), torch.tensor(bounds).int())
    assert cache.lengths.tolist() == [0, 48]
    assert cache.k.isnan().all()


def test_a_page_outside_the_pool_is_named():
    table = torch.tensor([[0, 1], [2, 9]], dtype=torch.int32, device=DEVICE)
    cache = DashCache.paged(4, table, 2, 16, page_size=16, chunk_size=16)
    cache.lengths.copy_(torch.tensor([20, 16]))
    cache.check()
    cache.lengths[1] += 1
    with pytest.raises(ValueError, match=r"page_table\[1\] holds page 9 among the 2 pages of its 17 tokens"):
        cache.check()
