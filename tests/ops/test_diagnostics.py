"""Routing diagnostics against the reference attention, chunk by chunk."""

import math

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops import dash_attention, entmax, routing_rows
from dash_megatron.ops import diagnostics as module
from dash_megatron.ops.diagnostics import (
    MEASURES,
    NEAR_THRESHOLD,
    listed_share,
    sample_routing,
    selection_map,
)
from dash_megatron.ops.pooling import pool_queries
from dash_megatron.ops.routing_rows import selected_chunks
from dash_megatron.ops.types import Router

C, D = 4, 32
ROUTER = Router(C, 4.0, 2.0, True, 1.5)


def inputs(B: int = 1, N: int = 61, Hq: int = 4, Hkv: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Queries, keys and summary queries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, N, Hq, D), (B, N, Hkv, D), (Hkv, D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def by_hand(q, k, w, router, lengths, own=None):
    """`MEASURES` [H, N] by loops; the attention of chunks from the reference, given values that say which chunk they are of."""
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    chunk = torch.cat([torch.arange(length) // C for length in lengths])
    v = F.one_hot(chunk, D).float()[None, :, None].expand_as(k)
    options = {**router._asdict(), "cu_seqlens": cu_seqlens, "backend": "reference"}
    options |= zip(("routing_q", "routing_k"), own or (), strict=False)
    routing_q, routing_k = own or (q, k)
    out, routing = dash_attention(q, k, v.contiguous(), w, return_routing=True, **options)
    H, G = k.shape[2], q.shape[2] // k.shape[2]
    mass = out[0].view(-1, H, G, D).mean(2)
    values = {name: torch.full((H, len(chunk)), math.nan) for name in MEASURES}
    starts = [
        start for start, length in zip(cu_seqlens.tolist(), lengths, strict=False) for _ in range(length)
    ]
    for h in range(H):
        for i, start in enumerate(starts):
            own = int(chunk[i])
            row = {"density": routing.chunks_selected[0, i, h] / (own + 1), "own_share": mass[i, h, own]}
            row["chunks_selected"] = routing.chunks_selected[0, i, h]
            routed = max(0, own - router.local_chunks)
            if routed:
                keys = routing_k[0, start : start + routed * C, h].view(routed, C, D)
                beta = (keys @ w[h] / math.sqrt(D)).softmax(1)
                factors = router.scaling_factor
                factor = float(factors[h] if isinstance(factors, torch.Tensor) else factors)
                pooled = routing_q[0, max(start, i - router.query_pool + 1) : i + 1].mean(0)
                z = factor / math.sqrt(D) * pooled.view(H, -1, D)[h]
                z = z.mean(0, keepdim=True) if router.pool_heads else z
                p = entmax(z @ (beta[..., None] * keys).sum(1).T, router.alpha).mean(0)
                inside = p[p > 0]
                near = (p > 0) & (p < NEAR_THRESHOLD * inside.mean())
                row["entropy"] = -(inside * inside.log()).sum()
                row["effective_chunks"] = row["entropy"].exp()
                row["evenness"] = row["entropy"] / math.log(routed) if routed > 1 else math.nan
                row["prior_spread"] = inside.log().std(correction=0) / router.sigma
                row["near_threshold_chunks"] = near.sum() / len(inside)
                row["near_threshold_mass"] = p[near].sum()
                row["near_threshold_attention"] = mass[i, h, :routed][near].sum()
            for name, value in row.items():
                values[name][h, i] = value
    return values


@pytest.mark.parametrize("blocks", ["one block", "many blocks"])
@pytest.mark.parametrize("lengths", [[61], [1, 30, 4, 26]], ids=["one document", "packed"])
@pytest.mark.parametrize(
    "router",
    [
        ROUTER,
        Router(C, 9.0, 1.0, False, 2.0),
        Router(C, torch.tensor([2.0, 6.0]), 2.0, True, 1.5),
        Router(C, 6.0, 2.0, True, 1.5, local_chunks=2, query_pool=3),
        Router(C, 6.0, query_pool=3, pool_heads=True),
        Router(C, 5.0, query_pool=2, pool_heads=True),
    ],
    ids=[
        "centred prior",
        "plain prior",
        "scaled by head",
        "local chunks, pooled queries",
        "one query a group",
        "own router",
    ],
)
def test_measures_of_every_query_are_those_of_the_reference(
    router: Router,
    lengths: list[int],
    blocks: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    own = None
    if "own router" in request.node.name:
        own = tuple(torch.randn(1, 61, 2, D, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        own = own[0], own[1].roll(1, 1)
    if blocks == "many blocks":
        monkeypatch.setattr(routing_rows, "MAX_BLOCK_SCORES", 1000)
    q, k, w = inputs()
    expected = by_hand(q, k, w, router, lengths, own)
    cu_seqlens = None if len(lengths) == 1 else F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    samples = sample_routing(q, k, w, router, *(own or ()), cu_seqlens=cu_seqlens, max_queries=61)
    assert samples.token.tolist() == list(range(61))
    for name in MEASURES:
        tolerance = 5e-3 if name == "prior_spread" else 1e-4  # the logarithm magnifies what is almost zero
        torch.testing.assert_close(
            samples.values[name], expected[name], atol=tolerance, rtol=tolerance, equal_nan=True, msg=name
        )
        known = expected[name].isfinite()
        assert known.any()
        mean = torch.where(known, expected[name], 0).sum(1) / known.sum(1)
        if name == "density":
            selected = expected["chunks_selected"]
            mean = selected.sum(1) / (selected / expected[name]).sum(1)
        torch.testing.assert_close(samples.head_means(name), mean, atol=tolerance, rtol=tolerance)
    assert (expected["near_threshold_mass"] > 0).any(), "nothing was near the threshold"


def test_rows_of_a_batch_are_documents_of_their_own() -> None:
    q, k, w = inputs(B=2, N=21)
    samples = sample_routing(q, k, w, ROUTER, max_queries=42)
    for row in range(2):
        alone = sample_routing(q[row : row + 1], k[row : row + 1], w, ROUTER, max_queries=21)
        half = slice(21 * row, 21 * row + 21)
        for name in MEASURES:
            torch.testing.assert_close(samples.values[name][:, half], alone.values[name], equal_nan=True)


def test_buckets_double_and_samples_are_spread_over_them_and_over_the_places_in_a_chunk() -> None:
    lengths = [4096, 1024, 3072]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    q, k, w = inputs(N=8192, Hq=1, Hkv=1)
    router = Router(16, *ROUTER[1:])
    samples = sample_routing(q, k, w, router, cu_seqlens=cu_seqlens, max_queries=256)
    assert samples.edges == (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    assert len(samples.token) == 256
    assert torch.bincount(samples.bucket).tolist() == [28] * 4 + [28, 29, 29, 29, 29]
    position = torch.cat([torch.arange(length) for length in lengths])
    assert samples.weight.sum().item() == pytest.approx(1, abs=1e-5)
    for index, (start, end) in enumerate(zip(samples.edges, samples.edges[1:], strict=False)):
        inside = (position >= start) & (position < end)
        sampled = samples.token[samples.bucket == index]
        assert inside[sampled].all()
        assert samples.weight[samples.bucket == index].sum().item() == pytest.approx(
            inside.float().mean().item()
        )
        if len(sampled):
            assert len(set((position[sampled] % 16).tolist())) >= 9
    exact = sample_routing(q, k, w, router, cu_seqlens=cu_seqlens, max_queries=8192)
    for name in ("density", "entropy", "own_share"):
        assert samples.head_means(name).item() == pytest.approx(exact.head_means(name).item(), rel=0.05)
    means = exact.bucket_means("density")
    assert means.shape == (1, 10)
    assert means[0, 0] == 1
    assert means[0, -1].isnan()
    inside = exact.bucket == 5
    selected, share = (exact.values[name][0, inside] for name in ("chunks_selected", "density"))
    assert means[0, 5].item() == pytest.approx((selected.sum() / (selected / share).sum()).item())
    _, routing = dash_attention(
        q, k, k, w, return_routing=True, cu_seqlens=cu_seqlens, backend="reference", **router._asdict()
    )
    assert exact.head_means("density").item() == pytest.approx(routing.density.item(), rel=1e-5)


def test_the_histogram_of_weights_counts_selected_chunks() -> None:
    q, k, w = inputs()
    samples = sample_routing(q, k, w, ROUTER, max_queries=61)
    assert samples.weights.sum(1).tolist() == pytest.approx([1, 1])
    below = sum(edge <= math.log10(NEAR_THRESHOLD) + 1e-6 for edge in module.WEIGHT_BINS[1:])
    values = samples.values
    inside = values["chunks_selected"] - 1
    near = torch.nan_to_num(values["near_threshold_chunks"] * inside).sum(1) / inside.sum(1)
    torch.testing.assert_close(samples.weights[:, :below].sum(1), near, atol=1e-3, rtol=0)


def test_a_map_shows_the_share_of_tokens_that_selected_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, w = inputs(N=30)
    local, _ = selection_map(q, k, w, ROUTER._replace(local_chunks=2, query_pool=3))
    below = torch.arange(8)[:, None] - torch.arange(8)
    assert local[:, (below >= 0) & (below <= 2)].eq(1).all()
    assert local[:, below > 2].lt(1).any()
    selected = sample_routing(q, k, w, ROUTER._replace(local_chunks=2, query_pool=3), max_queries=30).values[
        "chunks_selected"
    ]
    torch.testing.assert_close(local[:, 6].nansum(1), selected[:, 24:28].mean(1))
    share, per_cell = selection_map(q, k, w, ROUTER)
    assert (share.shape, per_cell) == ((2, 8, 8), 1)
    samples = sample_routing(q, k, w, ROUTER, max_queries=30)
    assert share[:, torch.arange(8), torch.arange(8)].eq(1).all()
    assert share.isnan().equal(torch.ones(8, 8).triu(1).bool().expand(2, 8, 8))
    for row in range(8):
        tokens = slice(row * C, min(row * C + C, 30))
        mean = samples.values["chunks_selected"][:, tokens].mean(1)
        torch.testing.assert_close(share[:, row].nansum(1), mean)
    coarse, per_cell = selection_map(q, k, w, ROUTER, max_cells=4)
    assert per_cell == 2
    # 8 tokens and 2 chunks, all of them available
    assert coarse[0, 3, 1].item() == pytest.approx(
        (share[0, 6, 2:4].mean() * 4 + share[0, 7, 2:4].mean() * 2) / 6
    )
    # 4 tokens with one chunk of their own, 4 with that and one more
    assert coarse[0, 0, 0].item() == pytest.approx((4 + 4 * share[0, 1, :2].sum()) / 12)
    few, _ = selection_map(q, k, w, ROUTER, tokens_per_cell=2)
    assert (few.nan_to_num() * 2).eq((few.nan_to_num() * 2).round()).all()
    monkeypatch.setattr(routing_rows, "MAX_BLOCK_SCORES", 100)
    sampled, _ = selection_map(q, k, w, ROUTER, max_cells=4)
    assert torch.equal(sampled.nan_to_num(-1), coarse.nan_to_num(-1))


@pytest.mark.parametrize("options", [{}, {"local_chunks": 1, "query_pool": 2}], ids=str)
def test_tiles_visit_what_any_of_their_tokens_selected(options: dict[str, int]) -> None:
    q, k, w = inputs(N=30)
    router = ROUTER._replace(**options)
    shares = listed_share(q, k, w, router)
    assert list(shares) == [1, 2, 4]
    routing_q = pool_queries(q, router.query_pool)
    for head in range(2):
        summaries = k[0, :28, head].float().view(7, C, -1)
        weights = (summaries @ w[head].float() * k.shape[-1] ** -0.5).softmax(1)
        summary_cD = (weights[..., None] * summaries).sum(1)
        visited = {tile: 0 for tile in shares}
        for chunk in range(1, 7):
            routed = max(0, chunk - router.local_chunks)
            group = slice(head * q.shape[2] // 2, (head + 1) * q.shape[2] // 2)
            z = torch.einsum(
                "sgd,cd->sgc", routing_q[0, chunk * C : chunk * C + C, group].float(), summary_cD[:routed]
            )
            z *= ROUTER.scaling_factor * q.shape[-1] ** -0.5
            selected = torch.ones(C, chunk, dtype=torch.bool)
            selected[:, :routed] = entmax(z, ROUTER.alpha).mean(1) > 0
            for tile in shares:
                for begin in range(0, C, tile):
                    visited[tile] += tile * int(selected[begin : begin + tile].any(0).sum())
        for tile, share in shares.items():
            assert share[head].item() == pytest.approx(visited[tile] / (C * sum(range(1, 7))))
    few = listed_share(q, k, w, router, max_chunks=3)
    assert few[1].lt(few[4]).all()
    with pytest.raises(ValueError, match="two chunks of 4"):
        listed_share(q[:, :7], k[:, :7], w, ROUTER)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_measures_the_same() -> None:
    q, k, w = inputs(N=3000)
    cu_seqlens = torch.tensor([0, 700, 3000], dtype=torch.int32)
    expected = sample_routing(q, k, w, ROUTER, cu_seqlens=cu_seqlens)
    found = sample_routing(q.cuda(), k.cuda(), w.cuda(), ROUTER, cu_seqlens=cu_seqlens.cuda())
    assert torch.equal(found.token.cpu(), expected.token)
    for name in ("density", "entropy", "own_share", "near_threshold_mass"):
        torch.testing.assert_close(
            found.head_means(name).cpu(), expected.head_means(name), atol=1e-3, rtol=1e-3
        )
    share, _ = selection_map(q.cuda(), k.cuda(), w.cuda(), ROUTER)
    assert (share.cpu() - selection_map(q, k, w, ROUTER).share).nan_to_num().abs().mean() < 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"local_chunks": 2, "query_pool": 3}, {"pool_heads": True, "query_pool": 2}], ids=str
)
@pytest.mark.parametrize("most", [2**24, 64], ids=["one block", "many blocks"])
def test_selected_chunks_are_those_that_attention_and_tiles_count(
    options: dict[str, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing_rows, "MAX_BLOCK_SCORES", most)
    q, k, w = inputs(N=30)
    router = ROUTER._replace(**options)
    # with a query a group, of a router of its own
    own = (k.roll(1, 1), k.roll(2, 1)) if router.pool_heads else None
    selected_HNc = selected_chunks(q, k, w, router, *(own or ()))
    assert selected_HNc.shape == (2, 30, 8)
    named = router._asdict() | dict(zip(("routing_q", "routing_k"), own or (), strict=False))
    _, routing = dash_attention(
        q, k, torch.zeros_like(k), w, return_routing=True, backend="reference", **named
    )
    # the own chunk is counted, and not in the bits
    assert selected_HNc.sum(-1).mT.tolist() == (routing.chunks_selected[0] - 1).tolist()
    shares = listed_share(q, k, w, router, *(own or ()))
    whole = selected_HNc[:, :28, :7]
    for tile, share in shares.items():
        visited = tile * whole.unflatten(1, (-1, tile)).any(2).sum((1, 2))
        assert (visited / (C * sum(range(7)))).tolist() == pytest.approx(share.tolist())
