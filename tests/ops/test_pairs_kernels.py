"""Gradients of keys and values by gathered pairs equal those over tiles, which other tests hold to the reference."""

import math

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops.kernels import backward_kv, backward_q, configs, dash, geometry, pair_slabs, pairs
from tests.ops.kernels_under_test import CUDA, DEVICE, TOLERANCE, with_router

find_launches = configs.find_launches

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _by_pair(monkeypatch, rows=None, parts=None, above=0, all_above=math.inf, keys=None):
    """From now on keys and values go over pairs, in steps of `rows` rows and `keys` keys, shared by `parts` programs, if they are given.

    Attend does, and queries, keys and values do together, where tiles list more than `all_above` times what was selected.
    """

    def launches(*args, **kwargs):
        usual = find_launches(*args, **kwargs)
        config = usual.pairs._replace(block=rows or usual.pairs.block, keys=keys or usual.pairs.keys)
        slabs = usual.attend_pairs._replace(block=max(rows or 16, 16))
        return usual._replace(
            pairs=config,
            parts=parts or usual.parts,
            pair_parts=parts or usual.pair_parts,
            pairs_above=above,
            attend_pairs=slabs,
            backward_pairs=slabs,
            attend_pairs_above=all_above,
            backward_pairs_above=all_above,
        )

    monkeypatch.setattr(dash, "find_launches", launches)
    # so that parts cut the few steps of a test
    monkeypatch.setattr(pairs, "LEAST_STEPS", 1)


def _gradients(
    N=50,
    Hq=4,
    Hkv=2,
    D=16,
    C=16,
    dtype=torch.float32,
    lengths=None,
    deterministic=False,
    with_output=False,
    own_router=False,
    **router,
):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, N, Hq, D), (1, N, Hkv, D), (1, N, Hkv, D), (Hkv, D), (1, N, Hq, D)
    *leaves, upstream = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in leaves]
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(DEVICE)
    settings = {"chunk_size": C, "scaling_factor": 2.0, "sigma": 2.0, "alpha": 1.5, "cu_seqlens": cu_seqlens}
    if own_router:
        own = (
            torch.randn(shapes[1], generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(2)
        )
        router |= dict(zip(("routing_q", "routing_k"), own, strict=True)) | {"pool_heads": True}
    out, _ = dash.dash_attention_triton(
        *leaves, **with_router(settings | router), deterministic=deterministic
    )
    leaves += [router["routing_q"], router["routing_k"]] if own_router else []
    gradients = torch.autograd.grad(out, leaves, upstream)
    return (*gradients, out.detach()) if with_output else gradients


def _check(expected, gradients, dtype=torch.float32):
    for name, x, y in zip("qkvwors"[: len(expected)], gradients, expected, strict=True):
        assert not x.isnan().any(), name
        assert (x - y).norm() <= TOLERANCE[dtype][1] * y.norm(), name


def _results(**shape):
    """Output and gradients."""
    return _gradients(with_output=True, **shape)


SHAPES = {
    "one head a group, rows of a step that no chunk fills": ({"Hq": 2}, 64),
    "three heads a group": ({"Hq": 6}, 16),
    "sixteen heads a group": ({"Hq": 16, "Hkv": 1}, 32),
    "head dim 24, chunks of 64": ({"N": 150, "D": 24, "C": 64, "Hkv": 1}, 32),
    "bfloat16, chunks of 32": ({"N": 80, "C": 32, "dtype": torch.bfloat16}, 32),
    "alpha 1.7, prior not centred": ({"alpha": 1.7, "estimate_diagonal": False}, 16),
    "packed": ({"lengths": (9, 1, 16, 24)}, 16),
    "everything selected": ({"scaling_factor": 0.01}, 16),
    "local chunks, pooled queries": ({"N": 59, "Hq": 6, "local_chunks": 1, "query_pool": 3}, 16),
}


@pytest.mark.parametrize(("shape", "rows"), SHAPES.values(), ids=SHAPES)
def test_gradients_by_pair_equal_those_over_tiles(shape, rows, monkeypatch):
    expected = _gradients(**shape)
    _by_pair(monkeypatch, rows)
    _check(expected, _gradients(**shape), shape.get("dtype", torch.float32))


@pytest.mark.parametrize(("shape", "rows"), SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_with_every_stage_by_pair_equal_those_over_tiles(shape, rows, monkeypatch):
    expected = _results(**shape)
    _by_pair(monkeypatch, rows, all_above=0)
    first = _results(**shape)
    _check(expected, first, shape.get("dtype", torch.float32))
    if CUDA:  # an interpreter computes no other bits
        again = _results(**shape)
        # dk, dv and dw follow gradients of summaries that are added with atomics
        assert all(torch.equal(first[i], again[i]) for i in (0, 4))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_router_of_its_own_has_the_gradients_by_pair_that_it_has_over_tiles(deterministic, monkeypatch):
    given = {
        "own_router": True,
        "query_pool": 3,
        "local_chunks": 1,
        "deterministic": deterministic,
        "with_output": True,
    }
    expected = _gradients(N=60, **given)
    _by_pair(monkeypatch, 16, all_above=0)
    _check(expected, _gradients(N=60, **given))


@pytest.mark.parametrize(
    "shape",
    [{}, {"alpha": 1.7, "scaling_factor": torch.tensor([1.0, 3.0], device=DEVICE), "lengths": (33, 17)}],
    ids=str,
)
def test_deterministic_gradients_by_pair_are_the_same_bits_in_every_run(shape, monkeypatch):
    expected = _gradients(deterministic=True, **shape)
    _by_pair(monkeypatch)
    first, again = (_gradients(deterministic=True, **shape) for _ in range(2))
    _check(expected, first)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize(("parts", "most"), [(1, 2**26), (500, 2**26), (2, 64)])
def test_gradients_by_pair_do_not_depend_on_parts_and_slabs(parts, most, monkeypatch):
    """Whole in one part; more parts than there are steps; and few pairs at a time, so that slabs cut chunks."""
    shape = {"N": 100, "Hq": 8, "Hkv": 1}
    expected = _gradients(**shape, deterministic=True)
    monkeypatch.setattr(pairs, "MAX_PAIRS", most)
    _by_pair(monkeypatch, 16 if most == 64 else None, parts)
    _check(expected, _gradients(**shape, deterministic=True))


@pytest.mark.parametrize("keys", [16, 32])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_by_pair_do_not_depend_on_chunks_taken_side_by_side(keys, deterministic, monkeypatch):
    """Single chunks and two, of one document or of neighbouring ones; other tests take four of 16 tokens."""
    shape = {"N": 90, "lengths": (33, 17, 40), "deterministic": deterministic}
    expected = _gradients(**shape)
    _by_pair(monkeypatch, 16, 3, keys=keys)
    _check(expected, _gradients(**shape))


@pytest.mark.parametrize(
    ("workspace", "parts", "counts", "places"),
    [(2**31, 1, 2**26, 2**28), (2**31, 12, 63, 2**28), (2**15, 3, 2**26, 2**14), (2**15, 3, 63, 1)],
    ids=["one slab a head", "few tiles a slab", "several slabs a head", "counted slab by slab"],
)
def test_results_by_pair_do_not_depend_on_parts_and_slabs(workspace, parts, counts, places, monkeypatch):
    """In the second and the last the table of counts has not room for all tiles, as in sequences that are too long for it."""
    monkeypatch.setattr(pair_slabs, "MAX_COUNTS", counts)
    monkeypatch.setattr(pair_slabs, "COUNTED_SLABS", 2)
    monkeypatch.setattr(pair_slabs, "PLACES_BYTES", places)
    shape = {"N": 100, "Hq": 4, "Hkv": 2, "scaling_factor": 0.01, "deterministic": True}
    expected = _results(**shape)
    monkeypatch.setattr(pair_slabs, "WORKSPACE_BYTES", workspace)
    _by_pair(monkeypatch, 16, parts, all_above=0)
    _check(expected, _results(**shape))


def test_pairs_or_tiles_give_the_same_in_every_stage(monkeypatch):
    shape = {"N": 60, "Hq": 4, "Hkv": 2, "deterministic": True}
    expected = _results(**shape)
    for above in (1.0, 16.0):
        _by_pair(monkeypatch, all_above=above)
        _check(expected, _results(**shape))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_device_takes_pairs_or_tiles_by_how_much_tiles_list(deterministic, monkeypatch):
    """Just below and above the ratio both give the gradients; each leaves the other without work."""
    shape = {"N": 100, "Hq": 4, "Hkv": 2, "deterministic": deterministic}
    expected = _gradients(**shape)
    plans = []

    def plan_and_keep(*args):
        plans.append(plan_pairs(*args))
        return plans[-1]

    plan_pairs = pairs.plan_pairs
    monkeypatch.setattr(backward_kv, "plan_pairs", plan_and_keep)
    for above, taken in ((1.0, True), (16.0, False)):
        _by_pair(monkeypatch, above=above)
        _check(expected, _gradients(**shape))
        assert plans[-1].taken.item() is taken
        assert (plans[-1].partition.work[-1] > 0).item() is taken


def _made_lists(N=70, Hkv=2, C=16, chunks=5):
    """Sizes, chunks and lists of a token's past chunks of which 40% were drawn; log priors [Hkv, N, chunks], -inf elsewhere."""
    sizes = geometry.size_tiles(N, (Hkv, 16), Hkv, C, chunks, 2 * chunks, 8)
    table = geometry.chunk_table(sizes, 1, None, torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    past = torch.arange(chunks) < (torch.arange(N) // C)[:, None]
    selected_HNc = ((torch.rand(Hkv, N, chunks, generator=generator) < 0.4) & past).to(DEVICE)
    log_HNc = (
        torch.randn(Hkv, N, chunks, generator=generator).to(DEVICE).masked_fill(~selected_HNc, -torch.inf)
    )
    padding = (0, 0, 0, chunks * C - N)
    tiles_itc = F.pad(log_HNc, padding, value=-torch.inf).unflatten(1, (chunks, C)).flatten(0, 1)
    tile, chunk = (tiles_itc > -torch.inf).any(1).nonzero(as_tuple=True)
    counts = torch.bincount(tile, minlength=Hkv * chunks)
    lists = geometry.Lists(chunk.int(), tiles_itc[tile, :, chunk], counts.cumsum(0) - counts, counts.int())
    return sizes, table, lists, log_HNc


def _slabs_of(lists, chunks, sizes, above=0):
    """Slabs of a workspace in which a pair has one byte."""
    by_pair = configs.ByPair(
        find_launches(torch.device(DEVICE), torch.float32, 16, 16, 1).attend_pairs._replace(block=16),
        3,
        above,
    )
    return pair_slabs.plan_slabs(lists, chunks, sizes, 1, by_pair, None, True)


@pytest.mark.parametrize(
    ("room", "counts", "places"),
    [(2**20, 2**26, 2**28), (2**20, 110, 2**28), (416, 2**26, 2**14), (416, 110, 1)],
    ids=["one slab a head", "few tiles a slab", "several slabs a head", "counted slab by slab"],
)
def test_slabs_hold_each_selected_pair_once_by_chunk_and_by_token(room, counts, places, monkeypatch):
    """In the second and the last the table of counts has room for 8 of the 26 tiles."""
    monkeypatch.setattr(pair_slabs, "WORKSPACE_BYTES", room)
    monkeypatch.setattr(pair_slabs, "MAX_COUNTS", counts)
    monkeypatch.setattr(pair_slabs, "COUNTED_SLABS", 2)
    monkeypatch.setattr(pair_slabs, "PLACES_BYTES", places)
    N, Hkv, C, nc = 200, 2, 16, 13
    sizes, chunks, lists, log_HNc = _made_lists(N, Hkv, C, nc)
    mean_log = torch.randn(N, Hkv, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    slabs = _slabs_of(lists, chunks, sizes)
    found, filled = [], 0
    for number, placed, slab in pair_slabs.filled_slabs(slabs, lists, mean_log, chunks, sizes, 0.5, True):
        ends = placed.row_place[number]
        pairs = int(ends[-1])
        filled += pairs > 0
        assert pairs <= slabs.room <= room
        token = slab.token_shift[:pairs] & (2**32 - 1)
        shift = (slab.token_shift[:pairs] >> 32).int().view(torch.float32)
        chunk = torch.searchsorted(ends, torch.arange(pairs, device=DEVICE), right=True) - 1
        head = torch.full_like(token, int(placed.first_tile[number]) // sizes.tiles_per_head)
        expected = (log_HNc[head, token, chunk] - mean_log[token, head]) * 0.5
        assert torch.equal(shift, expected)
        assert torch.equal(lists.log_prior.flatten()[slab.entry[:pairs]], log_HNc[head, token, chunk])
        # slots: by token, and of each its chunks in the order of its list
        by_token = torch.stack([token, chunk], 1)[slab.slot[:pairs].argsort()].tolist()
        assert by_token == sorted(by_token)
        assert sorted(slab.slot[:pairs].tolist()) == list(range(pairs))
        found += zip(head.tolist(), token.tolist(), chunk.tolist(), strict=True)
    selected = (log_HNc > -torch.inf).nonzero().tolist()
    assert sorted(found) == [tuple(pair) for pair in selected]
    assert filled == Hkv if (room, counts) == (2**20, 2**26) else filled > Hkv
    assert slabs.count_tiles <= (8 if counts == 110 else sizes.num_tiles)


def test_the_device_leaves_to_tiles_all_or_nothing_by_how_much_they_list():
    sizes, chunks, lists, log_HNc = _made_lists()
    ratio = lists.counts.sum().item() * sizes.tile_tokens / (log_HNc > -torch.inf).sum().item()
    for above, taken in ((0.9 * ratio, True), (1.1 * ratio, False)):
        slabs = _slabs_of(lists, chunks, sizes, above)
        assert torch.equal(slabs.rest(lists).counts, lists.counts * (not taken))
        assert (slabs.placed.row_work[:, -1].sum() > 0).item() is taken


def test_queries_whose_keys_gradients_would_take_too_much_memory_by_pair_are_left_to_tiles(monkeypatch):
    sizes, chunks, lists, _ = _made_lists()
    q, k, v, out, d_out = torch.randn(5, 70, 2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lse, mean_log = torch.zeros(2, 70, 2, device=DEVICE)
    launches = find_launches(torch.device(DEVICE), torch.float32, 16, 16, 1)
    by_pair = configs.ByPair(launches.backward_pairs._replace(block=16), 3, 0)
    for most, taken in ((8 * k.numel(), True), (8 * k.numel() - 1, False)):
        monkeypatch.setattr(backward_q, "MAX_PAIR_GRADIENT_BYTES", most)
        found = backward_q.backward_q(
            q, k, v, out, d_out, lse, lists, mean_log, torch.empty_like(lists.log_prior), chunks, sizes, 1.0,
            launches.queries, by_pair=by_pair,
        )  # fmt: skip
        assert torch.equal(found.lists.counts, lists.counts * (not taken))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_group_of_chunks_has_its_own_tokens_then_those_that_selected_any_of_it(width):
    N, Hkv, C = 70, 2, 16
    sizes, chunks, lists, log_HNc = _made_lists(N, Hkv, C)
    assert sizes.tile_tokens == C
    selected_HNc = log_HNc > -torch.inf
    mean_log = torch.randn(N, Hkv, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    queries = geometry.own_places(None, chunks, sizes)
    plan = pairs.plan_pairs(lists, chunks, queries, sizes, (0, 5), width, 3, 4, 0)
    assert plan.slabs == 1
    packed = pairs.fill_pairs(plan, 0, lists, mean_log, chunks, queries, sizes).token_prior
    groups = -(-5 // width)
    log_HNc, selected_HNc = (
        F.pad(x, (0, groups * width - 5), value=y) for x, y in ((log_HNc, -torch.inf), (selected_HNc, False))
    )
    own_NHc = torch.full((groups * width * C, Hkv, width), -torch.inf, device=DEVICE)
    slot = torch.arange(N, device=DEVICE)
    own_NHc[slot, :, slot // C % width] = mean_log
    for row in range(Hkv * groups):
        h, g = divmod(row, groups)
        token, bits = packed[plan.offset[row] : plan.offset[row + 1]].unbind(2)
        assert (token == token[:, :1]).all()
        of_group, own = (
            slice(g * width, (g + 1) * width),
            torch.arange(g * width * C, (g + 1) * width * C, device=DEVICE),
        )
        listed = selected_HNc[h, :, of_group].any(1).nonzero().flatten()
        # places of tokens that do not exist have a token that does
        assert torch.equal(token[:, 0].long(), torch.cat([torch.where(own < N, own, 0), listed]))
        expected = torch.cat([own_NHc[own, h], log_HNc[h, listed, of_group]])
        assert torch.equal(bits.contiguous().view(torch.float32), expected)


@pytest.mark.parametrize(("most", "parts"), [(2**26, 7), (800, 13), (64, 3), (64, 40)])
def test_all_slabs_share_the_parts_and_none_has_more_work_than_fits(most, parts, monkeypatch):
    """So what is left to be added up does not grow with the slabs. All work is in the first slab if it fits."""
    monkeypatch.setattr(pairs, "MAX_PAIRS", most)
    monkeypatch.setattr(pairs, "LEAST_STEPS", 1)
    sizes, chunks, lists, _ = _made_lists()
    queries = geometry.own_places(None, chunks, sizes)
    width, step = 2, 4
    plan = pairs.plan_pairs(lists, chunks, queries, sizes, (0, 5), width, parts, step, 0)
    rows, slab_steps = len(plan.offset) - 1, most // (width * step)
    most_steps = (lists.log_prior.numel() + rows * width * sizes.chunk_size) // step + rows
    assert len(plan.partition.row) == plan.slab_part[-1] == max(parts, -(-most_steps // slab_steps))
    steps = plan.partition.work[-1].item()
    per_slab = plan.partition.bound[plan.slab_part].diff()
    assert per_slab.sum() == steps
    assert per_slab.max() <= slab_steps
    assert plan.base[-1] == plan.offset[-1]
    assert plan.base.diff().max() <= plan.room <= slab_steps * step
    assert (per_slab[0] == steps) == (steps <= slab_steps)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU: too many tokens for the interpreter")
def test_half_precision_by_pair_equals_that_over_tiles_at_real_sizes(monkeypatch):
    shapes = (64, 128, 32), (64, 64, 64), (32, 64, 64), (32, 128, 64), (16, 128, 64), (128, 128, 32)
    for C, D, rows, keys in [(*shape, None) for shape in shapes] + [(32, 64, 64, 32)]:
        shape = {"N": 3000, "Hq": 8, "D": D, "C": C, "dtype": torch.bfloat16, "scaling_factor": 1.0}
        monkeypatch.setattr(dash, "find_launches", find_launches)
        expected = _gradients(**shape)
        _by_pair(monkeypatch, rows, keys=keys)
        _check(expected, _gradients(**shape), torch.bfloat16)
