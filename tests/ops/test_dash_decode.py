"""Decoding against the training forward: on CPU tensors under Triton's interpreter, on a GPU at real sizes."""

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from benchmarks import decode as benchmark
from dash_megatron.ops import DashCache, dash_attention, dash_decode
from dash_megatron.ops.decode import decode_and_count
from dash_megatron.ops.decode_reference import decode_reference
from dash_megatron.ops.kernels import decode, decode_attend, decode_cache, decode_pool, decode_route
from dash_megatron.ops.types import Router
from tests.ops.decode_sequences import BORDERS, ROUTER, C, Sequences
from tests.ops.kernels_under_test import CUDA, DEVICE, TOLERANCE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = (*BORDERS, 300 * C + 5, 513 * C) if CUDA else BORDERS


def _decode(sequences, cache, **router):
    q, routing_q = sequences.fill(cache)
    return decode_and_count(q, cache, Router(cache.chunk_size, **{**ROUTER, **router}), "triton", routing_q)


@pytest.fixture
def launch(monkeypatch):
    """`launch(name=value)` changes how kernels are launched."""
    find_launch = decode.find_launch

    def change(**changes):
        monkeypatch.setattr(decode, "find_launch", lambda *args: find_launch(*args)._replace(**changes))

    return change


FORMS = {
    "short, whole": {"short": True, "splits": 1},
    "short": {"short": True, "splits": 3},
    "long": {"short": False, "splits": 3},
    "long, one split": {"short": False, "splits": 1},
    "long, a split a chunk": {"short": False, "splits": 9},
}


@pytest.mark.parametrize(
    ("form", "page_size"), [(form, None) for form in FORMS] + [("short", 2 * C), ("long", 2 * C)]
)
def test_sequences_of_different_lengths_equal_the_reference(form, page_size, launch):
    short = FORMS[form]["short"]
    sequences = Sequences(BORDERS if short else LENGTHS)
    expected, expected_selected = sequences.expected()
    launch(**FORMS[form])
    out, selected = _decode(sequences, sequences.cache(page_size))
    for x, y in zip(out, expected, strict=True):
        assert relative_error(x, y) < TOLERANCE[torch.float32][0]
    # among hundreds of chunks one may lie within float32's rounding of the threshold
    assert torch.equal(selected[: len(BORDERS)], expected_selected[: len(BORDERS)])


# as trained models have it; more local chunks than some sequence has
LOCAL = {"local_chunks": 2, "query_pool": 16}
SCALED = {"scaling_factor": torch.tensor([1.0, 4.0], device=DEVICE)}


@pytest.mark.parametrize("router", [{}, {"estimate_diagonal": False}, {"alpha": 1.7}, SCALED, LOCAL], ids=str)
def test_the_reference_of_decoding_is_the_last_row_of_the_training_forward(router):
    sequences = Sequences(BORDERS)
    out, selected = sequences.expected(**router)
    for b, (q, k, v) in enumerate(zip(sequences.q, sequences.k, sequences.v, strict=True)):
        row, routing = dash_attention(
            *(x[None].double() for x in (q, k, v)), sequences.w.double(), C, **{**ROUTER, **router},
            backend="reference", return_routing=True,
        )  # fmt: skip
        assert relative_error(out[b], row[0, -1]) < 1e-12
        assert torch.equal(selected[b], routing.chunks_selected[0, -1])


# chunk size, length, length on a GPU, shape
SHAPES = {
    "one head a group": (16, 50, 3000, {"Hq": 2}),
    "three heads a group": (16, 50, 3000, {"Hq": 6}),
    "sixteen heads a group": (16, 70, 30000, {"Hq": 16, "Hkv": 1}),
    "thirty-two heads a group": (16, 50, 3000, {"Hq": 32, "Hkv": 1}),
    "head dim 64": (16, 50, 20000, {"D": 64}),
    "head dim 80": (16, 50, 20000, {"D": 80}),
    "head dim 96": (16, 50, 20000, {"D": 96}),
    "head dim 256": (32, 70, 20000, {"D": 256}),
    "chunks of 64": (64, 200, 20000, {}),
    "chunks of 128": (128, 400, 20000, {}),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_every_shape_and_dtype_is_near_the_reference(name, dtype, short, launch):
    chunk_size, length, real_length, shape = SHAPES[name]
    if (
        dtype != torch.float32
        and not CUDA
        and name not in ("three heads a group", "head dim 80", "chunks of 64")
    ):
        pytest.skip("needs a CUDA GPU: too slow for the interpreter")
    longest = min(real_length, 60 * chunk_size) if short else real_length
    sequences = Sequences((longest if CUDA else length, chunk_size + 1), dtype=dtype, **shape)
    launch(short=short)
    cache = sequences.cache(chunk_size=chunk_size)
    out, _ = _decode(sequences, cache, scaling_factor=1.0)
    # of the same summaries: their rounding may put a chunk on the other side of the threshold
    tensors = (
        x.double()
        for x in (sequences.at([n - 1 for n in sequences.lengths])[0], cache.k, cache.v, cache.summary)
    )
    expected, _ = decode_reference(
        *tensors, cache.lengths, None, Router(chunk_size, **{**ROUTER, "scaling_factor": 1.0})
    )
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype][0]


METHODS = {
    "sigma 1": {"sigma": 1.0},
    "flat prior": {"sigma": 1e6},
    "prior not centred": {"estimate_diagonal": False},
    "alpha 1.2": {"alpha": 1.2},
    "alpha 1.7, prior not centred": {"alpha": 1.7, "estimate_diagonal": False},
    "alpha 2": {"alpha": 2.0},
    "everything selected": {"scaling_factor": 0.01},
    "nearly nothing selected": {"scaling_factor": 50.0},
    "a factor a head": SCALED,
    "local chunks": {"local_chunks": 1},
    "pooled queries": {"query_pool": 3},
    "one query a group": {"pool_heads": True},
    "one pooled query a group": {**LOCAL, "pool_heads": True},
    "local chunks and pooled queries": LOCAL,
    "local, a factor a head, not centred": {**LOCAL, **SCALED, "estimate_diagonal": False},
    "nothing but local chunks": {"local_chunks": 100},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("form", ["short, whole", "short", "long"])
def test_every_form_of_the_method_equals_the_reference(name, form, launch):
    sequences = Sequences((60 * C + 1 if CUDA else 100, C + 1))
    expected, expected_selected = sequences.expected(**METHODS[name])
    launch(**FORMS[form])
    cache = sequences.cache(query_pool=METHODS[name].get("query_pool", 1))
    out, selected = _decode(sequences, cache, **METHODS[name])
    assert relative_error(out, expected) < TOLERANCE[torch.float32][0]
    if not CUDA:
        assert torch.equal(selected, expected_selected)


@pytest.mark.parametrize("form", ["short", "long"])
def test_pages_give_the_bits_of_the_contiguous_layout(form, launch):
    launch(**FORMS[form])
    sequences = Sequences((100 if not CUDA else 100 * C, C, 3 * C + 1), dtype=torch.bfloat16)
    # each form with each router and with pages of each size
    for router, page_size in zip(({}, LOCAL), (C, 4 * C) if form == "short" else (4 * C, C), strict=True):
        pool = router.get("query_pool", 1)
        expected = _decode(sequences, sequences.cache(query_pool=pool), **router)
        paged = _decode(sequences, sequences.cache(page_size, query_pool=pool), **router)
        assert all(torch.equal(*pair) for pair in zip(paged, expected, strict=True))


@pytest.mark.parametrize("scaling_factor", [1.0, 30.0], ids=["many selected", "few selected"])
@pytest.mark.parametrize("most_scores", [64, 8192], ids=["read again", "read once"])
def test_many_blocks_of_scores_and_words_of_bits_equal_the_reference(
    most_scores, scaling_factor, launch, monkeypatch
):
    # with blocks of 64 scores: two and a bit, one, one and a score of the next
    chunks = (2100, 64, 65) if CUDA else (150, 64, 65)
    sequences = Sequences([n * C + 7 for n in chunks], Hq=3, Hkv=1)
    expected, expected_selected = sequences.expected(scaling_factor=scaling_factor)
    monkeypatch.setattr(decode, "MOST_SCORES", most_scores)
    launch(short=False, splits=4, block_chunks=32)
    out, selected = _decode(sequences, sequences.cache(), scaling_factor=scaling_factor)
    assert relative_error(out, expected) < TOLERANCE[torch.float32][0]
    if not CUDA:
        assert torch.equal(selected, expected_selected)


@pytest.mark.skipif(CUDA, reason="needs a CPU: compiled kernels do not call what stands in place of `enter`")
@pytest.mark.parametrize("form", ["short, whole", "short", "long"])
def test_all_kernels_start_early_and_what_runs_ahead_may_write_until_the_first_waits(
    form, launch, monkeypatch
):
    sequences = Sequences((7 * C + 3, C + 1))
    cache = sequences.cache()
    q, _ = sequences.fill(cache)
    launch(**FORMS[form])
    arguments = q, cache, Router(C, **ROUTER), "triton"
    expected = decode_and_count(*arguments)
    inputs = q, cache.k, cache.v, cache.summary, cache.lengths
    written = [x.clone() for x in inputs]
    started_early = []

    def wait(dependent):
        if dependent:
            for x, y in zip(inputs, written, strict=True):
                x.copy_(y)

    run = GridExecutor.__call__

    def start(self, *args, **options):
        started_early.append(options["launch_pdl"])
        run(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", start)
    for module in (decode_route, decode_attend):
        monkeypatch.setattr(module, "enter", wait)
    launch(**FORMS[form], dependent=True)
    for x in inputs:
        x.fill_(float("nan") if x.is_floating_point() else 0)
    for x, y in zip(decode_and_count(*arguments), expected, strict=True):
        assert torch.equal(x, y)
    assert started_early == [True] * {"short, whole": 1, "short": 2, "long": 4}[form]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("router", [SCALED, {**SCALED, **LOCAL}], ids=["routed", "local and pooled"])
@pytest.mark.parametrize("page_size", [None, C], ids=["contiguous", "paged"])
def test_prefill_then_decode_equals_the_whole_forward(page_size, router, backend):
    N, prompt = (20 * C + 9, 18 * C - 5) if CUDA else (4 * C + 2, 3 * C - 2)
    sequences = Sequences((N,))
    cache = sequences.cache(page_size, query_pool=router.get("query_pool", 1))
    settings = {**ROUTER, **router, "backend": backend}
    q, k, v = (x[0][None] for x in (sequences.q, sequences.k, sequences.v))
    expected = dash_attention(q, k, v, sequences.w, C, **settings)
    sequences.prefill(cache, [0], [prompt], backend)
    out = [dash_attention(*(x[:, :prompt] for x in (q, k, v)), sequences.w, C, **settings)]
    for t in range(prompt, N):
        q_t, k_t, v_t = sequences.at([t])
        routing_q = cache.append(k_t, v_t, sequences.w, backend=backend, q=q_t)
        out.append(dash_decode(q_t, cache, **settings, routing_q=routing_q)[:, None])
    torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_several_tokens_at_once_decode_as_one_by_one(backend):
    lengths, new = (3 * C + 1, C - 2, 0), (5, 3, 4)
    ends = [length + n for length, n in zip(lengths, new, strict=True)]
    sequences, router = Sequences(ends), Router(C, **{**ROUTER, "local_chunks": 1, "query_pool": 4})
    at_once, single = (sequences.cache(query_pool=4, spare_queries=2) for _ in range(2))
    for cache in (at_once, single):
        sequences.prefill(cache, [0] * 3, lengths, backend)
    pooled = sequences.prefill(at_once, lengths, ends, backend)
    row = 0
    for b, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        active = torch.arange(3, device=DEVICE) == b
        for t in range(length, end):
            q, k, v = sequences.at([t if i == b else 0 for i in range(3)])
            routing_q = single.append(k, v, sequences.w, active, backend, q=q)
            torch.testing.assert_close(routing_q[b], pooled[row])
            expected, _ = decode_and_count(q, single, router, backend, routing_q)
            # a sequence that ends with the token, and shares pages
            page, length_1 = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([[b]], [t + 1]))
            shared = DashCache(at_once.k, at_once.v, at_once.summary, length_1, C, page)
            out, _ = decode_and_count(q[b : b + 1], shared, router, backend, pooled[row : row + 1])
            torch.testing.assert_close(out[0], expected[b])
            row += 1
    # other sequences' queries were not written over: it is three tokens back, and on again
    assert torch.equal(at_once.queries[:2], single.queries[:2])


def test_tokens_that_are_dropped_leave_the_queries_before_them():
    sequences = Sequences((3 * C,))
    cache = sequences.cache(query_pool=4, spare_queries=6)
    sequences.prefill(cache, [0], [3 * C - 6])
    expected = sequences.prefill(cache, [3 * C - 6], [3 * C])
    cache.lengths.sub_(6)
    assert torch.equal(sequences.prefill(cache, [3 * C - 6], [3 * C]), expected)


def test_what_a_shorter_sequence_left_behind_does_not_leak():
    long, short = Sequences((5 * C + 3, 4 * C)), Sequences((2 * C + 2, C), seed=1)
    cache, fresh = long.cache(query_pool=16), short.cache(room=4 * C, query_pool=16)
    long.fill(cache)
    for x in (cache.k, cache.v, cache.summary, cache.queries):
        x.fill_(float("nan"))
    cache.lengths.zero_()
    assert torch.equal(_decode(short, cache, **LOCAL)[0], _decode(short, fresh, **LOCAL)[0])


@pytest.mark.parametrize(
    ("backend", "form"),
    [("reference", "short"), *(("triton", form) for form in ("short, whole", "short", "long"))],
)
def test_an_empty_sequence_has_zero_output_and_no_chunks(backend, form, launch):
    launch(**FORMS[form])
    sequences = Sequences((C + 1, 1))
    cache = sequences.cache()
    sequences.prefill(cache, [0, 0], [C + 1, 0], backend)
    q, _, _ = sequences.at([C, 0])
    out, selected = decode_and_count(q, cache, Router(cache.chunk_size), backend)
    assert out[0].isfinite().all()
    assert out[0].any()
    assert not out[1].any()
    assert selected.tolist() == [[2, 2], [0, 0]]


@pytest.mark.parametrize("form", ["short, whole", "short", "long"])
def test_a_sequence_longer_than_its_cache_has_nan_output_on_a_gpu_and_leaves_others_alone(form, launch):
    launch(**FORMS[form])
    sequences = Sequences((C, 5))
    cache = sequences.cache()
    q, _ = sequences.fill(cache)
    expected = dash_decode(q, cache, backend="triton")
    # on CPU, append refuses; the kernel itself does not know
    arguments = (cache.k, cache.v, cache.summary, None, cache.lengths, cache._arrived, None, None, None, C)
    before = cache.k.clone()
    decode_cache.cache_write(cache.k[:, 0] + 1, cache.v[:, 0], sequences.w, None, *arguments)
    cache.lengths[1] = 5
    assert cache.lengths.tolist() == [C + 1, 5]
    assert torch.equal(cache.k[0], before[0])
    out = dash_decode(q, cache, backend="triton")
    assert out[0].isnan().all()
    assert torch.equal(out[1], expected[1])
    with pytest.raises(ValueError, match=rf"lengths\[0\]={C + 1} must be at most the cache's capacity {C}"):
        cache.check()


def test_keys_and_values_may_be_views_of_one_allocation():
    sequences = Sequences((5 * C + 3, 2 * C))
    expected, _ = _decode(sequences, sequences.cache(2 * C))
    like = sequences.cache(2 * C)
    both = torch.stack([like.k, like.v], dim=1)
    cache = DashCache(both[:, 0], both[:, 1], like.summary, like.lengths, C, like.page_table)
    out, _ = _decode(sequences, cache)
    assert torch.equal(out, expected)


def test_the_ops_pass_torchs_own_checks():
    sequences = Sequences((C + 1, C), dtype=torch.bfloat16)
    cache = sequences.cache(C)
    q, _ = sequences.fill(cache)
    tensors = (cache.k, cache.v, cache.summary, cache.lengths)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        decode.decode,
        (q, *tensors, cache.page_table, q + 1, None, C, 1.0, 2.0, True, 1.5, 1, 16, True),
        test_utils=utils,
    )
    cache.lengths.zero_()
    for x in tensors[:3]:
        x.zero_()  # the check compares what was mutated, and NaN is not equal to itself
    _, k, v = sequences.at([0, 0])
    for own in (None, k + 1):
        kept = None if own is None else torch.zeros(2, C, *k.shape[1:], dtype=k.dtype, device=DEVICE)
        arguments = (
            k,
            v,
            sequences.w,
            own,
            *tensors[:3],
            kept,
            *tensors[3:],
            cache._arrived,
            cache.page_table,
            None,
            None,
            C,
        )
        torch.library.opcheck(decode_cache.cache_write, arguments, test_utils=utils)
    queries = torch.zeros(2, 5, *q.shape[1:], dtype=q.dtype, device=DEVICE)
    cu_seqlens = torch.tensor([0, 2, 2], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        decode_pool.pool_and_keep, (q, queries, cache.lengths, cu_seqlens, None, 4), test_utils=utils
    )


def test_torch_compile_gives_the_eager_bits():
    sequences = Sequences((C + 5,))
    eager, compiled = sequences.cache(query_pool=16), sequences.cache(query_pool=16)
    steps = []
    for cache, wrap in ((eager, lambda f: f), (compiled, torch.compile(backend="aot_eager", fullgraph=True))):
        sequences.prefill(cache, [0], [C - 1])

        def step(q, k, v, cache=cache):
            routing_q = cache.append(k, v, sequences.w, backend="triton", q=q)
            return dash_decode(q, cache, **ROUTER, **LOCAL, backend="triton", routing_q=routing_q)

        step = wrap(step)
        steps.append([step(*sequences.at([t])) for t in range(C - 1, C + 2)])
    assert all(torch.equal(x, y) for x, y in zip(*steps, strict=True))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU: captures a CUDA graph")
@pytest.mark.parametrize("constants", [{}, LOCAL], ids=["routed", "local and pooled"])
@pytest.mark.parametrize("capacity", [4096, 65536], ids=["short", "long"])
def test_a_cuda_graph_follows_sequences_as_they_grow_and_change(capacity, constants):
    sequences = Sequences((capacity - 3 * C, 5 * C - 2, 1), Hq=32, dtype=torch.bfloat16)
    router = Router(C, **constants)
    cache = sequences.cache(2 * C, room=3 * C, query_pool=router.query_pool)
    q, k, v = (x.clone() for x in sequences.at([0, 0, 0]))

    def step():
        routing_q = cache.append(k, v, sequences.w, backend="triton", q=q)
        return *decode_and_count(q, cache, router, "triton", routing_q), routing_q

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, selected, routing_q = step()
    for lengths in ([n - 1 for n in sequences.lengths], [C - 2, 4 * C, 0], [2 * C, 0, 0]):
        cache.lengths.zero_()
        sequences.prefill(cache, [0] * 3, lengths)
        for x in (q, k, v):
            x.normal_()
        for _ in range(4):
            cache_lengths = cache.lengths.clone()
            graph.replay()
            assert torch.equal(cache.lengths, cache_lengths + 1)
            expected, expected_selected = decode_and_count(q, cache, router, "triton", routing_q)
            assert torch.equal(out, expected)
            assert torch.equal(selected, expected_selected)
        reference, _ = decode_and_count(q, cache, router, "reference", routing_q)
        assert relative_error(out, reference) < TOLERANCE[torch.bfloat16][0]


# sequences, key/value heads, chunks; routes for itself, splits
LAUNCHES = {
    "8K": (1, 2, 128, True, 31),
    "16K": (1, 2, 256, False, 31),
    "64K": (1, 2, 1024, False, 31),
    "96K": (1, 2, 1536, False, 47),
    "128K": (1, 2, 2048, False, 47),
    "2 sequences of 128K": (2, 2, 2048, False, 31),
    "16 sequences of 64K": (16, 2, 1024, False, 7),
    "128 sequences of 8K": (128, 2, 128, True, 1),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launch_on_an_h200_follows_from_batch_and_length(name, monkeypatch):
    B, Hkv, chunks, *expected = LAUNCHES[name]
    monkeypatch.setattr(decode, "device_limits", lambda device: ("H200", 232448, 132))
    launch = decode.find_launch(torch.empty(B, 32, 128, dtype=torch.bfloat16), Hkv, chunks, 64)
    assert [launch.short, launch.splits] == expected


def test_benchmark_inputs_are_full_caches_whose_density_topics_dial(monkeypatch):
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(benchmark, "BACKEND", "reference")
    densities = []
    for topics in (2, 8):
        case = benchmark.Case("", batch=2, tokens=64 * 16, topics=topics, heads=4, head_dim=32, chunk_size=16)
        layers = [benchmark.make_layer(case, seed) for seed in range(2)]
        for cache, q in layers:
            assert cache.capacity == case.tokens
            assert cache.lengths.tolist() == [case.tokens] * 2
            out, selected = decode_and_count(q, cache, Router(cache.chunk_size, sigma=1.0))
            assert out.isfinite().all()
            densities.append(benchmark.density(case, selected))
        assert not torch.equal(layers[0][0].k, layers[1][0].k)
    assert min(densities[:2]) > max(densities[2:])
