"""What a DashAttention router does, measured at some of the queries: plain torch in float32, on any device, no gradient.

Letters: N tokens, S sampled queries, H key/value heads, G query heads of one key/value head, c chunks, C slots per chunk,
D head dim, K buckets of positions. Chunks are numbered through the whole packed sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.reference import log_prior
from dash_megatron.ops.routing_rows import Head, Row, SampleBlock, sample_blocks
from dash_megatron.ops.types import Router

MEASURES = {
    "density": "chunks selected over causally available ones, the own chunk included",
    "chunks_selected": "chunks selected, the own chunk included",
    "entropy": "entropy of the group mean of entmax over routed chunks (nats)",
    "effective_chunks": "exp(entropy): routed chunks that a flat distribution of this entropy has",
    "evenness": "entropy over its largest possible value, log(routed chunks)",
    "own_share": "share of the attention that stays in the own chunk",
    "prior_spread": "standard deviation of the log prior over selected routed chunks (nats)",
    "near_threshold_chunks": "share of the selected routed chunks that are near the threshold",
    "near_threshold_mass": "share of the router's probability in chunks near the threshold",
    "near_threshold_attention": "share of the attention in chunks near the threshold",
}
"""What is measured of every sampled query and key/value head. Routed chunks
are the past ones but for the local ones, which count as selected and say nothing of the router. A selected routed chunk is
near the threshold where its probability is below `NEAR_THRESHOLD` of the mean over those of the query: a small change of
scores drops it, or brings such a chunk in. `near_threshold_attention` is what the output stands to lose by that."""
NEAR_THRESHOLD = 0.1
# Logarithms to base 10 of a selected chunk's probability over the mean of those selected: edges of a histogram's bins.
WEIGHT_BINS = tuple(x / 10 for x in range(-40, 21))
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class RoutingSamples:
    """What `sample_routing` measured."""

    token: Tensor
    """int64 [S]: the sampled queries, rising; numbered through all rows."""
    bucket: Tensor
    """int64 [S]: number of the bucket that the query's position is in."""
    weight: Tensor
    """float32 [S]: share of all tokens that the query stands for."""
    edges: tuple[int, ...]
    """Bucket i holds positions within the document from edges[i] to edges[i + 1] - 1: the first chunk, the second, the
    next 2, the next 4, and so on."""
    values: dict[str, Tensor]
    """float32 [H, S] for each of `MEASURES`; NaN where a query has no routed chunk (`evenness`: fewer than 2)."""
    weights: Tensor
    """float32 [H, bins]: share of the selected routed chunks in each bin of `WEIGHT_BINS`, the outermost open."""

    def head_means(self, name: str) -> Tensor:
        """Mean over all tokens, estimated from the sampled ones: [H], NaN where nothing is known.

        Density is all selected over all available chunks, as `Routing.density`.
        """
        return _mean(self.values[name], self._weights_of(name))

    def bucket_means(self, name: str) -> Tensor:
        """Mean over the tokens of each bucket: [H, K], NaN where a bucket has none."""
        inside = [self.bucket == index for index in range(len(self.edges) - 1)]
        weight = self._weights_of(name)
        return torch.stack([_mean(self.values[name][:, mask], weight[mask]) for mask in inside], dim=1)

    def _weights_of(self, name: str) -> Tensor:
        if name != "density":
            return self.weight
        return self.weight * (self.values["chunks_selected"][0] / self.values["density"][0])


def _mean(values_HS: Tensor, weight_S: Tensor) -> Tensor:
    known = values_HS.isfinite()
    return torch.where(known, values_HS, 0) @ weight_S / (known.float() @ weight_S)


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    """`count` of the numbers below `size`, rising: evenly spread, with an offset that avoids the period of any chunk size."""
    bound = torch.arange(count + 1, device=device) * size // count
    turn = torch.arange(count, device=device, dtype=torch.float64) * _GOLDEN
    return bound[:-1] + ((turn - turn.floor()) * bound.diff()).long()


def _bucket_edges(num_tokens: int, chunk_size: int) -> tuple[int, ...]:
    edges = [0, chunk_size]
    while edges[-1] < num_tokens:
        edges.append(2 * edges[-1])
    return tuple(edges)


def _sample_tokens(position_N: Tensor, edges: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, buckets and weights as `RoutingSamples` has them: the same number from each bucket, or all that it has."""
    inner = torch.tensor(edges[1:-1], device=position_N.device)
    bucket_N = torch.bucketize(position_N, inner, right=True)
    order_N = bucket_N.argsort(stable=True)
    sizes = torch.bincount(bucket_N, minlength=len(edges) - 1).tolist()
    quotas, left = [0] * len(sizes), count
    smallest_first = sorted((size, index) for index, size in enumerate(sizes) if size)
    for done, (size, index) in enumerate(smallest_first):
        quotas[index] = min(size, max(1, left // (len(smallest_first) - done)))
        left -= quotas[index]
    tokens, weights, first = [], [], 0
    for size, quota in zip(sizes, quotas, strict=True):
        if quota:
            tokens.append(order_N[first + _spread(size, quota, position_N.device)])
            weights += [size / quota / len(position_N)] * quota
        first += size
    token_S, by_token = torch.cat(tokens).sort()
    return token_S, bucket_N[token_S], torch.tensor(weights, device=token_S.device)[by_token]


def _attention_by_chunk(q_SGD: Tensor, k_cCD: Tensor, bias_Sc: Tensor, hidden_ScC: Tensor) -> Tensor:
    """Share [S, c] of each query's final attention, mean over the group, that chunks get."""
    scores_SGcC = (q_SGD @ k_cCD.flatten(0, 1).mT).unflatten(-1, k_cCD.shape[:2])
    scores_SGcC = scores_SGcC.masked_fill(hidden_ScC[:, None], -math.inf)
    return (scores_SGcC.logsumexp(-1) + bias_Sc[:, None]).softmax(-1).mean(1)


def _measure(head: Head, block: SampleBlock) -> tuple[dict[str, Tensor], Tensor]:
    """`MEASURES` [S] of one key/value head, and counts [S, bins] of weights."""
    q_SGD, k_cCD = head.queries(block.token_S), head.k_cCD[block.chunks]
    routed_Sc, always_Sc = block.places.masks(block.chunk_c, head.router.local_chunks)
    p_Sc = head.probabilities(block.token_S, routed_Sc, block.chunks)
    bias_Sc, selected_S = log_prior(p_Sc, always_Sc, head.router)
    hidden_ScC = block.places.hidden(block.chunk_c, k_cCD.shape[1])
    attention_Sc = _attention_by_chunk(q_SGD, k_cCD, bias_Sc, hidden_ScC)
    own_share_S = attention_Sc.where(block.places.own(block.chunk_c), 0).sum(1)
    available_S = (routed_Sc | always_Sc).sum(1)
    counts = {
        "density": selected_S / available_S,
        "chunks_selected": selected_S.float(),
        "own_share": own_share_S,
    }
    values, histogram = _routed_values(p_Sc, bias_Sc, attention_Sc, routed_Sc.sum(1).float())
    return {**counts, **values}, histogram


def _routed_values(
    p_Sc: Tensor, bias_Sc: Tensor, attention_Sc: Tensor, num_routed_S: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """What is measured of the chunks that the router selects from, and counts of their weights."""
    inside_Sc, num_inside_S = p_Sc > 0, (p_Sc > 0).sum(1).float()
    relative_Sc = p_Sc * num_inside_S[:, None]
    near_Sc = inside_Sc & (relative_Sc < NEAR_THRESHOLD)
    # zero over zero is NaN: without a routed chunk there is nothing to say
    none = torch.where(num_routed_S > 0, 0.0, math.nan)
    entropy_S = torch.special.entr(p_Sc).sum(1) + none
    prior_Sc = bias_Sc.where(inside_Sc, 0)
    mean_S = prior_Sc.sum(1) / num_inside_S
    variance_S = ((prior_Sc - mean_S[:, None]).where(inside_Sc, 0)).square().sum(1) / num_inside_S
    values = {
        "entropy": entropy_S,
        "effective_chunks": entropy_S.exp(),
        "evenness": entropy_S / num_routed_S.log().where(num_routed_S > 1, math.nan),
        "prior_spread": variance_S.sqrt(),
        "near_threshold_chunks": near_Sc.sum(1) / num_inside_S,
        "near_threshold_mass": p_Sc.where(near_Sc, 0).sum(1) + none,
        "near_threshold_attention": attention_Sc.where(near_Sc, 0).sum(1) + none,
    }
    return values, _histogram(relative_Sc, inside_Sc)


def _histogram(relative_Sc: Tensor, inside_Sc: Tensor) -> Tensor:
    """Counts [S, bins] of the selected routed chunks by the logarithm of their relative probability."""
    inner = torch.tensor(WEIGHT_BINS[1:-1], device=relative_Sc.device)
    bin_Sc = torch.bucketize(relative_Sc.where(inside_Sc, 1).log10(), inner)
    counts = relative_Sc.new_zeros(len(relative_Sc), len(WEIGHT_BINS) - 1)
    return counts.scatter_add(1, bin_Sc, inside_Sc.float())


@torch.no_grad()
def sample_routing(
    q: Tensor,
    k: Tensor,
    summary_query: Tensor,
    router: Router,
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_queries: int = 256,
) -> RoutingSamples:
    """Measure how `dash_attention` routes at some queries, spread evenly over positions; always the same ones.

    Time grows with queries x tokens, memory with tokens. Probabilities are computed in float32 from what is given; kernels
    in half precision may differ on chunks within a rounding of the threshold.

    Args:
        q: queries after RoPE [B, N, Hq, D].
        k: keys after RoPE [B, N, Hkv, D].
        summary_query: [Hkv, D].
        router: as `dash_attention` was given it.
        routing_q, routing_k: the router's own queries and keys [B, N, Hkv, D], if it was given such.
        cu_seqlens: as `dash_attention` was given it.
        max_queries: how many, over all rows; as many in every bucket of positions that has as many. Where there are
            more buckets, one each.
    """
    with torch.autocast(q.device.type, enabled=False):
        row = Row.of(q, k, cu_seqlens, router, routing_q, routing_k)
        edges = _bucket_edges(q.shape[1] if cu_seqlens is None else len(row.q_NHGD), router.chunk_size)
        token_S, bucket_S, weight_S = _sample_tokens(row.position_N, edges, max_queries)
        parts = list(sample_blocks(row, token_S, row.grid.num_slots * row.q_NHGD.shape[2]))
        values: list[dict[str, Tensor]] = []
        weights = []
        for head in row.heads(summary_query, router):
            found = [_measure(head, block) for block in parts]
            values.append({name: torch.cat([part[name] for part, _ in found]) for name in MEASURES})
            total = weight_S @ torch.cat([counts for _, counts in found])
            weights.append(total / total.sum())
    return RoutingSamples(
        token=token_S,
        bucket=bucket_S,
        weight=weight_S,
        edges=edges,
        values={name: torch.stack([head[name] for head in values]) for name in MEASURES},
        weights=torch.stack(weights),
    )


class SelectionMap(NamedTuple):
    """Which chunks the queries of each chunk select, in one document."""

    share: Tensor
    """float32 [H, cells, cells]: of the pairs of a token in the row's chunks and an available chunk among the column's,
    how many are selected; NaN where none is available. Tokens' own chunks count as selected."""
    chunks_per_cell: int
    """Neighbouring chunks that share a row or column; 1 unless the document is long."""


@torch.no_grad()
def selection_map(
    q: Tensor,
    k: Tensor,
    summary_query: Tensor,
    router: Router,
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
    max_cells: int = 256,
    tokens_per_cell: int = 64,
) -> SelectionMap:
    """Draw up which chunks are selected; exact up to `max_cells` chunks of up to `tokens_per_cell` tokens.

    Longer documents are looked at through `tokens_per_cell` tokens a row, evenly spread. Arguments are those of
    `sample_routing`, with B == 1.
    """
    with torch.autocast(q.device.type, enabled=False):
        row = Row.of(q, k, None, router, routing_q, routing_k)
        (N, H, G, _), num_chunks = row.q_NHGD.shape, row.grid.num_chunks
        per_cell = -(-num_chunks // max_cells)
        cells, tokens_of_cell = -(-num_chunks // per_cell), per_cell * router.chunk_size
        starts = range(0, N, tokens_of_cell)
        sizes = [min(tokens_of_cell, N - start) for start in starts]
        token_S = torch.cat(
            [
                start + _spread(size, min(size, tokens_per_cell), q.device)
                for start, size in zip(starts, sizes, strict=True)
            ]
        )
        parts = list(sample_blocks(row, token_S, G))
        pairs = torch.zeros(H, 2, cells, cells, device=q.device)
        for head, counts in zip(row.heads(summary_query, router), pairs, strict=True):
            for block in parts:
                routed_Sc, always_Sc = block.places.masks(block.chunk_c, router.local_chunks)
                p_Sc = head.probabilities(block.token_S, routed_Sc, block.chunks)
                both = torch.stack([(p_Sc > 0) | always_Sc, routed_Sc | always_Sc]).float()
                padded = torch.nn.functional.pad(both, (0, cells * per_cell - block.end))
                by_cell = padded.unflatten(-1, (cells, per_cell)).sum(-1)
                counts.index_add_(1, block.places.chunk_T // per_cell, by_cell)
    return SelectionMap(share=pairs[:, 0] / pairs[:, 1], chunks_per_cell=per_cell)


@torch.no_grad()
def listed_share(
    q: Tensor,
    k: Tensor,
    summary_query: Tensor,
    router: Router,
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
    max_chunks: int = 64,
) -> dict[int, Tensor]:
    """Pairs that tiles of T neighbouring tokens visit over all pairs, past chunks only, local ones included: float32 [H] for every T.

    A kernel's tile visits a chunk if any of its tokens selected it, so that its work falls with density only as far as
    neighbours agree; T = 1 is what tokens select. Looks at all tokens of `max_chunks` chunks, evenly spread over the whole
    ones of one document (B == 1). T goes through the powers of two up to the chunk size.
    """
    with torch.autocast(q.device.type, enabled=False):
        row, C = Row.of(q, k, None, router, routing_q, routing_k), router.chunk_size
        N, H = row.q_NHGD.shape[:2]
        past = N // C - 1
        if past < 1:
            raise ValueError(f"q has {N} tokens and must have two chunks of {C}; give a longer document")
        chunks = (1 + _spread(past, min(past, max_chunks), q.device)).tolist()
        tiles = [1 << power for power in range(C.bit_length())]
        visited = {tile: torch.zeros(H, device=q.device) for tile in tiles}
        for number, head in enumerate(row.heads(summary_query, router)):
            for chunk in chunks:
                local_c = torch.arange(chunk, device=q.device) >= chunk - router.local_chunks
                routed_Sc = ~local_c.expand(C, -1)
                tokens = slice(chunk * C, (chunk + 1) * C)
                selected_Sc = (head.probabilities(tokens, routed_Sc, slice(0, chunk)) > 0) | local_c
                for tile, sums in visited.items():
                    sums[number] += tile * selected_Sc.unflatten(0, (-1, tile)).any(1).sum()
    return {tile: sums / (C * sum(chunks)) for tile, sums in visited.items()}
