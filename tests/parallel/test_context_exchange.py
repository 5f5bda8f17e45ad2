"""Exchanges between context-parallel ranks: results, leaks, and bytes."""

import contextlib
import dataclasses
import functools
import itertools
import weakref
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dash_megatron.config import ParallelConfig
from dash_megatron.ops import sharded_reference
from dash_megatron.ops.shards import OutputGradient, RoutedQueries
from dash_megatron.ops.types import Router
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups
from dash_megatron.parallel.context.attention import BackwardStart, sharded_dash_attention
from dash_megatron.parallel.context.communication import ContextGroup, PendingTensor
from dash_megatron.parallel.context.exchange import Ring
from dash_megatron.parallel.context.heads import heads_for_rows, rows_for_heads
from dash_megatron.parallel.context.layout import (
    shard_sequence,
    zigzag_tokens,
)
from dash_megatron.parallel.context.query_halo import routing_queries
from dash_megatron.planning.traffic import (
    ContextShape,
    PassBytes,
    alignment,
    context_exchange,
    query_halo,
)
from tests.parallel.context_workers import CHUNK, Case, attend_alone, attend_together, inputs_of

DASH_COMMS = ["all_gather", "a2a", "p2p", "sparse"]
FULL_COMMS = ["a2a"]
# the second sees further than a piece of four ranks is long
ROUTERS = {
    "pooled": {"local_chunks": 2, "query_pool": 16},
    "pooled far": {"query_pool": 100, "pool_heads": True},
    "own router": {"own_router": True},
    "own router, pooled": {"own_router": True, "query_pool": 16, "learned_scaling": True},
}
DOCUMENTS = {
    "one": (0, 384),
    # a document of one token, one that ends on a border, some that straddle one
    "packed": (0, 37, 38, 96, 229, 384),
    "many": (*range(0, 300, 7), 384),
}
NAMES = ("output", "dq", "dk", "dv", "d summary query", "d scaling")
OWN_NAMES = ("output", "dq", "dk", "dv", "d routing query", "d routing key", "d summary query", "d scaling")
# float64: sums in another order
TOLERANCE = 1e-12


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@functools.cache
def alone(case: Case) -> list[torch.Tensor]:
    """What `attend_alone` gives, which no exchange and no number of ranks changes."""
    return attend_alone(case)


def together(cases: dict[str, Case], size: int, run_processes: Any, folder: Path) -> dict[str, Any]:
    """Results of every case, and the traffic of every rank."""
    run_processes(size, attend_together, cases, str(folder))
    return {
        name: (
            torch.load(folder / f"{name}.pt"),
            [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in range(size)],
        )
        for name in cases
    }


def kinds_and_comms() -> list[tuple[str, str]]:
    return [("dash", comm) for comm in DASH_COMMS] + [("full", comm) for comm in FULL_COMMS]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_exchange_gives_what_one_process_gives(size: int, run_processes: Any, tmp_path: Path) -> None:
    # of a2a every rank takes some
    kv_heads = {comm: 12 if comm == "a2a" else 2 for comm in DASH_COMMS}
    cases = {
        f"{kind}_{comm}_{documents}": Case(bounds, kind, comm, heads=(2 * kv_heads[comm], kv_heads[comm]))
        for (kind, comm), (documents, bounds) in itertools.product(kinds_and_comms(), DOCUMENTS.items())
    }
    for comm, Hkv in kv_heads.items():
        cases[f"other_prior_{comm}"] = Case(
            DOCUMENTS["packed"], comm=comm, heads=(Hkv, Hkv), alpha=1.3, estimate_diagonal=False
        )
        cases[f"scaled_{comm}"] = Case(DOCUMENTS["packed"], comm=comm, heads=(Hkv, Hkv), learned_scaling=True)
        for (name, router), documents in itertools.product(ROUTERS.items(), DOCUMENTS):
            cases[f"{name}_{comm}_{documents}"] = Case(
                DOCUMENTS[documents], comm=comm, heads=(2 * Hkv, Hkv), **router
            )
    for name, (found, _) in together(cases, size, run_processes, tmp_path).items():
        names = OWN_NAMES if cases[name].own_router else NAMES
        expected_of_all = alone(cases[name]._replace(comm=""))
        for what, x, expected in zip(names[: len(found)], found, expected_of_all, strict=True):
            assert error(x, expected) <= TOLERANCE, (name, what)


@pytest.mark.parametrize("by_pair", [False, True], ids=["over tiles", "over pairs"])
def test_every_exchange_serves_the_triton_kernels(by_pair: bool, run_processes: Any, tmp_path: Path) -> None:
    """Memory is poisoned: the first rank has 54 rows and the second 74, and no rank attends to all chunks of the other."""
    bounds = (0, 37, 38, 90, 128)
    assert shard_sequence(torch.tensor(bounds, dtype=torch.int32), 0, 2, CHUNK).chunks.places.max_rows == 74
    cases = {
        comm: Case(
            bounds,
            comm=comm,
            by_pair=by_pair,
            heads=(4, 2),
            backend="triton",
            dtype=torch.float32,
            # with the first exchange only
            learned_scaling=comm == "all_gather",
            local_chunks=1,
            query_pool=5,
            own_router=comm == "sparse",
        )
        for comm in ("all_gather", "p2p", "sparse")
    }
    for name, (found, _) in together(cases, 2, run_processes, tmp_path).items():
        names = OWN_NAMES if cases[name].own_router else NAMES
        for what, x, expected in zip(names[: len(found)], found, attend_alone(cases[name]), strict=True):
            assert error(x, expected) <= 1e-5, (name, what)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_exchange_serves_kernels_of_ranks_that_share_a_gpu(
    dtype: torch.dtype, run_processes: Any, tmp_path: Path
) -> None:
    documents = {"one": (0, 4096), "packed": (0, 1000, 1001, 2048, 3333, 4096)}
    # with a sharper router and bfloat16, chunks that rounding moves over the threshold alone exceed the limit
    factor = 3.0 if dtype == torch.float32 else 1.0
    cases = {
        f"{comm}_{name}": Case(
            bounds,
            comm=comm,
            scaling_factor=factor,
            heads=(16, 4),
            local_chunks=1 if name == "packed" else 0,
            query_pool=16 if name == "packed" else 1,
            backend="triton",
            dtype=dtype,
            device="cuda",
        )
        for comm, (name, bounds) in itertools.product(("all_gather", "p2p", "sparse"), documents.items())
    }
    run_processes(4, attend_together, cases, str(tmp_path), cuda=True)
    for name, case in cases.items():
        expected = [x.cpu() for x in attend_alone(case)]
        limits = (2e-4, 2e-3) if dtype == torch.float32 else (1e-2, 4e-2)
        for what, x, y in zip(NAMES[:5], torch.load(tmp_path / f"{name}.pt"), expected, strict=True):
            assert error(x.double(), y) <= limits[what != "output"], (name, what)


def test_a_token_changes_no_earlier_token_and_no_other_document(run_processes: Any, tmp_path: Path) -> None:
    bounds, token = DOCUMENTS["packed"], 150
    cases = {
        f"{kind}_{comm}_{changed}": Case(bounds, kind, comm, changed_token=changed)
        for (kind, comm), changed in itertools.product(kinds_and_comms(), (None, token))
    }
    results = together(cases, 2, run_processes, tmp_path)
    for kind, comm in kinds_and_comms():
        before, after = (results[f"{kind}_{comm}_{changed}"][0][0] for changed in (None, token))
        change = (after - before).abs().amax((1, 2))
        assert change[token:229].min() > 1e-6, "tokens that attend to it must see the change"
        assert torch.cat([change[:token], change[229:]]).max() <= 1e-13, (kind, comm)


def shape_of(shard: Any, routed: bool, case: Case) -> ContextShape:
    places = shard.chunks.places if routed else None
    heads, kv_heads = case.heads
    return ContextShape(
        context=shard.size,
        tokens=shard.rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=16,
        chunk_size=CHUNK,
        routing_heads=kv_heads * case.own_router,
        element_bytes=4,
        rows=places and places.max_rows,
        chunks=places and places.max_chunks,
    )


def sent_and_returned(shard: Any) -> tuple[int, int]:
    if shard.chunks.alignment is None:
        return 0, 0
    return tuple(sum(moves.send_counts) for moves in shard.chunks.alignment)


def lent_and_borrowed(shard: Any) -> tuple[int, int]:
    """Queries that other ranks need, and those of other ranks that are needed here."""
    counts = shard.chunks.halo.send_counts, shard.chunks.halo.receive_counts
    return tuple(sum(count) - count[shard.rank] for count in counts)


def test_bytes_sent_are_those_of_the_formulas(run_processes: Any, tmp_path: Path) -> None:
    cases = {
        f"{kind}_{comm}_{documents}": Case(DOCUMENTS[documents], kind, comm, dtype=torch.float32)
        for (kind, comm), documents in itertools.product(kinds_and_comms(), ("one", "packed"))
        if comm != "sparse"
    }
    for comm, documents in itertools.product(("all_gather", "p2p"), DOCUMENTS):
        cases[f"pooled_{comm}_{documents}"] = Case(
            DOCUMENTS[documents], comm=comm, dtype=torch.float32, query_pool=16, pool_heads=comm == "p2p"
        )
    for comm in ("all_gather", "a2a"):
        cases[f"own_router_{comm}"] = Case(
            DOCUMENTS["packed"],
            comm=comm,
            dtype=torch.float32,
            query_pool=16,
            own_router=True,
            heads=(16, 8),
        )
    for name, (_, ranks) in together(cases, 4, run_processes, tmp_path).items():
        case = cases[name]
        routed = case.kind == "dash" and case.comm != "a2a"
        for traffic in ranks:
            shape = shape_of(traffic["shard"], routed, case)
            shape = dataclasses.replace(shape, pool_heads=case.pool_heads)
            expected = context_exchange(case.comm, shape)
            if routed:
                expected += alignment(shape, *sent_and_returned(traffic["shard"]))
            if routed and case.query_pool > 1:
                expected += query_halo(shape, *lent_and_borrowed(traffic["shard"]))
            assert PassBytes(traffic["forward"], traffic["backward"]) == expected, name


def test_sparse_sends_what_was_selected_and_at_most_everything(run_processes: Any, tmp_path: Path) -> None:
    bounds = (0, 1024)
    routings = {"dense": (0.01, 0), "random": (3.0, 0), "sharp": (30.0, 0), "local": (30.0, 2)}
    cases = {
        f"{name}_{comm}": Case(
            bounds, comm=comm, scaling_factor=scale, similar_chunks=similar, dtype=torch.float32
        )
        for (name, (scale, similar)), comm in itertools.product(routings.items(), ("sparse", "all_gather"))
    }
    results = together(cases, 4, run_processes, tmp_path)
    share = {}
    for name in routings:
        (found, sparse), (same, gathered) = (results[f"{name}_{comm}"] for comm in ("sparse", "all_gather"))
        assert all(error(x, y) <= 1e-5 for x, y in zip(found, same, strict=True))
        for phase in ("forward", "backward"):
            total, bound = (sum(rank[phase] for rank in ranks) for ranks in (sparse, gathered))
            assert total <= bound, (name, phase)
        shape = shape_of(sparse[0]["shard"], True, cases[f"{name}_sparse"])
        # what is sent beyond summaries and requests is whole chunks; gradients go back where keys came from
        nothing, block = context_exchange("sparse", shape, 0), 2 * CHUNK * 16 * 4
        served = [divmod(rank["forward"] - nothing.forward, block) for rank in sparse]
        assert not any(rest for _, rest in served)
        chunks_returned = sum(rank["backward"] - nothing.backward for rank in sparse) / block
        assert chunks_returned == 2 * sum(count for count, _ in served)
        share[name] = sum(rank["forward"] for rank in sparse) / sum(rank["forward"] for rank in gathered)
    # zigzag alone saves what lies in the future; local routing saves most
    assert 1 > share["dense"] > share["local"]
    assert share["local"] < 0.4, share


class _FirstOfTwo:
    """A group of two ranks of which this process is the first: it notes what it does, and gets what it sent."""

    rank, size = 0, 2

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def counting(self, _: str) -> Any:
        return contextlib.nullcontext()

    def trade(self, sent: Any, received: Any) -> Any:
        self.log.append("send")
        for (_, x), (_, place) in zip(sent, received, strict=True):
            place.copy_(x)
        return mock.Mock(wait=lambda: self.log.append("wait"))


# heads of whole 8 bytes, and others
@pytest.mark.parametrize(("head_dim", "dtype"), [(4, torch.float64), (6, torch.bfloat16)])
def test_all_heads_are_on_their_way_before_the_first_is_waited_for(head_dim: int, dtype: torch.dtype) -> None:
    log: list[str] = []
    group: Any = _FirstOfTwo(log)
    x, y = (torch.randn(8, 6, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
    heads = heads_for_rows(group, x, y)
    # two pieces each
    assert log == ["send"] * 4 + ["wait"] * 4
    out = rows_for_heads(group, heads[0] * heads[1])
    assert log == (["send"] * 4 + ["wait"] * 4) + (["send"] * 2 + ["wait"] * 2)
    # the other rank has the same rows and attends with the first half of the heads, too
    assert torch.equal(out[:, :3], (x * y)[:, :3])
    log.clear()
    out.sum().backward()
    assert log == (["send"] * 2 + ["wait"] * 2) + (["send"] * 4 + ["wait"] * 4)


def test_keys_and_their_gradients_travel_while_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, to whom nothing is sent, asks for all in the same order."""
    log: list[str] = []

    def noted(owner: Any, name: str, as_what: str) -> None:
        function = getattr(owner, name)

        def note(*arguments: Any, **options: Any) -> Any:
            log.append(as_what)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, note)

    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    try:
        case = Case(DOCUMENTS["packed"])
        *rows, w, d_out = inputs_of(case)
        leaves = [x.requires_grad_() for x in (*rows, w)]
        group, router, start = ContextGroup(dist.group.WORLD), Router(**case.settings), BackwardStart()
        layout = shard_sequence(case.cu_seqlens, 0, 1, CHUNK).chunks
        out, _ = sharded_dash_attention(*leaves, router, layout, group, exchange="all_gather", start=start)
        projected = 2 * out
        watched = start.watch(projected)
        noted(ContextGroup, "all_gather", "gather")
        noted(ContextGroup, "send_shares", "send shares")
        noted(PendingTensor, "wait", "wait")
        noted(sharded_reference, "attend_backward", "attend")
        noted(sharded_reference, "route_backward", "route")
        projected.register_hook(lambda _: log.append("projection"))
        watched.backward(d_out)
    finally:
        destroy_process_groups()
    # keys and values: gathered before anything else, and their gradients sent before the router's
    assert log == [
        *["gather"] * 2, "projection", *["wait"] * 2, "attend", *["send shares"] * 2, "route", "send shares", *["wait"] * 3,
    ]  # fmt: skip


def test_of_exchanges_only_that_which_gathers_all_keys_has_nothing_to_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounded results of part of the keys would be rounded again as they are added up."""
    found: list[bool] = []
    for name in ("attend", "attend_backward"):
        stage = getattr(sharded_reference, name)

        def noted(*arguments: Any, stage: Any = stage) -> Any:
            found.append(arguments[-1].whole)
            return stage(*arguments)

        monkeypatch.setattr(sharded_reference, name, noted)
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    try:
        case = Case(DOCUMENTS["packed"])
        *rows, w, d_out = inputs_of(case)
        group, layout = ContextGroup(dist.group.WORLD), shard_sequence(case.cu_seqlens, 0, 1, CHUNK).chunks
        for exchange in ("all_gather", "sparse"):
            leaves = [x.requires_grad_() for x in (*rows, w)]
            out, _ = sharded_dash_attention(
                *leaves, Router(**case.settings), layout, group, exchange=exchange
            )
            out.backward(d_out)
    finally:
        destroy_process_groups()
    assert found == [True, True, False, False]


class _SecondOfFour:
    """A group of four ranks of which this process is the second; from the one before it comes what it sends itself."""

    rank, size = 1, 4

    def shift(self, x: torch.Tensor) -> PendingTensor:
        return PendingTensor(x.clone(), [])


def test_a_ring_forgets_what_a_window_gave_before_that_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(DOCUMENTS["one"])
    layout = shard_sequence(case.cu_seqlens, 1, 4, CHUNK).chunks
    q, k, v, w, d_out = (x[:96] for x in inputs_of(case))
    router, group = Router(**case.settings), _SecondOfFour()
    summary = sharded_reference.summarize(k, w, layout.queries, CHUNK).repeat(1, 4, 1)
    routed = sharded_reference.route(q, summary, layout.queries, router)
    queries = RoutedQueries(q, layout.queries, router, routed)
    ring = Ring(sharded_reference, layout, cast(ContextGroup, group))
    before: list[weakref.ref[torch.Tensor]] = []

    def note(name: str, kept: int) -> None:
        """Note what a stage gives, but for so many firsts, which are added up; where none is, all that the first call gave."""
        stage = getattr(sharded_reference, name)

        def noted(*arguments: Any) -> Any:
            assert all(given() is None for given in before)
            found = stage(*arguments)
            before.extend(weakref.ref(x) for x in found[kept:] if calls or kept)
            calls.append(name)
            return found

        calls: list[str] = []
        monkeypatch.setattr(sharded_reference, name, noted)

    note("attend", 0)
    attended = ring.attend(queries, k, v)
    # of seven pieces, of eight, up to its own second one; the first is what the others are merged with
    assert len(before) == 2 * 6
    before.clear()
    note("attend_backward", 1)
    gradient = OutputGradient(d_out, attended, sharded_reference.new_d_prior(routed))
    ring.attend_backward(gradient, queries, k, v)
    assert len(before) == 2 * 7


class _Names(TorchDispatchMode):
    """Keeps the names of all operators that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def test_gradients_of_pooled_queries_are_not_copied_between_zeros() -> None:
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    try:
        layout = shard_sequence(torch.tensor(DOCUMENTS["packed"], dtype=torch.int32), 0, 1, CHUNK, 16).chunks
        q = torch.randn(384, 2, 8, requires_grad=True)
        pooled = routing_queries(q, 16, layout.halo, ContextGroup(dist.group.WORLD), "reference")
        with _Names() as names:
            pooled.sum().backward()
    finally:
        destroy_process_groups()
    assert not {"slice_backward", "select_backward"} & names.found
    assert "index_add" in names.found


def test_every_token_is_in_one_piece_of_the_zigzag_split() -> None:
    ranks = torch.stack([zigzag_tokens(96, rank, 3) for rank in range(3)])
    assert ranks[1].tolist() == [*range(16, 32), *range(64, 80)]
    assert sorted(ranks.flatten().tolist()) == list(range(96))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("size", [2, 4])
def test_alignment_puts_whole_chunks_on_one_rank_and_moves_little(documents: str, size: int) -> None:
    cu_seqlens = torch.tensor(DOCUMENTS[documents], dtype=torch.int32)
    shards = [shard_sequence(cu_seqlens, rank, size, CHUNK) for rank in range(size)]
    sent = (
        [
            [
                shard.token[shard.chunks.alignment.to_chunks.send].split(
                    shard.chunks.alignment.to_chunks.send_counts
                )
                for shard in shards
            ]
        ]
        if (shards[0].chunks.alignment is not None)
        else []
    )
    numbers, moved = [], 0
    for shard in shards:
        received = [parts[shard.rank] for parts in sent[0]] if sent else []
        tokens = torch.cat([shard.token, *received])
        if shard.chunks.alignment is not None:
            tokens = tokens[shard.chunks.alignment.to_chunks.gather]
            moved += sum(shard.chunks.alignment.to_chunks.send_counts)
        for start, end, number, first in zip(*shard.chunks.queries[:4], strict=True):
            chunk = tokens[start:end]
            assert torch.equal(chunk, torch.arange(chunk[0], chunk[0] + len(chunk)))
            assert 0 < len(chunk) <= CHUNK
            document = int(torch.searchsorted(cu_seqlens, chunk[0], right=True)) - 1
            assert (chunk[0] - cu_seqlens[document]) == (number - first) * CHUNK
            assert chunk[-1] < cu_seqlens[document + 1]
        numbers += shard.chunks.queries.number.tolist()
    assert sorted(numbers) == list(range(shards[0].chunks.queries.num_chunks))
    assert moved <= (CHUNK - 1) * (2 * size - 1)


def test_a_sequence_that_cannot_be_split_names_the_rule() -> None:
    with pytest.raises(ValueError, match="multiple of 128 = 2 x context 4 x chunk 16"):
        shard_sequence(torch.tensor([0, 200], dtype=torch.int32), 0, 4, CHUNK)
