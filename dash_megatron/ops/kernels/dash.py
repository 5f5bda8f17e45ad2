"""DashAttention on the GPU: torch.library ops around the Triton kernels, and the entry point.

Forward: summarize chunks, route query tiles to lists of chunks, attend over the lists. Backward: queries and log priors
over the same lists, then the router, then keys and values over the transposed lists, then the summaries.
Here and in the kernels `w` is the summary query.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.kernels.attend import attend_forward
from dash_megatron.ops.kernels.backward_kv import backward_kv
from dash_megatron.ops.kernels.backward_pairs import backward_pairs
from dash_megatron.ops.kernels.backward_q import backward_q, backward_router
from dash_megatron.ops.kernels.backward_summary import Summaries, sum_d_summary
from dash_megatron.ops.kernels.configs import Launches, find_launches
from dash_megatron.ops.kernels.geometry import (
    Lists,
    Sizes,
    check_supported,
    chunk_layout,
    measure,
)
from dash_megatron.ops.kernels.pool import pool_rows, positions
from dash_megatron.ops.kernels.route import route
from dash_megatron.ops.kernels.summarize import summarize, summarize_backward
from dash_megatron.ops.kernels.transpose import transpose
from dash_megatron.ops.types import Router


class Saved(NamedTuple):
    """What the backward needs besides the inputs and the output."""

    lse: Tensor
    tau: Tensor
    mean_log: Tensor
    summary: Tensor
    list_chunk: Tensor
    list_log_prior: Tensor
    list_offset: Tensor
    list_count: Tensor
    chunks: Tensor
    num_pairs: Tensor
    """int64 []: pairs of a token and a chunk in the lists."""


def _prepare(
    q: Tensor, k: Tensor, chunk_size: int, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Launches, Sizes]:
    launches = find_launches(q.device, q.dtype, q.shape[3], chunk_size, q.shape[2] // k.shape[2])
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return launches, measure(q, k, chunk_size, documents, launches.tile_rows, max_seqlen)


def _one_row(x: Tensor) -> Tensor:
    """[B, N, H, D] as [B * N, H, D] with dense D, a view where strides allow."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense_rows(x: Tensor) -> Tensor:
    """[B, N, H, D] as dense [B * N, H, D]: a model's values are often a strided slice of its fused projection."""
    return x.flatten(0, 1).contiguous()


def pooled_queries(
    rows_q: Tensor, batch: int, Hkv: int, router: Router, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The router's queries [rows, Hq, D], or [rows, Hkv, D] with `pool_heads`; and each row's position in its document, int32 [rows],
    where they are means over tokens, else None."""
    # means over heads first: they leave less to pool
    rows_q, position = router.group_means(rows_q, Hkv), None
    if router.query_pool > 1:
        position = positions(len(rows_q) // batch, batch, cu_seqlens, rows_q.device)
        rows_q = pool_rows(rows_q, position, router.query_pool)
    return rows_q, position


def add_router_gradient(dq: Tensor, router_dq: Tensor, position: Tensor | None, router: Router) -> Tensor:
    """Gradient of the queries [rows, Hq, D]: attention's `dq`, plus the part that came through the router.

    Args:
        dq: [rows, Hq, D].
        router_dq: gradient of what `pooled_queries` returned, of its shape.
        position: as `pooled_queries` returned it.
        router: its constants.
    """
    if position is not None:
        base = None if router.pool_heads else dq
        router_dq = pool_rows(router_dq, position, router.query_pool, transposed=True, base=base)
    if not router.pool_heads:
        return router_dq
    groups = dq.unflatten(1, (router_dq.shape[1], -1))
    return groups.add(router_dq[:, :, None], alpha=1 / groups.shape[2]).flatten(1, 2)


@torch.library.custom_op("dash_megatron::dash_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    head_scaling: Tensor | None,
    routing_q: Tensor | None,
    routing_k: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    chunk_size: int,
    scaling_factor: float,
    sigma: float,
    estimate_diagonal: bool,
    alpha: float,
    local_chunks: int,
    query_pool: int,
    pool_heads: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launches, sizes = _prepare(q, k, chunk_size, cu_seqlens, max_seqlen)
    router = Router(
        chunk_size=chunk_size, scaling_factor=scaling_factor, sigma=sigma, estimate_diagonal=estimate_diagonal, alpha=alpha,
        local_chunks=local_chunks, query_pool=query_pool, pool_heads=pool_heads,
    )  # fmt: skip
    chunks, offsets = chunk_layout(sizes, q.shape[0], cu_seqlens, q.device)
    rows_q, rows_k, rows_v, w = _one_row(q), _dense_rows(k), _dense_rows(v), w.contiguous()
    summary = summarize(rows_k if routing_k is None else _dense_rows(routing_k), w, chunks, sizes)
    router_rows = rows_q if routing_q is None else _one_row(routing_q)
    pooled_q, _ = pooled_queries(router_rows, q.shape[0], k.shape[2], router, cu_seqlens)
    lists, tau, mean_log, selected = route(
        pooled_q, summary, chunks, offsets, sizes.of_router(pool_heads), router, launches.route, head_scaling=head_scaling
    )  # fmt: skip
    # but for the own chunks, which are not listed
    num_pairs = selected.sum() - selected.numel()
    out, lse = attend_forward(
        rows_q, rows_k, rows_v, lists, mean_log, chunks, sizes, router.inv_sigma, launches.attend,
        by_pair=launches.attend_by_pair, num_pairs=num_pairs,
    )  # fmt: skip
    saved = Saved(lse, tau, mean_log, summary, *lists, chunks, num_pairs)
    return out.view(q.shape), selected.view(q.shape[0], q.shape[1], k.shape[2]), *saved


@_forward.register_fake
def _forward_fake(
    q, k, v, w, head_scaling, routing_q, routing_k, cu_seqlens, max_seqlen, chunk_size, scaling_factor, sigma, estimate_diagonal,
    alpha, local_chunks, query_pool, pool_heads, deterministic,
):  # fmt: skip
    _, sizes = _prepare(q, k, chunk_size, cu_seqlens, max_seqlen)
    B, N, Hq, D = q.shape
    Hkv, T = k.shape[2], sizes.tile_tokens
    room = sizes.list_bound if sizes.lists_are_bounded else torch.library.get_ctx().new_dynamic_size()
    selected = q.new_empty(B, N, Hkv, dtype=torch.int32)
    return (
        q.new_empty(q.shape),
        selected,
        *Saved(
            lse=q.new_empty(B * N, Hq, dtype=torch.float32),
            tau=q.new_empty(B * N, sizes.of_router(pool_heads).num_heads, dtype=torch.float32),
            mean_log=q.new_empty(B * N, Hkv, dtype=torch.float32),
            summary=k.new_empty(
                Hkv, sizes.num_chunks, D, dtype=torch.float32 if k.dtype == torch.float32 else torch.float16
            ),
            list_chunk=q.new_empty(room, dtype=torch.int32),
            list_log_prior=q.new_empty(room, T, dtype=torch.float32),
            list_offset=q.new_empty(sizes.num_tiles, dtype=torch.int64),
            list_count=q.new_empty(sizes.num_tiles, dtype=torch.int32),
            chunks=q.new_empty(3, sizes.num_chunks, dtype=torch.int32),
            num_pairs=q.new_empty((), dtype=torch.int64),
        ),
    )


@torch.library.custom_op("dash_megatron::dash_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    head_scaling: Tensor | None,
    routing_q: Tensor | None,
    routing_k: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    saved: Sequence[Tensor],  # as `Saved` has them
    max_seqlen: int | None,
    chunk_size: int,
    scaling_factor: float,
    sigma: float,
    estimate_diagonal: bool,
    alpha: float,
    local_chunks: int,
    query_pool: int,
    pool_heads: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launches, sizes = _prepare(q, k, chunk_size, cu_seqlens, max_seqlen)
    router = Router(
        chunk_size=chunk_size, scaling_factor=scaling_factor, sigma=sigma, estimate_diagonal=estimate_diagonal, alpha=alpha,
        local_chunks=local_chunks, query_pool=query_pool, pool_heads=pool_heads,
    )  # fmt: skip
    lse, tau, mean_log, summary, *listed, chunks, num_pairs = saved
    lists = Lists(*listed)
    rows_q, rows_k, rows_v, rows_w = _one_row(q), _dense_rows(k), _dense_rows(v), w.contiguous()
    rows_out, rows_d_out = out.flatten(0, 1).contiguous(), d_out.flatten(0, 1).contiguous()
    d_prior = torch.empty_like(lists.log_prior)
    dq, delta, centred_lse, left, slabs = backward_q(
        rows_q, rows_k, rows_v, rows_out, rows_d_out, lse, lists, mean_log, d_prior, chunks, sizes, router.inv_sigma,
        launches.queries, by_pair=launches.backward_by_pair, num_pairs=num_pairs,
    )  # fmt: skip
    key_sums = backward_pairs(
        rows_q, rows_k, rows_v, rows_d_out, lse, delta, dq, d_prior, lists, slabs, mean_log, chunks, sizes,
        router.inv_sigma,
    )  # fmt: skip
    # recomputed rather than kept
    router_rows = rows_q if routing_q is None else _one_row(routing_q)
    pooled_q, position = pooled_queries(router_rows, q.shape[0], k.shape[2], router, cu_seqlens)
    # the router adds to the gradient of attention where both saw the same queries
    router_dq = dq if pooled_q is rows_q else dq.new_zeros(pooled_q.shape)
    router_sizes = sizes.of_router(pool_heads)
    d_summary, mean_dp, d_log_factor = backward_router(
        pooled_q, summary, tau, router_dq, d_prior, lists, chunks, router_sizes, router, launches.router, deterministic,
        head_scaling,
    )  # fmt: skip
    if routing_q is not None and position is not None:
        router_dq = pool_rows(router_dq, position, router.query_pool, transposed=True)
    elif routing_q is None and pooled_q is not rows_q:
        dq = add_router_gradient(dq, router_dq, position, router)
    # the pass to keys and values knows one kind of queries only, and not which chunks are local
    apart = pooled_q is not rows_q or router.local_chunks > 0 or key_sums is not None
    summaries = None
    if deterministic and not apart:
        summaries = Summaries(tau, mean_dp, summary, d_prior, head_scaling, router)
    elif deterministic:
        d_summary = sum_d_summary(
            pooled_q, tau, mean_dp, summary, lists.log_prior, d_prior, transpose(lists, chunks, sizes), chunks[0],
            None, router_sizes, router, head_scaling,
        )  # fmt: skip
    summaries_of_keys = (rows_w, d_summary, summaries) if routing_k is None else ()
    dk, dv, dw = backward_kv(
        rows_q, rows_k, rows_v, rows_d_out, centred_lse, delta, mean_log, left, chunks, sizes, router.inv_sigma, launches,
        key_sums, *summaries_of_keys,
    )  # fmt: skip
    # an op returns tensors only
    d_scaling, d_routing_q, d_routing_k = (q.new_empty(0) for _ in range(3))
    if routing_q is not None and routing_k is not None:
        d_rows, dw = summarize_backward(d_summary, _dense_rows(routing_k), rows_w, chunks, sizes)
        d_routing_q, d_routing_k = router_dq.view(routing_q.shape), d_rows.view(routing_k.shape)
    if head_scaling is not None and d_log_factor is not None:
        d_scaling = (d_log_factor / head_scaling).to(head_scaling.dtype)
    dq, dk, dv = dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
    return dq, dk, dv, dw.to(w.dtype), d_scaling, d_routing_q, d_routing_k


@_backward.register_fake
def _backward_fake(d_out, q, k, v, w, head_scaling, routing_q, routing_k, *_):
    return tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (q, k, v, w, head_scaling, routing_q, routing_k)
    )


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, w, head_scaling, routing_q, routing_k, cu_seqlens, *ctx.settings = inputs
    out, selected, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(selected, *saved)
    ctx.save_for_backward(q, k, v, w, head_scaling, routing_q, routing_k, cu_seqlens, out, *saved)


def _autograd_backward(ctx, d_out, *_):
    num_settings = len(ctx.settings)
    if d_out is None:
        return (None,) * (8 + num_settings)
    # asked for once: where layers are recomputed, a second time is an error
    q, k, v, w, head_scaling, routing_q, routing_k, cu_seqlens, out, *saved = ctx.saved_tensors
    given = q, k, v, w, head_scaling, routing_q, routing_k
    found = zip(_backward(d_out, *given, cu_seqlens, out, saved, *ctx.settings), given, strict=True)
    return *(None if x is None else gradient for gradient, x in found), None, *(None,) * num_settings


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def dash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    router: Router,
    cu_seqlens: Tensor | None,
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
    deterministic: bool | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the chunks an entmax router selects, with its log probabilities as a prior (arXiv 2605.18753).

    Differentiable in all tensors; usable under torch.compile, activation checkpointing and, for lengths whose
    lists are bounded, CUDA graphs (see `Sizes.lists_are_bounded`). Arguments are those of `dash_attention`, which
    checks them.

    Args:
        q: queries after RoPE [B, N, Hq, D]; float16, bfloat16 or float32, accumulated in float32.
        k, v: keys after RoPE, and values [B, N, Hkv, D].
        summary_query: [Hkv, D].
        router: its chunk size is 16, 32, 64 or 128.
        cu_seqlens: [documents + 1] (then B == 1), or None for one document per batch row.
        routing_q, routing_k: [B, N, Hkv, D], or None both: the router's own queries and keys, beside `pool_heads`.
        deterministic: gradients are the same to the last bit in every run, at some cost in time; None asks
            `torch.are_deterministic_algorithms_enabled`.
        max_seqlen: tokens of the longest packed document, or a bound on them; None: all tokens. Lists get room for no more.

    Returns:
        Output [B, N, Hq, D] in q's dtype, and the number of chunks selected, the own one included, int32 [B, N, Hkv].
    """
    check_supported(q, k.shape[2])
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    head_scaling, numbers = router.split()
    tensors = q, k, v, summary_query, head_scaling, routing_q, routing_k, cu_seqlens
    out, selected, *_ = _forward(*tensors, max_seqlen, **numbers._asdict(), deterministic=deterministic)
    return out, selected
