"""Decoding where the router has queries and keys of its own, which the cache keeps of chunks that are not whole."""

from itertools import pairwise

import pytest
import torch

from dash_megatron.ops import DashCache, dash_attention, dash_decode
from dash_megatron.ops.decode import decode_and_count
from dash_megatron.ops.types import Router
from tests.ops.decode_sequences import BORDERS, ROUTER, C, Sequences
from tests.ops.kernels_under_test import DEVICE, TOLERANCE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OWN = {**ROUTER, "pool_heads": True}


@pytest.mark.parametrize("query_pool", [1, 3])
@pytest.mark.parametrize("page_size", [None, C], ids=["contiguous", "paged"])
def test_sequences_of_different_lengths_equal_the_reference(page_size, query_pool):
    sequences = Sequences(BORDERS, own=True)
    router = {"pool_heads": True, "query_pool": query_pool}
    expected, expected_selected = sequences.expected(**router)
    cache = sequences.cache(page_size, query_pool=query_pool)
    q, routing_q = sequences.fill(cache)
    out, selected = decode_and_count(q, cache, Router(C, **ROUTER, **router), "triton", routing_q)
    for x, y in zip(out, expected, strict=True):
        assert relative_error(x, y) < TOLERANCE[torch.float32][0]
    assert torch.equal(selected, expected_selected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("query_pool", [1, 4])
def test_a_prompt_in_pieces_and_then_tokens_equal_the_whole_forward(query_pool, backend):
    N, parts = 6 * C + 2, (0, C - 3, C + 1, 4 * C + 5, 4 * C + 6, 5 * C - 2)
    sequences = Sequences((N,), own=True)
    cache = sequences.cache(query_pool=query_pool)
    assert [cache.routing_keys.shape[1], cache.queries is None] == [C, query_pool == 1]
    settings = {**OWN, "query_pool": query_pool, "backend": backend}
    q, k, v, routing_q, routing_k = (
        x[0][None] for x in (sequences.q, sequences.k, sequences.v, *sequences.own)
    )
    expected = dash_attention(q, k, v, sequences.w, C, **settings, routing_q=routing_q, routing_k=routing_k)
    for first, last in pairwise(parts):
        sequences.prefill(cache, [first], [last], backend)
    for t in range(parts[-1], N):
        q_t, routing_q_t = sequences.append(cache, [t], backend)
        out = dash_decode(q_t, cache, **settings, routing_q=routing_q_t)
        torch.testing.assert_close(out, expected[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_sequences_that_get_no_token_keep_their_keys(backend):
    sequences = Sequences((2 * C + 5, C + 3), own=True)
    one, other = sequences.cache(), sequences.cache()
    for cache in (one, other):
        sequences.prefill(cache, [0, 0], [C + 2, C - 1], backend)
    before = one.routing_keys[1].clone()
    sequences.append(one, [C + 2, C - 1], backend, torch.tensor([True, False], device=DEVICE))
    sequences.prefill(other, [C + 2, C - 1], [C + 3, C - 1], backend)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(one.routing_keys[1], before, **exact)
    torch.testing.assert_close(one.routing_keys, other.routing_keys, **exact)
    assert one.lengths.tolist() == other.lengths.tolist() == [C + 3, C - 1]


def test_tokens_that_are_dropped_leave_the_keys_before_them():
    sequences = Sequences((3 * C + 4,), own=True)
    cache = sequences.cache(query_pool=4, spare_queries=6)
    sequences.prefill(cache, [0], [3 * C - 2])
    sequences.prefill(cache, [3 * C - 2], [3 * C + 4])
    expected = cache.summary[:, :3].clone()
    cache.lengths.sub_(6)
    cache.summary[:, 2] = 0
    sequences.prefill(cache, [3 * C - 2], [3 * C + 4])
    assert torch.equal(cache.summary[:, :3], expected)


WRONG = {
    "no key of the router": (
        lambda s, c: c.append(*s.at([0])[1:], s.w, q=s.own[0][0][:1]),
        "routing_k=None must be float32",
    ),
    "a key too many": (
        lambda s, _: Sequences((C,)).cache().append(*s.at([0])[1:], s.w, routing_k=s.own[1][0][:1]),
        "this one has routing_keys=None",
    ),
    "no query of the router": (
        lambda s, c: dash_decode(s.at([0])[0], c, pool_heads=True),
        "routing_q=None must be",
    ),
    "a query a head": (
        lambda s, c: dash_decode(s.at([0])[0], c, routing_q=s.own[0][0][:1]),
        "beside pool_heads=True where the router has its own",
    ),
    "fewer keys than a chunk": (
        lambda _, c: DashCache(
            c.k, c.v, c.summary, c.lengths, C, routing_keys=c.routing_keys[:, 1:].contiguous()
        ),
        f"at least chunk_size={C}",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tensors_of_the_router_are_named(call, message):
    sequences = Sequences((C,), own=True)
    with pytest.raises(ValueError, match=message):
        call(sequences, sequences.cache())
