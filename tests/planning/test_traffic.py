"""Bytes of every exchange against numbers worked out by hand."""

from dataclasses import replace

import pytest

from dash_megatron.planning.traffic import (
    ContextComm,
    ContextShape,
    PassBytes,
    ZeroBytes,
    alignment,
    context_exchange,
    exchange_copies,
    query_halo,
    ring_all_gather,
    ring_all_reduce,
    tensor_parallel_layer,
    zero_step,
)

# 4 ranks of 10 tokens: K and V are 2 * 10 * 2 * 8 * 2 = 640 bytes in bf16; 3 chunks of 4 tokens are 3 * 2 * 8 = 48
# summary elements, 96 bytes beside bf16 and 192 in float32
SHAPE = ContextShape(context=4, tokens=10, heads=6, kv_heads=2, head_dim=8, chunk_size=4)


@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [
        ("all_gather", 3 * (640 + 96), 3 * (2 * 640 + 192)),
        ("p2p", 3 * (640 + 96), 3 * (640 + 1280 + 192)),
        # 10 tokens * 8 * 2 bytes * (12 + 4) heads, of which a quarter stays
        ("a2a", 1920, 1920),
        # 5 blocks of 2 * 4 * 8 * 2 = 128 bytes; 6 bits are one byte per peer
        ("sparse", 5 * 128 + 3 + 3 * 96, 2 * 5 * 128 + 3 * 192),
    ],
)
def test_exchanges_send_what_a_hand_count_says(kind: ContextComm, forward: int, backward: int) -> None:
    assert context_exchange(kind, SHAPE, sent_chunks=5) == PassBytes(forward, backward)


@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [
        # an output of 10 * 6 * 8 * 2 = 960 bytes, keys and values of 640, of 4 ranks
        # gradients are rounded, and four added up
        ("all_gather", 0, (1 + 16) * 640),
        # laid out, and all of them gathered, in the backward twice
        ("sparse", 4 * 960 + 3 * 640 + 16 * 640, (7 + 16 + 32) * 640),
        ("p2p", (4 + 56) * 960 + 3 * 640, 24 * 960 + (8 + 56) * 640),
        # 10 tokens * 8 * 2 bytes * 16 heads, read and written once
        ("a2a", 2 * 2560, 2 * 2560),
    ],
)
def test_exchanges_copy_what_a_hand_count_says(kind: ContextComm, forward: int, backward: int) -> None:
    assert exchange_copies(kind, SHAPE) == PassBytes(forward, backward)
    assert exchange_copies(kind, replace(SHAPE, context=1)) == PassBytes(0, 0)


def test_float32_doubles_bytes() -> None:
    wide = ContextShape(context=4, tokens=10, heads=6, kv_heads=2, head_dim=8, chunk_size=4, element_bytes=4)
    # dK and dV are float32 already, so p2p's accumulation costs no more than the input dtype there
    assert context_exchange("p2p", wide) == PassBytes(3 * (1280 + 192), 3 * (1280 + 1280 + 192))


def test_padding_to_the_largest_rank_counts() -> None:
    padded = ContextShape(
        context=2, tokens=10, heads=6, kv_heads=2, head_dim=8, chunk_size=4, rows=13, chunks=9
    )
    assert context_exchange("all_gather", padded).forward == 2 * 13 * 2 * 8 * 2 + 9 * 2 * 8 * 2
    # 18 bits are three bytes
    assert context_exchange("sparse", padded, sent_chunks=0).forward == 3 + 9 * 2 * 8 * 2


@pytest.mark.parametrize("kind", ["all_gather", "p2p", "a2a", "sparse"])
def test_one_rank_alone_sends_nothing(kind: ContextComm) -> None:
    alone = ContextShape(context=1, tokens=40, heads=6, kv_heads=2, head_dim=8, chunk_size=4)
    assert context_exchange(kind, alone, sent_chunks=0) == PassBytes(0, 0)


def test_sparse_of_everything_is_all_gather_and_its_requests() -> None:
    whole = ContextShape(context=4, tokens=16, heads=6, kv_heads=2, head_dim=8, chunk_size=4)
    sparse = context_exchange("sparse", whole, sent_chunks=3 * 4 * 2)
    dense = context_exchange("all_gather", whole)
    assert sparse == PassBytes(dense.forward + whole.request_bytes, dense.backward)


def test_wrong_exchanges_are_errors() -> None:
    with pytest.raises(ValueError, match="needs sent_chunks"):
        context_exchange("sparse", SHAPE)
    with pytest.raises(ValueError, match="must be all_gather, p2p, a2a or sparse"):
        context_exchange("ring", SHAPE)  # type: ignore[arg-type]


def test_aligned_tokens_travel_there_and_their_outputs_back() -> None:
    # 10 heads of q, k and v of 16 bytes a token out; 6 of the output
    assert alignment(SHAPE, tokens_sent=3, tokens_returned=2) == PassBytes(3 * 160 + 2 * 96, 3 * 96 + 2 * 160)


def test_queries_before_a_border_go_there_and_their_gradients_back() -> None:
    # 6 heads of 16 bytes, or means over those of each of 2 groups
    assert query_halo(SHAPE, queries_sent=3, queries_returned=2) == PassBytes(3 * 96, 2 * 96)
    assert query_halo(replace(SHAPE, pool_heads=True), 3, 2) == PassBytes(3 * 32, 2 * 32)


def test_rings_and_tensor_parallelism() -> None:
    assert (ring_all_gather(800, 4), ring_all_reduce(800, 4), ring_all_reduce(800, 1)) == (600, 1200, 0)
    # a stream of 10 * 16 * 2 = 320 bytes, halved among two ranks
    assert tensor_parallel_layer(10, 16, 2, sequence=False) == PassBytes(640, 640)
    assert tensor_parallel_layer(10, 16, 2, sequence=True) == PassBytes(640, 960)
    assert tensor_parallel_layer(10, 16, 1, sequence=True) == PassBytes(0, 0)


@pytest.mark.parametrize(
    ("stage", "gradients", "parameters"),
    # 100 parameters are 200 bytes, of which a ring of 4 sends 150, and their gradients 400
    [(0, 600, 0), (1, 600, 150), (2, 5 * 600, 150), (3, 5 * 300, 5 * 3 * 150)],
)
def test_zero_moves_as_much_as_its_stage_says(stage: int, gradients: int, parameters: int) -> None:
    assert zero_step(100, stage, 4, micro_batches=5, gathers=3) == ZeroBytes(gradients, parameters)


def test_an_unknown_zero_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="stage=4"):
        zero_step(100, 4, 4)
