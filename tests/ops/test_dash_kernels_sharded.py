"""The kernels in stages, with queries and keys in different buffers, against the float64 reference on the whole sequence.

Two ranks of a packed sequence are played one after the other in one process.
"""

import pytest
import torch

from dash_megatron.ops import sharded_reference
from dash_megatron.ops.kernels import attend, backward_q, configs, geometry, pair_slabs, sharded
from dash_megatron.ops.pooling import pool_queries
from dash_megatron.ops.sequence_reference import dash_attention_reference
from dash_megatron.ops.shards import Attended, KeyBuffer, OutputGradient, QueryChunks, RoutedQueries
from dash_megatron.ops.types import Router
from tests.ops.kernels_under_test import CUDA, DEVICE, TOLERANCE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN = float("nan")
needs_hopper = pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU: Gluon is not interpreted",
)
# One shorter than a chunk of 16, a ragged one, a long one over both ranks, one that ends with its chunk.
LENGTHS = (9, 21, 100, 16)


def _int(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Sequence:
    """Random inputs of a packed sequence, its chunks, and which of them each of two ranks holds."""

    def __init__(
        self, G=4, Hkv=2, D=16, C=16, dtype=torch.float32, scaling_factor=2.0, lengths=LENGTHS,
        times=20 if CUDA else 1, head_scaling=None, **method
    ):  # fmt: skip
        lengths = [x * times for x in lengths]
        generator = torch.Generator().manual_seed(0)

        def noise(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        N, Hq = sum(lengths), G * Hkv
        self.C, self.dtype = C, dtype
        self.q, self.k, self.v, self.w = noise(N, Hq, D), noise(N, Hkv, D), noise(N, Hkv, D), noise(Hkv, D)
        self.d_out = noise(N, Hq, D)
        self.method = {"sigma": 2.0, "estimate_diagonal": True, "alpha": 1.5} | method
        self.method["scaling_factor"] = scaling_factor
        if head_scaling is not None:
            self.method["scaling_factor"] = scaling_factor * torch.tensor(head_scaling, device=DEVICE)
        self.router = Router(chunk_size=C, **self.method)
        self.bounds, self.chunks = [0], []
        for length in lengths:
            start, first = self.bounds[-1], len(self.chunks)
            self.bounds.append(start + length)
            self.chunks += [(x, min(x + C, start + length), first) for x in range(start, start + length, C)]
        self.num_chunks = len(self.chunks)
        quarter = [self.num_chunks * i // 4 for i in range(5)]
        pieces = [list(range(quarter[i], quarter[i + 1])) for i in range(4)]
        self.ranks = [pieces[0] + pieces[3], pieces[1] + pieces[2]]

    def rows(self, numbers):
        """Tokens of chunks, one after the other."""
        return torch.cat([torch.arange(*self.chunks[c][:2], device=DEVICE) for c in numbers])

    def queries(self, numbers):
        """With two empty entries, that could point anywhere."""
        starts = [0]
        for c in numbers:
            starts.append(starts[-1] + self.chunks[c][1] - self.chunks[c][0])
        n = starts[-1]
        start, end, first = [*starts[:-1], n, n], [*starts[1:], n, n], [self.chunks[c][2] for c in numbers]
        pairs = sum(c - self.chunks[c][2] for c in numbers)
        return QueryChunks(
            _int(start),
            _int(end),
            _int([*numbers, self.num_chunks, 0]),
            _int([*first, 0, 0]),
            self.num_chunks,
            pairs,
        )

    def routing_q(self):
        """The router's queries of the whole sequence, in the form that autograd can follow."""
        q = self.q.detach().requires_grad_()
        return q, pool_queries(q[None], self.router.query_pool, _int(self.bounds), backend="triton")[0]

    def expected(self):
        """Output, gradients and chunk counts of the reference in float64."""
        leaves = [x[None].double().requires_grad_() for x in (self.q, self.k, self.v)]
        leaves.append(self.w.double().requires_grad_())
        router, heads = self.router, []
        if isinstance(router.scaling_factor, torch.Tensor):
            heads = [router.scaling_factor.double().requires_grad_()]
            router = router._replace(scaling_factor=heads[0])
        out, selected = dash_attention_reference(*leaves, router, _int(self.bounds))
        grads = torch.autograd.grad(out, [*leaves, *heads], self.d_out[None].double())
        return out.detach()[0], [*(x[0] for x in grads[:3]), *grads[3:]], selected[0]


def _buffer(x, held, first, last, gap=3):
    """Keys and values of the chunks `held[h]` of every head, in that order, behind some rows of no chunk and each before one.

    Returns the buffer, k and v, and for every head the tokens in it and their rows.
    """
    row, length = torch.full((2, len(held), x.num_chunks), 0, dtype=torch.int32)
    places = []
    for h, numbers in enumerate(held):
        end = gap + h
        for c in numbers:
            row[h, c], length[h, c] = end, x.chunks[c][1] - x.chunks[c][0]
            end += int(length[h, c]) + 1
        none = [torch.zeros(0, dtype=torch.long, device=DEVICE)]
        rows = [torch.arange(row[h, c], row[h, c] + length[h, c], device=DEVICE) for c in numbers]
        places.append((x.rows(numbers) if numbers else none[0], torch.cat(rows or none)))
    m = max(int(rows[-1]) + 1 if len(rows) else 0 for _, rows in places) + gap
    # rows of no chunk must not be looked at
    k, v = (y.new_full((m, *y.shape[1:]), NAN) for y in (x.k, x.v))
    for h, (tokens, rows) in enumerate(places):
        k[rows, h], v[rows, h] = x.k[tokens, h], x.v[tokens, h]
    return KeyBuffer(row.to(DEVICE), length.to(DEVICE), first, last), k, v, places


def _one_buffer(x, numbers, listed):
    return [_buffer(x, [list(range(x.num_chunks))] * len(listed), 0, x.num_chunks)]


def _windows(x, numbers, listed):
    """Three windows; the buffer of the second also holds chunks outside, which must not be considered."""
    cuts = [0, x.num_chunks // 3, 2 * x.num_chunks // 3 + 1, x.num_chunks]
    held = [list(range(*cuts[:2])), list(range(x.num_chunks)), list(range(*cuts[2:]))]
    return [
        _buffer(x, [chunks] * len(listed), first, last)
        for chunks, first, last in zip(held, cuts[:-1], cuts[1:], strict=True)
    ]


def _compact(x, numbers, listed):
    """Only own and listed chunks, every head in an order of its own."""
    held = [
        sorted({*numbers, *marks.nonzero()[:, 0].tolist()}, reverse=h % 2 == 0)
        for h, marks in enumerate(listed)
    ]
    return [_buffer(x, held, 0, x.num_chunks)]


def _compact_windows(x, numbers, listed):
    """Own chunks of this rank first, the rest later: a buffer has a chunk for one head and not for another."""
    (full, *_) = _compact(x, numbers, listed)
    held = [full[0].length[h].nonzero()[:, 0].tolist() for h in range(len(listed))]
    half = x.num_chunks // 2
    return [
        _buffer(x, [[c for c in chunks if first <= c < last] for chunks in held], first, last)
        for first, last in ((0, half), (half, x.num_chunks))
    ]


LAYOUTS = {
    "one buffer": _one_buffer,
    "windows": _windows,
    "compact": _compact,
    "compact windows": _compact_windows,
}


def _merge(parts):
    """Output and log-sum-exp of all keys from those of several buffers."""
    lse = torch.stack([part_lse for _, part_lse in parts])
    total = torch.logsumexp(lse * 0.6931471805599453, 0) / 0.6931471805599453
    return sum(
        torch.exp2(x - total)[..., None] * part for x, (part, _) in zip(lse, parts, strict=True)
    ), total


def _run(x, layout):
    """Output, gradients of q, k, v, w and factors, and chunk counts of both ranks together; all float32."""
    C, Hkv, D = x.C, x.k.shape[1], x.q.shape[2]
    spans = [(x.rows(numbers), x.queries(numbers)) for numbers in x.ranks]
    summaries = [sharded.summarize(x.k[rows], x.w, qs, C) for rows, qs in spans]
    summary = summaries[0].new_full((Hkv, x.num_chunks, D), NAN)
    for numbers, part in zip(x.ranks, summaries, strict=True):
        summary[:, numbers] = part[:, : len(numbers)]
        assert torch.equal(part[:, len(numbers) :], torch.zeros_like(part[:, len(numbers) :]))

    out, dq, dk, dv, dw = (torch.zeros_like(y, dtype=torch.float32) for y in (x.q, x.q, x.k, x.v, x.w))
    selected = torch.zeros(*x.k.shape[:2], dtype=torch.int32, device=DEVICE)
    d_summary, d_heads = 0, []
    leaf, pooled = x.routing_q()
    d_pooled = torch.zeros_like(pooled, dtype=torch.float32)
    for numbers, (rows, qs) in zip(x.ranks, spans, strict=True):
        q = x.q[rows]
        routing_q = None if x.router.query_pool == 1 else pooled.detach()[rows]
        routed = sharded.route(q, summary, qs, x.router, routing_q)
        selected[rows] = routed.selected
        queries = RoutedQueries(q, qs, x.router, routed, routing_q)
        buffers = layout(x, numbers, sharded.listed(routed, x.num_chunks))
        parts = [sharded.attend(queries, k, v, keys) for keys, k, v, _ in buffers]
        rank_out, lse = _merge(parts)
        out[rows] = rank_out
        d_prior = sharded.new_d_prior(routed)
        gradient = OutputGradient(x.d_out[rows], Attended(rank_out, lse), d_prior)
        for keys, k, v, places in buffers:
            grads = sharded.attend_backward(gradient, queries, k, v, keys)
            assert all(y.dtype == torch.float32 for y in grads)
            dq[rows] += grads[0]
            for total, part in zip((dk, dv), grads[1:], strict=True):
                for h, (tokens, buffer_rows) in enumerate(places):
                    total[:, h].index_add_(0, tokens, part[buffer_rows, h])
                    part[buffer_rows, h] = 0
                assert torch.equal(part, torch.zeros_like(part)), "rows of no chunk have no gradient"
        router_dq, part, d_head = sharded.route_backward(d_prior, queries, summary)
        d_heads.append(d_head)
        d_pooled[rows] = router_dq
        d_summary = d_summary + part
    dq += torch.autograd.grad(pooled, leaf, d_pooled.to(x.dtype))[0]
    for numbers, (rows, qs) in zip(x.ranks, spans, strict=True):
        local = torch.zeros(Hkv, len(qs.start), D, device=DEVICE)
        local[:, : len(numbers)] = d_summary[:, numbers]
        part, part_dw = sharded.summarize_backward(local, x.k[rows], x.w, qs, C)
        dk[rows] += part
        dw += part_dw
    return out, [dq, dk, dv, dw, *([] if d_heads[0] is None else [sum(d_heads)])], selected


def _check(x, layout, same_selection=True):
    out, grads, selected = _run(x, LAYOUTS[layout])
    expected_out, expected_grads, expected_selected = x.expected()
    allowed_out, allowed_grad = TOLERANCE[x.dtype]
    assert relative_error(out, expected_out) <= allowed_out
    for name, grad, expected in zip("qkvws"[: len(grads)], grads, expected_grads, strict=True):
        assert relative_error(grad, expected) <= allowed_grad, name
    # at thousands of tokens some chunk lies within float32's rounding of the threshold
    if same_selection and not CUDA:
        assert torch.equal(selected, expected_selected)


CASES = {
    "one head a group": {"G": 1},
    "four heads a group": {"G": 4},
    "one head, alpha 1.3, prior not centred": {"G": 1, "alpha": 1.3, "estimate_diagonal": False},
    "four heads, alpha 1.3": {"G": 4, "alpha": 1.3},
    "four heads, prior not centred": {"G": 4, "estimate_diagonal": False},
    "a factor a head": {"G": 2, "head_scaling": [0.7, 2.0]},
    "local chunks": {"G": 1, "local_chunks": 1, "lengths": (9, 21, 150)},
    "local chunks, pooled queries": {
        "G": 4, "local_chunks": 2, "query_pool": 16, "head_scaling": [0.7, 2.0], "lengths": (9, 21, 150),
    },
    "one query a group": {"G": 4, "pool_heads": True},
    "one pooled query a group": {"G": 2, "local_chunks": 1, "query_pool": 3, "pool_heads": True},
    "local chunks, not centred": {"G": 2, "local_chunks": 1, "query_pool": 3, "estimate_diagonal": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("one head a group", "one buffer"),
        ("one head a group", "compact windows"),
        ("four heads a group", "windows"),
        ("one head, alpha 1.3, prior not centred", "windows"),
        ("four heads, alpha 1.3", "compact"),
        ("four heads, prior not centred", "compact windows"),
        ("a factor a head", "one buffer"),
        ("a factor a head", "windows"),
        ("local chunks", "windows"),
        ("local chunks, pooled queries", "compact windows"),
        ("one query a group", "windows"),
        ("one pooled query a group", "compact windows"),
        ("local chunks, not centred", "compact"),
    ],
)
def test_two_ranks_give_the_output_and_gradients_of_one(case, layout):
    _check(Sequence(**CASES[case]), layout)


@pytest.mark.parametrize(
    ("pairs_above", "by_pair_above"), [(float("inf"), float("inf")), (0, 0), (1.5, float("inf"))], ids=str
)
@pytest.mark.parametrize("query_pool", [1, 3])
def test_results_of_a_whole_buffer_are_those_of_any_other_rounded_once(
    query_pool, pairs_above, by_pair_above, monkeypatch
):
    """Keys and values over tiles, over pairs, or as the device decides; the last time all stages over pairs, which are added up."""
    find_launches = sharded.find_launches

    def launches(*args, **kwargs):
        usual = find_launches(*args, **kwargs)
        slabs = usual.backward_pairs._replace(block=16)
        return usual._replace(
            pairs_above=pairs_above, backward_pairs=slabs, backward_pairs_above=by_pair_above, parts=3
        )

    monkeypatch.setattr(sharded, "find_launches", launches)
    # the interpreter rounds to bfloat16 towards zero
    x = Sequence(G=2, dtype=torch.float16, query_pool=query_pool, pool_heads=True, lengths=(9, 21, 80))
    # the last chunks are of the other rank, and nothing here attends to them
    numbers = x.ranks[1]
    rows, qs = x.rows(numbers), x.queries(numbers)
    q, routing_q = x.q[rows], None if query_pool == 1 else x.routing_q()[1].detach()[rows]
    # as `sharded.summarize` gives them beside such keys
    summary = torch.randn(2, x.num_chunks, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE, x.dtype)
    queries = RoutedQueries(q, qs, x.router, sharded.route(q, summary, qs, x.router, routing_q), routing_q)
    ((keys, k, v, places),) = _one_buffer(x, numbers, [None] * 2)
    found = []
    for whole in (False, True):
        held = keys._replace(whole=whole)
        out, lse = sharded.attend(queries, k, v, held)
        d_prior = sharded.new_d_prior(queries.routed)
        gradient = OutputGradient(x.d_out[rows], Attended(out.to(x.dtype), lse), d_prior)
        dq, *d_keys = sharded.attend_backward(gradient, queries, k, v, held)
        d_keys = [part[place, h] for part in d_keys for h, (_, place) in enumerate(places)]
        found.append([out, dq, *d_keys, sharded.route_backward(d_prior, queries, summary).q])
        assert {y.dtype for y in found[-1][:2]} == {x.dtype if whole else torch.float32}
    (out, dq, *others), (whole_out, whole_dq, *whole_others) = found
    assert torch.equal(whole_out, out.to(x.dtype))
    if by_pair_above > 0:
        assert torch.equal(whole_dq, dq.to(x.dtype))
    else:
        # what pairs give is added to what is rounded, as where queries and keys lie together
        assert relative_error(whole_dq, dq.double()) < 2**-11
    assert all(torch.equal(a, b) for a, b in zip(whole_others, others, strict=True))
    assert others[-1].dtype == (torch.float32 if query_pool == 1 else x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gradients_of_summaries_are_added_to_others_and_rounded_once(parts, dtype):
    x, generator = Sequence(dtype=dtype), torch.Generator().manual_seed(1)
    numbers = x.ranks[0]
    k, qs = x.k[x.rows(numbers)], x.queries(numbers)
    d_summary = torch.randn(2, len(qs.start), 16, generator=generator).to(DEVICE)
    # rows that only the largest rank has lie between the parts
    more = torch.randn(parts, len(k) + 5, 2, 16, generator=generator).to(DEVICE, dtype)[:, :-5]
    wide = sharded.summarize_backward(d_summary, k.float(), x.w.float(), qs, x.C)
    dk, dw = sharded.summarize_backward(d_summary, k, x.w, qs, x.C, more)
    assert torch.equal(dk, (sum(more.float()) + wide[0]).to(dtype))
    assert torch.equal(dw, wide[1])
    given = d_summary.double(), k.double(), x.w.double(), qs, x.C, more.double()
    assert relative_error(dk, sharded_reference.summarize_backward(*given)[0]) < TOLERANCE[dtype][0]


def test_bfloat16_is_near_the_reference():
    x = Sequence(G=4, Hkv=1, dtype=torch.bfloat16, scaling_factor=1.0)
    _check(x, "windows", same_selection=False)


@pytest.mark.parametrize("keys", [16, 64], ids=["half a chunk", "two chunks"])
def test_other_sizes_in_steps_of_few_or_many_keys_equal_the_reference(keys, monkeypatch):
    find_launches = sharded.find_launches

    def few_or_many_keys(*args, **kwargs):
        usual = find_launches(*args, **kwargs)
        stages = {x: getattr(usual, x)._replace(keys=keys) for x in ("attend", "queries")}
        return usual._replace(tile_rows=32, keys=usual.keys._replace(keys=16), **stages)

    monkeypatch.setattr(sharded, "find_launches", few_or_many_keys)
    _check(Sequence(G=3, Hkv=1, D=24, C=32, lengths=(20, 100)), "compact windows")


@pytest.mark.parametrize("parts", [1, 40])
def test_transposed_lists_in_any_parts_equal_the_reference(parts, monkeypatch):
    find_launches = sharded.find_launches
    if CUDA:
        parts *= 1000
    monkeypatch.setattr(
        sharded, "find_launches", lambda *args, **kwargs: find_launches(*args, **kwargs)._replace(parts=parts)
    )
    _check(Sequence(G=1, Hkv=1), "windows")


@pytest.mark.parametrize(
    ("case", "layout", "above"),
    [
        ("four heads a group", "compact windows", 0),
        ("one head a group", "one buffer", 0),
        ("four heads a group", "windows", 1.5),
    ],
)
def test_keys_and_values_by_pair_equal_the_reference(case, layout, above, monkeypatch):
    """Above 1.5 some windows go over pairs and some over tiles."""

    find_launches = sharded.find_launches

    def by_pair(*args, **kwargs):
        return find_launches(*args, **kwargs)._replace(pairs_above=above)

    monkeypatch.setattr(sharded, "find_launches", by_pair)
    _check(Sequence(**CASES[case]), layout)


@pytest.mark.parametrize(
    ("case", "layout", "above", "counts"),
    [
        ("one head a group", "one buffer", 0, 2**26),
        ("four heads, prior not centred", "compact windows", 0, 40),
        ("local chunks, pooled queries", "windows", 0.9, 2**26),
        ("four heads a group", "windows", 16.0, 2**26),
    ],
)
def test_every_stage_by_pair_equals_the_reference(case, layout, above, counts, monkeypatch):
    """All windows of the same lists decide alike, forward and backward: above 16 for tiles, else for pairs.

    In the second case the table of counts is made again for few tiles at a time.
    """
    plans, find_launches = [], sharded.find_launches

    def by_pair(*args, **kwargs):
        usual = find_launches(*args, **kwargs)
        slabs = usual.attend_pairs._replace(block=16)
        return usual._replace(
            attend_pairs=slabs,
            backward_pairs=slabs,
            attend_pairs_above=above,
            backward_pairs_above=above,
            parts=3,
        )

    def plan_and_keep(*args):
        plans.append(pair_slabs.plan_slabs(*args))
        return plans[-1]

    monkeypatch.setattr(sharded, "find_launches", by_pair)
    monkeypatch.setattr(pair_slabs, "MAX_COUNTS", counts)
    for module in (attend, backward_q):
        monkeypatch.setattr(module, "plan_slabs", plan_and_keep)
    # an interpreter takes each head of each token for itself
    few = {} if CUDA or CASES[case]["G"] == 1 else {"G": 2, "lengths": (9, 21, 80)}
    _check(Sequence(**CASES[case] | few), layout)
    assert len(plans) == 2 * 2 * {"one buffer": 1, "windows": 3, "compact windows": 2}[layout]
    assert {plan.taken.item() for plan in plans} == {above < 16}
    assert (sum(plan.slot[-1].item() for plan in plans if plan.taken) > 0) == (above < 16)
    assert all((plan.placed is None) == (counts == 40) for plan in plans)


def test_lists_that_are_counted_first_give_the_same_bits(monkeypatch):
    x = Sequence(G=2, scaling_factor=6.0, local_chunks=1)
    numbers = x.ranks[0]
    rows, qs = x.rows(numbers), x.queries(numbers)
    summary = torch.randn(2, x.num_chunks, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ((keys, k, v, _),) = _one_buffer(x, numbers, [None] * 2)
    results = []
    for bound in (geometry.MAX_BOUNDED_BYTES, 0):
        monkeypatch.setattr(geometry, "MAX_BOUNDED_BYTES", bound)
        routed = sharded.route(x.q[rows], summary, qs, x.router)
        queries = RoutedQueries(x.q[rows], qs, x.router, routed)
        results.append((len(sharded.State(*routed.state).list_chunk), *sharded.attend(queries, k, v, keys)))
    (bounded_room, *bounded), (counted_room, *counted) = results
    assert counted_room < bounded_room
    assert all(torch.equal(a, b) for a, b in zip(bounded, counted, strict=True))


@pytest.mark.parametrize("method", [{"alpha": 1.5}, {"alpha": 1.3}, {"local_chunks": 2}], ids=str)
def test_summary_gradients_are_the_same_bits_in_every_run_if_asked(method):
    x, generator = Sequence(G=3, **method), torch.Generator().manual_seed(1)
    numbers = x.ranks[0]
    q, qs = x.q[x.rows(numbers)], x.queries(numbers)
    summary = torch.randn(2, x.num_chunks, 16, generator=generator).to(DEVICE)
    routed = sharded.route(q, summary, qs, x.router)
    list_log_prior = sharded.State(*routed.state).list_log_prior
    # per probability: the logarithm's own slope is unbounded near the threshold, where rounding decides
    d_prior = torch.randn(list_log_prior.shape, generator=generator).to(DEVICE)
    d_prior = d_prior * list_log_prior.exp()
    arguments = (d_prior, RoutedQueries(q, qs, x.router, routed), summary)
    dq, d_summary, _ = sharded.route_backward(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [sharded.route_backward(*arguments) for _ in range(5 if CUDA else 2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(run[1], runs[0][1]) and torch.equal(run[0], dq) for run in runs)
    assert relative_error(runs[0][1], d_summary.double()) < 1e-3


def test_a_window_without_keys_gives_nothing():
    x = Sequence(G=2, times=1)
    numbers = x.ranks[0]
    rows, qs = x.rows(numbers), x.queries(numbers)
    summary = torch.randn(2, x.num_chunks, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    queries = RoutedQueries(x.q[rows], qs, x.router, sharded.route(x.q[rows], summary, qs, x.router))
    # the first chunk is a document of its own
    keys, k, v, _ = _buffer(x, [[0]] * 2, 0, 1)
    others = torch.arange(len(rows), device=DEVICE) >= x.chunks[0][1]
    out, lse = sharded.attend(queries, k, v, keys)
    assert torch.equal(out[others], torch.zeros_like(out[others]))
    assert torch.equal(lse[others], torch.full_like(lse[others], float("-inf")))
    assert lse[~others].isfinite().all()
    # a chunk of the other rank, in a document of which this rank has no later chunk
    other = next(
        c for c in x.ranks[1] if not any(x.chunks[d][2] == x.chunks[c][2] and d > c for d in numbers)
    )
    keys, k, v, _ = _buffer(x, [[other]] * 2, other, other + 1)
    out, lse = sharded.attend(queries, k, v, keys)
    assert torch.equal(out, torch.zeros_like(out))
    d_prior = sharded.new_d_prior(queries.routed).fill_(7)
    gradient = OutputGradient(x.d_out[rows], Attended(out, lse.zero_()), d_prior)
    grads = sharded.attend_backward(gradient, queries, k, v, keys)
    assert all(torch.equal(y, torch.zeros_like(y)) for y in grads)
    assert torch.equal(d_prior, torch.full_like(d_prior, 7))


def _attended(x, layout, config, monkeypatch):
    """Attention to all buffers of both ranks, over tiles of 128 rows as `config` says."""
    find_launches = configs.find_launches

    def launches(*args):
        return find_launches(*args)._replace(tile_rows=128, attend=config, attend_pairs_above=float("inf"))

    monkeypatch.setattr(sharded, "find_launches", launches)
    generator, parts = torch.Generator().manual_seed(1), []
    summary = torch.randn(2, x.num_chunks, x.q.shape[2], generator=generator).to(DEVICE, torch.float16)
    for numbers in x.ranks:
        q, qs = x.q[x.rows(numbers)], x.queries(numbers)
        queries = RoutedQueries(q, qs, x.router, sharded.route(q, summary, qs, x.router))
        for keys, k, v, _ in layout(x, numbers, sharded.listed(queries.routed, x.num_chunks)):
            parts.append(sharded.attend(queries, k, v, keys))
    return parts


def _count_hopper(monkeypatch):
    """A list that grows with every launch of the Hopper kernel."""
    from dash_megatron.ops.kernels import attend_hopper

    launched, forward = [], attend_hopper.attend_forward_hopper

    def forward_and_count(*args):
        launched.append(args)
        return forward(*args)

    monkeypatch.setattr(attend_hopper, "attend_forward_hopper", forward_and_count)
    return launched


@needs_hopper
@pytest.mark.parametrize("kernel", [configs.HOPPER, configs.HOPPER_OVERLAP])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("D", "C", "G"),
    [(128, 64, 4), (128, 64, 16), (64, 64, 3), (128, 32, 4), (64, 32, 16), (128, 128, 1), (64, 128, 4)],
)
def test_attention_of_the_hopper_kernel_equals_that_of_the_plain_one(D, C, G, layout, kernel, monkeypatch):
    x, launched = Sequence(G=G, D=D, C=C, dtype=torch.bfloat16), _count_hopper(monkeypatch)
    plain = _attended(x, LAYOUTS[layout], configs.Config(8, 2, keys=min(C, 64)), monkeypatch)
    assert not launched
    config = configs.Config(4, 2 if C == 128 else 5, keys=64, kernel=kernel)
    first, again = (_attended(x, LAYOUTS[layout], config, monkeypatch) for _ in range(2))
    assert len(launched) == 2 * len(plain)
    for part, repeated, expected in zip(first, again, plain, strict=True):
        assert torch.equal(part.out, repeated.out)
        assert torch.equal(part.lse, repeated.lse)
        assert part.out.dtype == torch.float32
        nothing = expected.lse == float("-inf")
        assert torch.equal(part.lse == float("-inf"), nothing)
        assert not part.out[nothing].any()
        assert torch.where(nothing, 0.0, part.lse - expected.lse).abs().max() < 1e-3
        assert (part.out - expected.out).norm() <= TOLERANCE[x.dtype][0] * expected.out.norm()
    assert any((part.lse == float("-inf")).any() for part in plain) == ("windows" in layout)


@needs_hopper
def test_a_buffer_of_no_rows_is_left_to_the_plain_kernel(monkeypatch):
    x, launched = Sequence(D=64, C=32, dtype=torch.bfloat16), _count_hopper(monkeypatch)
    none = torch.zeros(2, x.num_chunks, dtype=torch.int32, device=DEVICE)

    def nothing(x, numbers, listed):
        return [(KeyBuffer(none, none, 0, 0), x.k[:0], x.v[:0], [])]

    parts = _attended(x, nothing, configs.Config(4, 3, keys=64, kernel=configs.HOPPER_OVERLAP), monkeypatch)
    assert not launched
    assert not any(part.out.any() or part.lse.isfinite().any() for part in parts)


def test_listed_chunks_are_those_that_some_row_selected():
    x = Sequence(G=2, scaling_factor=6.0, local_chunks=1)
    numbers = x.ranks[0]
    summary = torch.randn(2, x.num_chunks, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    routed = sharded.route(x.q[x.rows(numbers)], summary, x.queries(numbers), x.router)
    state = sharded.State(*routed.state)
    expected = torch.zeros(2, x.num_chunks, dtype=torch.bool, device=DEVICE)
    for tile, (offset, count) in enumerate(zip(state.list_offset, state.list_count, strict=True)):
        head = tile // (len(state.list_count) // 2)
        expected[head, state.list_chunk[offset : offset + count].long()] = True
    listed = sharded.listed(routed, x.num_chunks)
    assert torch.equal(listed, expected)
    assert 0 < listed.sum() < listed.numel()
    assert all(listed[:, c - 1].all() for c in numbers if c > x.chunks[c][2]), "local chunks are listed"


def test_queries_the_kernels_cannot_take_are_refused():
    x = Sequence(G=2)
    numbers = x.ranks[0]
    summary = torch.zeros(2, x.num_chunks, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"q\.dtype=torch\.float64"):
        sharded.route(x.q[x.rows(numbers)].double(), summary, x.queries(numbers), x.router)
