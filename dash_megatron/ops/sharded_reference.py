"""The stages of DashAttention in plain torch, for queries and keys that lie in different buffers.

What `kernels/sharded.py` computes on the GPU, by the same names: summarize chunks, route this rank's queries over the
summaries of the whole sequence, attend to the chunks that a buffer holds, and the backward of each. Calls of `attend`
on buffers with different chunks are merged through their log-sum-exp.

Letters: H key/value heads, G query heads per key/value head, n rows of q, m rows of k, c chunks of the whole sequence,
w of them in the window of a buffer, C slots per chunk.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.entmax import entmax
from dash_megatron.ops.reference import LOG2_E, MAX_BLOCK_SCORES, _log_prior, wide
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
    """[H, n, c]: log prior (natural), 0 at the own chunk, -inf where not selected."""
    chunk: Tensor
    """int64 [n]: number of the row's own chunk."""
    slot: Tensor
    """int64 [n]: place of the row in its chunk."""


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


def _summary(k: Tensor, w: Tensor, start: Tensor, end: Tensor, chunk_size: int) -> Tensor:
    row, length = (x.expand(k.shape[1], -1) for x in (start, end - start))
    k_HcCD, filled_HcC = _slots(k, row, length, chunk_size)
    score_HcC = torch.einsum("hctd,hd->hct", k_HcCD, w * k.shape[2] ** -0.5)
    # an empty chunk has equal weights of zero keys
    score_HcC = torch.where(filled_HcC, score_HcC, torch.finfo(k.dtype).min)
    return torch.einsum("hct,hctd->hcd", score_HcC.softmax(-1), k_HcCD)


def summarize(k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int) -> Tensor:
    """As `Stages.summarize`, in k's dtype but at least float32."""
    k, w = wide(k, w)
    return _summary(k, w, chunks.start, chunks.end, chunk_size)


def summarize_backward(
    d_summary: Tensor, k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """As `Stages.summarize_backward`."""
    with torch.enable_grad():
        k, w = (x.detach().requires_grad_() for x in wide(k, w))
        dk, dw = torch.autograd.grad(
            _summary(k, w, chunks.start, chunks.end, chunk_size), (k, w), d_summary.to(k.dtype)
        )
    return dk, dw


def _route(q: Tensor, summary: Tensor, chunk: Tensor, first: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Log prior [H, n, c] and number of chunks selected [H, n]."""
    (n, Hq, D), (H, c, _) = q.shape, summary.shape
    rows_HRD = q.view(n, H, Hq // H, D).permute(1, 2, 0, 3).reshape(H, -1, D)
    factor = router.score_factors(chunk - first, H, q.dtype) * D**-0.5
    if isinstance(factor, Tensor):
        factor = factor[:, None, :, None]
    z_HGnc = (rows_HRD @ summary.mT).view(H, -1, n, c) * factor
    number_c = torch.arange(c, device=q.device)
    past_nc = (number_c >= first[:, None]) & (number_c < chunk[:, None])
    p_HGnc = entmax(z_HGnc.masked_fill(~past_nc, -math.inf), router.alpha)
    bias_1Hnc, selected_1Hn = _log_prior(p_HGnc.mean(1)[None], number_c == chunk[:, None], router)
    return bias_1Hnc[0], selected_1Hn[0]


def _places(queries: QueryChunks, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Own chunk, slot and first chunk of the document, int64 [n] each, of every row."""
    length = (queries.end - queries.start).long()
    chunk, first, start = (
        x.long().repeat_interleave(length) for x in (queries.number, queries.first, queries.start)
    )
    assert len(chunk) == num_rows, "every row of q lies in a chunk"
    return chunk, torch.arange(num_rows, device=chunk.device) - start, first


def _with_heads(router: Router, head_scaling: Tensor | None) -> Router:
    if head_scaling is None:
        return router
    return router._replace(scaling_factor=router.scaling_factor * head_scaling)


def route(
    q: Tensor, summary: Tensor, chunks: QueryChunks, router: Router, head_scaling: Tensor | None = None
) -> Routed:
    """As `Stages.route`."""
    chunk, slot, first = _places(chunks, len(q))
    router = _with_heads(router, head_scaling)
    q, summary = wide(q, summary)
    bias, selected = _route(q, summary, chunk, first, router)
    return Routed(selected.mT.contiguous(), State(bias, chunk, slot))


def listed(routed: Routed, num_chunks: int) -> Tensor:
    """As `Stages.listed`."""
    state = State(*routed.state)
    own = torch.arange(num_chunks, device=state.bias.device) == state.chunk[:, None]
    return ((state.bias > -math.inf) & ~own).any(1)


def route_backward(
    d_prior: Tensor, queries: RoutedQueries, summary: Tensor, head_scaling: Tensor | None = None
) -> RouterGradients:
    """As `Stages.route_backward`."""
    q, router = queries.q, queries.router
    chunk, _, first = _places(queries.chunks, len(q))
    with torch.enable_grad():
        given = (q, summary) if head_scaling is None else (q, summary, head_scaling)
        q, summary, *heads = leaves = [x.detach().requires_grad_() for x in wide(*given)]
        bias, _ = _route(q, summary, chunk, first, _with_heads(router, heads[0] if heads else None))
        dq, d_summary, *d_heads = torch.autograd.grad(bias, leaves, d_prior)
    return RouterGradients(dq, d_summary, d_heads[0] if d_heads else None)


def _blocks(
    q: Tensor, state: State, keys: KeyBuffer, chunk_size: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Cut the queries into blocks: rows, chunks that the block needs, and what scores are made of.

    Yields the rows as a slice, the chunk numbers [w], q [H, G, T, D] scaled, and the bias [H, 1, T, w, C], which is
    -inf for slots that a row may not see.
    """
    (n, Hq, D), H = q.shape, keys.row.shape[0]
    held_c = keys.length.amax(0) > 0
    held_c[: keys.first] = held_c[keys.last :] = False
    size = max(16, MAX_BLOCK_SCORES // max(1, Hq * int(held_c.sum()) * chunk_size))
    slot_C = torch.arange(chunk_size, device=q.device)
    for start in range(0, n, size):
        rows = slice(start, start + size)
        bias_HTc = state.bias[:, rows]
        number_w = torch.nonzero((bias_HTc > -math.inf).any(1).any(0) & held_c).flatten()
        if not len(number_w):
            continue
        late_TwC = (number_w == state.chunk[rows, None])[..., None] & (slot_C > state.slot[rows, None, None])
        hidden_HTwC = (slot_C >= keys.length[:, number_w, None])[:, None] | late_TwC
        bias_HTwC = bias_HTc[:, :, number_w, None].masked_fill(hidden_HTwC, -math.inf)
        q_HGTD = q[rows].view(-1, H, Hq // H, D).permute(1, 2, 0, 3) * D**-0.5
        yield rows, number_w, q_HGTD, bias_HTwC[:, None]


def attend(queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer) -> Attended:
    """As `Stages.attend`; the log-sum-exp is float64."""
    q, k, v = wide(queries.q, k, v)
    state, chunk_size = State(*queries.routed.state), queries.router.chunk_size
    out = torch.zeros_like(q)
    # rounded to float32, a large log-sum-exp would scale all weights of its row
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=q.device)
    for rows, number, q_HGTD, bias_HGTwC in _blocks(q, state, keys, chunk_size):
        row, length = keys.row[:, number], keys.length[:, number]
        (k_HSD, v_HSD) = (_slots(x, row, length, chunk_size)[0].flatten(1, 2) for x in (k, v))
        scores = q_HGTD @ k_HSD[:, None].mT + bias_HGTwC.flatten(-2)
        part = scores.logsumexp(-1)
        weights = (scores - part.clamp_min(torch.finfo(q.dtype).min)[..., None]).exp()
        out[rows] = (weights @ v_HSD[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
        lse[rows] = part.double().permute(2, 0, 1).flatten(1) * LOG2_E
    return Attended(out, lse)


def new_d_prior(routed: Routed) -> Tensor:
    """As `Stages.new_d_prior`: zeros [H, n, c]."""
    return torch.zeros_like(State(*routed.state).bias)


def attend_backward(
    gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer
) -> AttentionGradients:
    """As `Stages.attend_backward`."""
    lse = gradient.merged.lse
    d_out, q, k, v, out = wide(gradient.d_out, queries.q, k, v, gradient.merged.out)
    state, chunk_size = State(*queries.routed.state), queries.router.chunk_size
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    (_, Hq, D), H = q.shape, k.shape[1]
    delta = (d_out.double() * out).sum(-1).to(q.dtype)
    for rows, number, q_HGTD, bias_HGTwC in _blocks(q, state, keys, chunk_size):
        row, length = keys.row[:, number], keys.length[:, number]
        (k_HSD, v_HSD) = (_slots(x, row, length, chunk_size)[0].flatten(1, 2) for x in (k, v))
        lse_HGT, delta_HGT = (x[rows].view(-1, H, Hq // H).permute(1, 2, 0) for x in (lse / LOG2_E, delta))
        d_out_HGTD = d_out[rows].view(-1, H, Hq // H, D).permute(1, 2, 0, 3)
        weights = (q_HGTD @ k_HSD[:, None].mT + bias_HGTwC.flatten(-2) - lse_HGT[..., None]).exp().to(q.dtype)
        d_scores = weights * (d_out_HGTD @ v_HSD[:, None].mT - delta_HGT[..., None])
        dq[rows] = (d_scores @ k_HSD[:, None]).permute(2, 0, 1, 3).flatten(1, 2) * D**-0.5
        shape = (H, len(number), chunk_size, D)
        _add_slots((d_scores.mT @ q_HGTD).sum(1).view(shape), row, length, dk, chunk_size)
        _add_slots((weights.mT @ d_out_HGTD).sum(1).view(shape), row, length, dv, chunk_size)
        d_bias_HTw = d_scores.unflatten(-1, (-1, chunk_size)).sum((1, -1))
        gradient.d_prior[:, rows][..., number] += d_bias_HTw
    return AttentionGradients(dq, dk, dv)
