"""Context-parallel DashAttention: attention of one rank's rows of a sequence that several ranks share.

`sharded_dash_attention` is what a layer calls. All ranks summarize their chunks, gather all summaries (1 / chunk_size of the
keys) and route their own queries, whose means may need some of other ranks (`query_halo.py`). A `ContextExchange`
(`exchange.py`) then attends. `_ShardedDash.forward` reads like these sentences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dash_megatron.ops.sharded import stages
from dash_megatron.ops.shards import Attended, OutputGradient, Routed, RoutedQueries
from dash_megatron.ops.types import Router
from dash_megatron.parallel.context.communication import (
    ContextGroup,
    PendingTensor,
    move_rows,
    rounded_sum,
    sum_of_shares,
)
from dash_megatron.parallel.context.exchange import EXCHANGES, ContextExchange
from dash_megatron.parallel.context.layout import ChunkLayout
from dash_megatron.parallel.context.query_halo import routing_queries


class _GroupMeans(torch.autograd.Function):
    """`Router.group_means`, whose gradient is rounded to the inputs' dtype before it is repeated for every head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, num_kv_heads: int, router: Router) -> Tensor:
        ctx.router, ctx.num_heads = router, q.shape[1]
        return router.group_means(q, num_kv_heads)

    @staticmethod
    def backward(ctx: Any, d_means: Tensor) -> tuple[Tensor, None, None]:
        return ctx.router.group_means_backward(d_means, ctx.num_heads), None, None


class _ShardedDash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        pooled_q: Tensor | None,
        k: Tensor,
        v: Tensor,
        routing_k: Tensor | None,
        w: Tensor,
        factors: Tensor | None,
        router: Router,
        exchange: ContextExchange,
    ) -> tuple[Tensor, Tensor]:
        stages, layout, group = exchange.stages, exchange.layout, exchange.group
        if factors is not None:
            router = router._replace(scaling_factor=factors)
        with group.counting("forward"):
            summarized = k if routing_k is None else routing_k
            own_summary = stages.summarize(summarized, w, layout.queries, router.chunk_size)
            pending = _send_summaries(own_summary, layout, group)
            # after the summaries, which the router waits for
            exchange.start(k, v)
            summary = _all_summaries(pending, layout)
            routed = stages.route(q, summary, layout.queries, router, pooled_q)
            attended = exchange.attend(RoutedQueries(q, layout.queries, router, routed, pooled_q), k, v)
        out = attended.out.to(q.dtype)
        # nothing of size stays on ctx itself, where activation checkpointing would not find it
        saved = q, pooled_q, k, v, routing_k, w, factors, out, attended.lse, summary
        ctx.save_for_backward(*saved, routed.selected, *routed.state)
        ctx.router, ctx.exchange = router, exchange
        ctx.mark_non_differentiable(routed.selected)
        return out, routed.selected

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
        q, pooled_q, k, v, routing_k, w, factors, out, lse, summary, selected, *state = ctx.saved_tensors
        exchange: ContextExchange = ctx.exchange
        router: Router = ctx.router
        if factors is not None:
            router = router._replace(scaling_factor=factors)
        stages, layout, group = exchange.stages, exchange.layout, exchange.group
        queries = RoutedQueries(q, layout.queries, router, Routed(selected, tuple(state)), pooled_q)
        with group.counting("backward"):
            d_prior = stages.new_d_prior(queries.routed)
            gradient = OutputGradient(d_out.contiguous(), Attended(out, lse), d_prior)
            attended = exchange.attend_backward(gradient, queries, k, v)
            # while gradients of keys and values travel
            routed = stages.route_backward(d_prior, queries, summary)
            d_summary = _send_back_summaries(routed.summary, layout, group)
            shares_k, shares_v = attended.keys()
            d_own = sum_of_shares(d_summary)[:, : len(layout.queries.start)]
            summarized, more = (k, shares_k) if routing_k is None else (routing_k, None)
            dk, dw = stages.summarize_backward(d_own, summarized, w, layout.queries, router.chunk_size, more)
        dq = attended.q + routed.q if pooled_q is None else attended.q
        d_pooled = None if pooled_q is None else routed.q.to(q.dtype)
        d_routing_k = None if routing_k is None else dk
        gradients = dq, dk if routing_k is None else rounded_sum(shares_k), rounded_sum(shares_v), dw
        dq, dk, dv, dw = (g.to(x.dtype) for g, x in zip(gradients, (q, k, v, w), strict=True))
        d_factors = None if routed.scaling_factor is None else routed.scaling_factor.to(factors.dtype)
        return dq, d_pooled, dk, dv, d_routing_k, dw, d_factors, None, None


class BackwardStart:
    """Begins what attention's backward waits for, as soon as a gradient reaches what was computed from its output."""

    _of: tuple[ContextExchange, Tensor, Tensor] | None = None

    def prepare(self, exchange: ContextExchange, k: Tensor, v: Tensor) -> None:
        """Of one call of attention."""
        self._of = exchange, k.detach(), v.detach()

    def watch(self, x: Tensor) -> Tensor:
        """The same tensor, whose gradient is that sign."""
        of, self._of = self._of, None
        return x if of is None else _Watched.apply(x, *of)


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: ContextExchange, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        ctx.exchange = exchange
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        exchange: ContextExchange = ctx.exchange
        with exchange.group.counting("backward"):
            exchange.start(*ctx.saved_tensors)
        return gradient, None, None, None


def sharded_dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    router: Router,
    layout: ChunkLayout,
    group: ContextGroup,
    *,
    exchange: str,
    backend: str = "auto",
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
    start: BackwardStart | None = None,
) -> tuple[Tensor, Tensor]:
    """DashAttention of this rank's rows of a packed sequence, differentiable; collective.

    Args:
        q: [N / P, Hq, D], in the order of `ContextShard.token`.
        k, v: [N / P, Hkv, D].
        w: summary query [Hkv, D]; its gradient is this rank's part.
        router: its constants; a scaling factor that is a tensor gets this rank's part of its gradient.
        layout: where the chunks of the sequence lie.
        group: the ranks that share the sequence.
        exchange: "all_gather", "p2p" or "sparse".
        backend: as in `dash_attention`.
        routing_q, routing_k: [N / P, Hkv, D], or None both: the router's own queries and keys, beside `pool_heads`.
        start: what will begin the backward early.

    Returns:
        Output [N / P, Hq, D] in q's dtype, and the number of chunks selected, the own one included, int32 [n, Hkv], of
        the n aligned rows.
    """
    aligned = layout.alignment
    if aligned is not None:
        q, k, v = (move_rows(x, aligned.to_chunks, aligned.to_rows, group) for x in (q, k, v))
        routing_q, routing_k = (
            None if x is None else move_rows(x, aligned.to_chunks, aligned.to_rows, group)
            for x in (routing_q, routing_k)
        )
    keys = EXCHANGES[exchange](stages(backend, q), layout, group)
    pooled_q = routing_q
    if router.query_pool > 1:
        assert layout.halo is not None, "the layout is of this router"
        # means over heads first: they leave less to pool
        given = _GroupMeans.apply(q, k.shape[1], router) if routing_q is None else routing_q
        pooled_q = routing_queries(given, router.query_pool, layout.halo, group, backend)
    if routing_k is not None:
        routing_k = routing_k.contiguous()
    rows = q, pooled_q, k.contiguous(), v.contiguous(), routing_k
    factors, router = router.split()
    out, selected = _ShardedDash.apply(*rows, w, factors, router, keys)
    if start is not None:
        start.prepare(keys, rows[2], rows[3])
    if aligned is not None:
        out = move_rows(out, aligned.to_rows, aligned.to_chunks, group)
    return out, selected


def _send_summaries(summary: Tensor, layout: ChunkLayout, group: ContextGroup) -> PendingTensor:
    """Begin to gather this rank's summaries [Hkv, own chunks, D] with everybody's."""
    H, c, D = summary.shape
    padded = summary.new_zeros(H, layout.places.max_chunks, D)
    padded[:, :c] = summary
    return group.all_gather(padded)


def _all_summaries(pending: PendingTensor, layout: ChunkLayout) -> Tensor:
    """Summaries of all chunks [Hkv, chunks, D]."""
    places = layout.places
    return pending.wait()[places.owner, :, places.local].transpose(0, 1).contiguous()


def _send_back_summaries(d_summary: Tensor, layout: ChunkLayout, group: ContextGroup) -> PendingTensor:
    """Begin to send gradients [Hkv, chunks, D] of summaries to the ranks that made them; `sum_of_shares` adds them up."""
    places = layout.places
    H, _, D = d_summary.shape
    shares = d_summary.new_zeros(group.size, H, places.max_chunks, D)
    shares[places.owner, :, places.local] = d_summary.transpose(0, 1)
    return group.send_shares(shares)
