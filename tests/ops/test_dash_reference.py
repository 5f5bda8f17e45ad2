"""The plain torch DashAttention against loops written from the paper, finite differences, and its own promises."""

import math
import time

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops import Routing, dash_attention, reference
from dash_megatron.ops.chunk_grid import ChunkGrid
from dash_megatron.ops.types import Router
from tests.ops.dash_by_hand import oracle
from tests.ops.reference_runs import assert_close, bounds_of, make_inputs, run_reference, with_defaults


def _factors(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


CASES = {
    "plain": ({}, {}),
    "batch of three": ({"B": 3, "N": 17}, {}),
    "whole chunks": ({"N": 32}, {}),
    "one head per group": ({"Hq": 2}, {}),
    "one group": ({"Hkv": 1}, {"scaling_factor": 0.5}),
    "sigma 1": ({}, {"sigma": 1.0}),
    "flat prior": ({}, {"sigma": 1e6}),
    "prior not centred": ({}, {"estimate_diagonal": False}),
    "alpha 1.3": ({}, {"alpha": 1.3}),
    "alpha 2": ({}, {"alpha": 2.0}),
    "a factor a head, packed": (
        {"N": 40},
        {"cu_seqlens": bounds_of(17, 23), "scaling_factor": _factors(5.0, 1.5)},
    ),
    "a factor a head": ({"B": 2}, {"scaling_factor": _factors(2.0, 9.0)}),
    "local chunks": ({"N": 41}, {"local_chunks": 2}),
    "more local chunks than there are": ({}, {"local_chunks": 9, "query_pool": 3}),
    "pooled queries": ({"B": 2}, {"query_pool": 5}),
    "pool longer than the document": ({"N": 13}, {"query_pool": 128}),
    "local chunks and pooled queries, packed": (
        {"N": 60},
        {
            "cu_seqlens": bounds_of(9, 1, 27, 4, 19),
            "local_chunks": 1,
            "query_pool": 8,
            "scaling_factor": _factors(5.0, 1.5),
        },
    ),
    "one query a group": ({"Hq": 6}, {"pool_heads": True, "scaling_factor": _factors(3.0, 9.0)}),
    "one pooled query a group, local chunks, packed": (
        {"N": 60},
        {"cu_seqlens": bounds_of(9, 1, 27, 4, 19), "local_chunks": 1, "query_pool": 8, "pool_heads": True},
    ),
    "local chunks, not centred, alpha 1.3": (
        {"N": 41},
        {"local_chunks": 3, "estimate_diagonal": False, "alpha": 1.3, "query_pool": 2},
    ),
    "shorter than a chunk": ({"N": 3}, {}),
    "chunks of one token": ({"N": 12}, {"chunk_size": 1}),
    "packed": ({"N": 40}, {"cu_seqlens": bounds_of(9, 1, 16, 3, 11)}),
    "packed, not centred": ({"N": 40}, {"cu_seqlens": bounds_of(17, 23), "estimate_diagonal": False}),
    "packed, none fills a chunk": ({"N": 8}, {"cu_seqlens": bounds_of(3, 1, 2, 2)}),
}


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
def test_output_gradients_and_selection_equal_loops_over_tokens_and_chunks(shape, settings):
    leaves, upstream = make_inputs(**shape)
    out, grads, counts = run_reference(leaves, upstream, **settings)
    expected_out, expected_grads, expected_counts = oracle(leaves, upstream, **settings)
    assert torch.equal(counts, expected_counts.int())
    assert_close(out, expected_out, torch.float64)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, torch.float64)


def test_float32_gives_the_float64_output_and_gradients():
    leaves, upstream = make_inputs(B=2, N=61, dtype=torch.float32)
    out, grads, _ = run_reference(leaves, upstream)
    expected_out, expected_grads, _ = oracle(leaves, upstream)
    for actual, expected in zip([out, *grads], [expected_out, *expected_grads], strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("summary_dtype", ["same", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_returned_in_half(dtype, summary_dtype):
    leaves, upstream = make_inputs(N=61, dtype=dtype)
    if summary_dtype != "same":
        leaves[3] = leaves[3].detach().to(summary_dtype).requires_grad_()
    out, grads, counts = run_reference(leaves, upstream)
    expected_out, _, expected_counts = oracle(leaves, upstream)
    assert out.dtype == dtype
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    assert torch.equal(counts, expected_counts.int())
    assert_close(out, expected_out, dtype)


def test_autocast_does_not_lower_the_precision():
    leaves, _ = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dash_attention(*leaves, **with_defaults())
    assert torch.equal(inside, dash_attention(*leaves, **with_defaults()))


@pytest.mark.parametrize("wrt", ["q", "k", "v", "summary_query", "scaling_factor"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimate_diagonal": False},
        {"alpha": 1.3},
        {"alpha": 2.0, "estimate_diagonal": False},
        {"cu_seqlens": bounds_of(8, 1, 4)},
        {"local_chunks": 1, "query_pool": 3},
    ],
    ids=["centred", "not-centred", "alpha-1.3", "alpha-2", "packed", "local-pooled"],
)
def test_gradient_of_every_input_passes_gradcheck(settings, wrt, monkeypatch):
    leaves, _ = make_inputs(N=13, D=3, seed=3)
    means = []
    take_mean = reference.mean_log_p

    def frozen_mean(*args):
        # the mean of the log prior carries no gradient, so finite differences must not move it either
        if not means:
            means.append(take_mean(*args))
        return means[0]

    monkeypatch.setattr(reference, "mean_log_p", frozen_mean)
    names = ["q", "k", "v", "summary_query", "scaling_factor"]
    leaves.append(_factors(6.0, 4.0))
    inputs = {name: x.detach() for name, x in zip(names, leaves, strict=True)}

    def attend(x):
        return dash_attention(**with_defaults(**{**inputs, **settings, wrt: x}))

    assert torch.autograd.gradcheck(attend, leaves[names.index(wrt)])


def test_the_router_learns_through_the_prior_and_a_flat_prior_teaches_it_nothing():
    leaves, upstream = make_inputs()
    # scores this close keep every chunk away from its threshold, where 1 / p would make up for any sigma
    _, grads, _ = run_reference(leaves, upstream, scaling_factor=0.5)
    _, flat_grads, _ = run_reference(leaves, upstream, scaling_factor=0.5, sigma=1e6)
    assert grads[3].abs().max() > 1e-3
    assert flat_grads[3].abs().max() < 1e-5


@pytest.mark.parametrize(
    "router", [{"alpha": 1.5}, {"alpha": 1.3}, {"alpha": 2.0}, {"local_chunks": 2, "query_pool": 16}], ids=str
)
@pytest.mark.parametrize("cu_seqlens", [None, bounds_of(100, 3, 197)], ids=["one-document", "packed"])
def test_changing_future_tokens_leaves_past_outputs_bit_identical(cu_seqlens, router):
    leaves, _ = make_inputs(N=300, dtype=torch.float32)
    settings = with_defaults(chunk_size=16, cu_seqlens=cu_seqlens, **router, return_routing=True)
    out, routing = dash_attention(*leaves, **settings)
    for first_changed in (1, 15, 16, 101, 140, 299):
        changed = [x.detach().clone() for x in leaves]
        for x in changed[:3]:
            x[:, first_changed:] = 1e3 * torch.randn_like(x[:, first_changed:])
        new_out, new_routing = dash_attention(*changed, **settings)
        assert torch.equal(out[:, :first_changed], new_out[:, :first_changed])
        assert torch.equal(
            routing.chunks_selected[:, :first_changed], new_routing.chunks_selected[:, :first_changed]
        )


@pytest.mark.parametrize("lengths", [(64, 36), (5, 90, 1, 4), (1, 1, 98)], ids=str)
@pytest.mark.parametrize("router", [{}, {"local_chunks": 2, "query_pool": 7}], ids=str)
def test_packed_documents_equal_separate_ones_in_output_and_gradient(lengths, router):
    leaves, upstream = make_inputs(N=100)
    out, grads, counts = run_reference(leaves, upstream, cu_seqlens=bounds_of(*lengths), **router)
    parts = []
    for *x, g in zip(*(t.detach().split(lengths, dim=1) for t in (*leaves[:3], upstream)), strict=True):
        parts.append(run_reference([*(t.requires_grad_() for t in x), leaves[3]], g, **router))
    assert_close(out, torch.cat([p[0] for p in parts], dim=1), torch.float64)
    assert torch.equal(counts, torch.cat([p[2] for p in parts], dim=1))
    for i in range(3):
        assert_close(grads[i], torch.cat([p[1][i] for p in parts], dim=1), torch.float64)
    assert_close(grads[3], sum(p[1][3] for p in parts), torch.float64)


def test_a_zero_summary_query_summarizes_a_chunk_by_its_mean_key():
    leaves, _ = make_inputs(N=32)
    q, k, v, w = (x.detach() for x in leaves)
    # keys that are all their chunk's mean have it as their summary, whatever the query
    mean_k = k.unflatten(1, (8, 4)).mean(2, keepdim=True).expand(-1, -1, 4, -1, -1).flatten(1, 2)
    _, routing = dash_attention(q, k, v, torch.zeros_like(w), **with_defaults(return_routing=True))
    _, mean_routing = dash_attention(q, mean_k, v, w, **with_defaults(return_routing=True))
    _, other_routing = dash_attention(q, k, v, 3 * w, **with_defaults(return_routing=True))
    assert torch.equal(routing.chunks_selected, mean_routing.chunks_selected)
    assert not torch.equal(routing.chunks_selected, other_routing.chunks_selected)


@pytest.mark.parametrize("summary_scale", [0, 1])
def test_a_short_chunk_is_summarized_over_the_tokens_it_has(summary_scale):
    (_, k, _, w), _ = make_inputs(N=11)
    for cu_seqlens, parts in ((None, (4, 4, 3)), (bounds_of(6, 5), (4, 2, 4, 1))):
        grid = ChunkGrid.of(11, 4, cu_seqlens, k.device)
        summary = reference.summarize(grid.by_chunk(grid.spread(k)), grid.filled(), summary_scale * w)
        for c, chunk in enumerate(k.transpose(1, 2).split(parts, dim=2)):
            weight = (summary_scale * torch.einsum("bhtd,hd->bht", chunk, w) / math.sqrt(8)).softmax(-1)
            assert_close(summary[:, :, c], torch.einsum("bht,bhtd->bhd", weight, chunk), torch.float64)


def test_summarize_route_and_attend_on_one_row_are_the_method():
    (q, k, v, w), _ = make_inputs(N=32)
    expected, routing = dash_attention(q, k, v, w, **with_defaults(return_routing=True))
    q_HGTD = q[0].unflatten(1, (2, 2)).permute(1, 2, 0, 3) / math.sqrt(8)
    k_HcCD, v_HcCD = (x[0].transpose(0, 1).unflatten(1, (8, 4)) for x in (k, v))
    token_T, chunk_c = torch.arange(32), torch.arange(8)
    places = reference.QueryPositions(token_T // 4, token_T % 4, torch.zeros(32, dtype=torch.int64))
    constants = {name: x for name, x in with_defaults().items() if name in Router._fields}
    summary = reference.summarize(k_HcCD, torch.ones(8, 4, dtype=torch.bool), w)
    bias, count = reference.route(q_HGTD, summary, *places.masks(chunk_c, 0), Router(**constants))
    out = reference.attend(q_HGTD, k_HcCD, v_HcCD, bias, places.hidden(chunk_c, 4))
    assert_close(out.permute(2, 0, 1, 3).flatten(1, 2), expected[0], torch.float64)
    assert torch.equal(count.T, routing.chunks_selected[0])


def test_the_grid_begins_a_chunk_with_every_document():
    grid = ChunkGrid.of(11, 4, bounds_of(5, 1, 5), torch.device("cpu"))
    assert grid.chunk_N.tolist() == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 4]
    assert grid.slot_N.tolist() == [0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 0]
    assert grid.first_chunk_N.tolist() == [0] * 5 + [2] + [3] * 5
    assert grid.filled().sum(1).tolist() == [4, 1, 1, 4, 1]
    x = torch.arange(11.0).view(1, 11, 1, 1)
    on_grid = grid.by_chunk(grid.spread(x))[0, 0, :, :, 0]
    assert on_grid[grid.filled()].tolist() == list(range(11))


def test_one_token_documents_attend_to_themselves():
    leaves, _ = make_inputs(N=2000, dtype=torch.float32)
    started = time.monotonic()
    out, routing = dash_attention(
        *leaves, **with_defaults(cu_seqlens=bounds_of(*[1] * 2000), return_routing=True)
    )
    assert torch.equal(out, leaves[2].repeat_interleave(2, dim=2))
    assert (routing.chunks_selected == 1).all()
    assert routing.density == 1
    # thousands of documents must not mean thousands of Python steps
    assert time.monotonic() - started < 5


def test_the_only_past_chunk_is_always_selected_with_a_prior_of_zero():
    leaves, _ = make_inputs(N=8)
    out, routing = dash_attention(*leaves, **with_defaults(return_routing=True))
    assert routing.chunks_selected[0, :, 0].tolist() == [1] * 4 + [2] * 4
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close(out, full, torch.float64)


def test_equal_scores_select_everything_and_equal_causal_attention():
    (q, k, v, w), _ = make_inputs(N=40)
    same_k = k[:, :1].expand_as(k)
    out, routing = dash_attention(q, same_k, v, w, **with_defaults(return_routing=True))
    assert routing.density == 1
    count = torch.arange(1, 41)[None, :, None, None]
    assert_close(out, (v.cumsum(1) / count).repeat_interleave(2, dim=2), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimate_diagonal", [True, False])
def test_extreme_logits_give_finite_outputs_and_gradients(estimate_diagonal, dtype):
    leaves, upstream = make_inputs(N=64, dtype=dtype)
    with torch.no_grad():
        leaves[0].mul_(100), leaves[1].mul_(100)  # logits around 1e4 either side of zero
    out, grads, counts = run_reference(leaves, upstream, estimate_diagonal=estimate_diagonal)
    assert all(x.isfinite().all() for x in [out, *grads])
    # a head selects one chunk, a group at most one per head
    assert counts[:, 4:].min() >= 2
    assert counts.max() <= 3


def test_density_is_the_share_of_the_chunks_available_in_the_tokens_own_documents():
    leaves, _ = make_inputs(N=40)
    lengths = (9, 1, 16, 3, 11)
    out, routing = dash_attention(
        *leaves, **with_defaults(cu_seqlens=bounds_of(*lengths), return_routing=True)
    )
    assert isinstance(out, torch.Tensor)
    assert isinstance(routing, Routing)
    available = torch.cat([torch.arange(n) // 4 + 1 for n in lengths])
    assert routing.chunks_selected.shape == (1, 40, 2)
    assert routing.chunks_selected.dtype == torch.int32
    assert (routing.chunks_selected >= 1).all()
    assert (routing.chunks_selected <= available[:, None]).all()
    expected = routing.chunks_selected.sum() / (2 * available.sum())
    assert routing.density.dtype == torch.float32
    assert routing.density.ndim == 0
    assert expected < 1
    torch.testing.assert_close(routing.density, expected)


def test_a_larger_scaling_factor_routes_more_sparsely():
    leaves, _ = make_inputs(N=64)
    density = [
        float(dash_attention(*leaves, **with_defaults(scaling_factor=x, return_routing=True))[1].density)
        for x in (0.1, 1.0, 10.0)
    ]
    assert density == sorted(density, reverse=True)
    assert len(set(density)) == 3


def test_no_scaling_factor_leaves_less_than_a_chunk_for_each_head_of_a_group_and_there_the_router_learns_nothing():
    (q, k, v, w), upstream = make_inputs(N=64, Hq=4, Hkv=1)
    w = torch.zeros_like(w).requires_grad_()  # summaries are means
    _, (_, _, _, dw), selected = run_reference([q, k, v, w], upstream, scaling_factor=1e6)
    best = torch.einsum("nhd,cd->nhc", q[0], k[0, :, 0].unflatten(0, (16, 4)).mean(1))
    for token in range(64):
        past = token // 4
        heads = set(best[token, :, :past].argmax(-1).tolist()) if past else set()
        assert selected[0, token, 0] == 1 + len(heads)
    assert selected.max() > 3
    _, (_, _, _, dw_soft), _ = run_reference([q, k, v, w], upstream, scaling_factor=1.0)
    assert dw_soft.abs().max() > 1e-3
    assert dw.abs().max() == 0
