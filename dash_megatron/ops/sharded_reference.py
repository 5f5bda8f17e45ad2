"""The stages of DashAttention under context parallelism in plain torch: queries and keys lie in different buffers.

The maths is that of `reference.py`, on chunks that are gathered from buffers. What is added: the log-sum-exp of a buffer's
scores, through which attention to several buffers is merged, and a backward of attention that starts from the merged one.

Letters: H key/value heads, G query heads per key/value head, n rows of q, m rows of k, c chunks of the whole sequence,
w of them in the window of a buffer, C slots per chunk.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops import reference
from dash_megatron.ops.reference import LOG2_E, MAX_BLOCK_SCORES, QueryPositions, attention_scores, upcast
from dash_megatron.ops.shards import (
    Attended,
    AttentionGradients,
    KeyBuffer,
    OutputGradient,
    QueryChunks,
    Routed,
    RoutedQueries,
    RouterGradients,
)
from dash_megatron.ops.types import Router


class State(NamedTuple):
    """`Routed.state`: what the router selected for every row of q."""

    bias: Tensor
    """[H, n, c]: log prior (natural), 0 at the own chunk and the local ones, -inf where not selected."""
    chunk: Tensor
    slot: Tensor
    first_chunk: Tensor
    """int64 [n] each: the `QueryPositions` of the rows."""

    @property
    def places(self) -> QueryPositions:
        """The last three fields as one value."""
        return QueryPositions(self.chunk, self.slot, self.first_chunk)


def _slots(k: Tensor, row: Tensor, length: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Rows of k [m, H, D] on the grid: [H, w, C, D], and which slots hold a token, [H, w, C]; `row`, `length` [H, w]."""
    slot_C = torch.arange(chunk_size, device=k.device)
    filled_HwC = slot_C < length[..., None]
    index_HwC = torch.where(filled_HwC, row[..., None] + slot_C, 0)
    head_H = torch.arange(k.shape[1], device=k.device)[:, None, None]
    return k[index_HwC, head_H] * filled_HwC[..., None], filled_HwC


def _add_slots(gradient_HwCD: Tensor, row: Tensor, length: Tensor, out: Tensor, chunk_size: int) -> None:
    """The reverse of `_slots`: add to the rows of `out` [m, H, D]."""
    slot_C = torch.arange(chunk_size, device=out.device)
    head_H, chunk_w, slot = torch.nonzero(slot_C < length[..., None], as_tuple=True)
    rows = row[head_H, chunk_w] + slot
    out.index_put_((rows, head_H), gradient_HwCD[head_H, chunk_w, slot], accumulate=True)


def _summarize(k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int) -> Tensor:
    row, length = (x.expand(k.shape[1], -1) for x in (chunks.start, chunks.end - chunks.start))
    return reference.summarize(*_slots(k, row, length, chunk_size), w)


def summarize(k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int) -> Tensor:
    """As `Stages.summarize`, in k's dtype but at least float32."""
    k, w = upcast(k, w)
    return _summarize(k, w, chunks, chunk_size)


def summarize_backward(
    d_summary: Tensor, k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `Stages.summarize_backward`."""
    dtype = k.dtype
    with torch.enable_grad():
        k, w = (x.detach().requires_grad_() for x in upcast(k, w))
        dk, dw = torch.autograd.grad(_summarize(k, w, chunks, chunk_size), (k, w), d_summary.to(k.dtype))
    if more is not None:
        dk = more.sum(0, dtype=dk.dtype) + dk
    return dk.to(dtype), dw


def _by_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """Rows [n, Hq, ...] as [H, G, n, ...]."""
    return x.unflatten(1, (num_kv_heads, -1)).movedim(0, 2)


def _by_row(x_HGT: Tensor) -> Tensor:
    """[H, G, T, ...] as rows [T, Hq, ...]."""
    return x_HGT.movedim(2, 0).flatten(1, 2)


def _places(queries: QueryChunks, num_rows: int) -> QueryPositions:
    """Where the rows of a rank stand."""
    length = (queries.end - queries.start).long()
    chunk, first, start = (
        x.long().repeat_interleave(length) for x in (queries.number, queries.first, queries.start)
    )
    assert len(chunk) == num_rows, "every row of q lies in a chunk"
    return QueryPositions(chunk, torch.arange(num_rows, device=chunk.device) - start, first)


def _route(q: Tensor, summary: Tensor, places: QueryPositions, router: Router) -> tuple[Tensor, Tensor]:
    """Log prior [H, n, c] and number of chunks selected [H, n]."""
    number_c = torch.arange(summary.shape[1], device=q.device)
    masks = places.masks(number_c, router.local_chunks)
    return reference.route(_by_head(q, len(summary)), summary, *masks, router, scale=q.shape[2] ** -0.5)


def route(
    q: Tensor, summary: Tensor, chunks: QueryChunks, router: Router, pooled_q: Tensor | None = None
) -> Routed:
    """As `Stages.route`."""
    places = _places(chunks, len(q))
    q, summary = upcast(q if pooled_q is None else pooled_q, summary)
    bias, selected = _route(q, summary, places, router)
    return Routed(selected.mT.contiguous(), State(bias, *places))


def listed(routed: Routed, num_chunks: int) -> Tensor:
    """As `Stages.listed`."""
    state = State(*routed.state)
    own = state.places.own(torch.arange(num_chunks, device=state.bias.device))
    return ((state.bias > -math.inf) & ~own).any(1)


def route_backward(d_prior: Tensor, queries: RoutedQueries, summary: Tensor) -> RouterGradients:
    """As `Stages.route_backward`."""
    places, router = State(*queries.routed.state).places, queries.router
    factors = [router.scaling_factor] if isinstance(router.scaling_factor, Tensor) else []
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in upcast(queries.routing_q, summary, *factors)]
        q, summary, *factors = leaves
        if factors:
            router = router._replace(scaling_factor=factors[0])
        bias, _ = _route(q, summary, places, router)
        dq, d_summary, *d_factors = torch.autograd.grad(bias, leaves, d_prior)
    return RouterGradients(dq, d_summary, d_factors[0] if d_factors else None)


class _ShardBlock(NamedTuple):
    """Some of the queries, and the chunks of a buffer that they attend to."""

    rows: slice
    number_w: Tensor
    """Numbers of the chunks."""
    row: Tensor
    """[H, w]: first row of each chunk in the buffer."""
    length: Tensor
    """[H, w]: its rows."""
    q_HGTD: Tensor
    """Queries divided by sqrt(D)."""
    scores: Tensor
    """[H, G, T, w * C]: attention scores, -inf where a query does not attend."""
    k_HSD: Tensor
    """Keys [H, w * C, D]."""


def _blocks(q: Tensor, k: Tensor, state: State, keys: KeyBuffer, chunk_size: int) -> Iterator[_ShardBlock]:
    """Cut the queries into blocks; those that attend to nothing in the buffer are skipped."""
    (n, Hq, D), H = q.shape, keys.row.shape[0]
    held_c = keys.length.amax(0) > 0
    held_c[: keys.first] = held_c[keys.last :] = False
    size = max(16, MAX_BLOCK_SCORES // max(1, Hq * int(held_c.sum()) * chunk_size))
    for start in range(0, n, size):
        rows = slice(start, start + size)
        bias_HTc = state.bias[:, rows]
        number_w = torch.nonzero((bias_HTc > -math.inf).any(1).any(0) & held_c).flatten()
        if not len(number_w):
            continue
        row, length = keys.row[:, number_w], keys.length[:, number_w]
        q_HGTD = _by_head(q[rows], H) * D**-0.5
        k_HwCD, filled_HwC = _slots(k, row, length, chunk_size)
        places = QueryPositions(*(x[rows] for x in state.places))
        hidden_HTwC = places.hidden(number_w, chunk_size) | ~filled_HwC[:, None]
        # the heads of a group as a batch, each of which has a group of one
        bias_H1Tw, hidden_H11TwC = bias_HTc[:, None, :, number_w], hidden_HTwC[:, None, None]
        scores = attention_scores(q_HGTD[:, :, None], k_HwCD[:, None], bias_H1Tw, hidden_H11TwC)
        yield _ShardBlock(
            rows, number_w, row, length, q_HGTD, scores[:, :, 0].flatten(-2), k_HwCD.flatten(1, 2)
        )


def attend(queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer) -> Attended:
    """As `Stages.attend`; the log-sum-exp is float64."""
    q, k, v = upcast(queries.q, k, v)
    state, chunk_size = State(*queries.routed.state), queries.router.chunk_size
    out = torch.zeros_like(q)
    # rounded to float32, a large log-sum-exp would scale all weights of its row
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=q.device)
    for block in _blocks(q, k, state, keys, chunk_size):
        v_HSD = _slots(v, block.row, block.length, chunk_size)[0].flatten(1, 2)
        part = block.scores.logsumexp(-1)
        weights = (block.scores - part.clamp_min(torch.finfo(q.dtype).min)[..., None]).exp()
        out[block.rows] = _by_row(weights @ v_HSD[:, None])
        lse[block.rows] = _by_row(part.double()) * LOG2_E
    return Attended(out, lse)


def new_d_prior(routed: Routed) -> Tensor:
    """As `Stages.new_d_prior`: zeros [H, n, c]."""
    return torch.zeros_like(State(*routed.state).bias)


def attend_backward(
    gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer
) -> AttentionGradients:
    """As `Stages.attend_backward`."""
    lse = gradient.merged.lse
    d_out, q, k, v, out = upcast(gradient.d_out, queries.q, k, v, gradient.merged.out)
    state, chunk_size = State(*queries.routed.state), queries.router.chunk_size
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    D, H = q.shape[2], k.shape[1]
    delta = (d_out.double() * out).sum(-1).to(q.dtype)
    for block in _blocks(q, k, state, keys, chunk_size):
        v_HSD = _slots(v, block.row, block.length, chunk_size)[0].flatten(1, 2)
        lse_HGT, delta_HGT, d_out_HGTD = (_by_head(x[block.rows], H) for x in (lse / LOG2_E, delta, d_out))
        weights = (block.scores - lse_HGT[..., None]).exp().to(q.dtype)
        d_scores = weights * (d_out_HGTD @ v_HSD[:, None].mT - delta_HGT[..., None])
        dq[block.rows] = _by_row(d_scores @ block.k_HSD[:, None]) * D**-0.5
        for x_HSD, out in (((d_scores.mT @ block.q_HGTD).sum(1), dk), ((weights.mT @ d_out_HGTD).sum(1), dv)):
            x_HwCD = x_HSD.unflatten(1, (-1, chunk_size))
            _add_slots(x_HwCD, block.row, block.length, out, chunk_size)
        d_bias_HTw = d_scores.unflatten(-1, (-1, chunk_size)).sum((1, -1))
        gradient.d_prior[:, block.rows][..., block.number_w] += d_bias_HTw
    return AttentionGradients(dq, dk, dv)
