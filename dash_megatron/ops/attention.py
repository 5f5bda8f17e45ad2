"""The public attention call: checks its arguments, picks a backend, and says what was selected."""

from typing import Literal, overload

from torch import Tensor

from dash_megatron.ops.backend import pick_backend
from dash_megatron.ops.checks import (
    check_cu_seqlens,
    check_flag,
    check_max_seqlen,
    check_own_router,
    check_router,
    check_tensors,
)
from dash_megatron.ops.chunk_grid import routing_of
from dash_megatron.ops.sequence_reference import dash_attention_reference
from dash_megatron.ops.types import Router, Routing


@overload
def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    chunk_size: int = ...,
    scaling_factor: float | Tensor = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
    return_routing: Literal[False] = ...,
    local_chunks: int = ...,
    query_pool: int = ...,
    pool_heads: bool = ...,
    max_seqlen: int | None = ...,
    routing_q: Tensor | None = ...,
    routing_k: Tensor | None = ...,
) -> Tensor: ...


@overload
def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    chunk_size: int = ...,
    scaling_factor: float | Tensor = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
    *,
    return_routing: Literal[True],
    local_chunks: int = ...,
    query_pool: int = ...,
    pool_heads: bool = ...,
    max_seqlen: int | None = ...,
    routing_q: Tensor | None = ...,
    routing_k: Tensor | None = ...,
) -> tuple[Tensor, Routing]: ...


def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    chunk_size: int = 64,
    scaling_factor: float | Tensor = 1.0,
    sigma: float = 2.0,
    estimate_diagonal: bool = True,
    alpha: float = 1.5,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_routing: bool = False,
    local_chunks: int = 0,
    query_pool: int = 1,
    pool_heads: bool = False,
    max_seqlen: int | None = None,
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Routing]:
    """Causal attention to the chunks that a differentiable, adaptive router selects (arXiv 2605.18753).

    Every token attends to its own chunk and to those past chunks of its document that alpha-entmax over chunk
    summaries gives any weight; the log of that weight is a prior on the attention scores, which is how the router
    learns. The heads of a group share their chunks.

    Gradients of the Triton kernels differ in the last bits from run to run, because atomics add up those of the summaries.
    After `torch.use_deterministic_algorithms(True)` every bit is the same in every run, and the backward is slower.

    Args:
        q: queries after RoPE, [B, N, Hq, D]; float16, bfloat16, float32 or float64.
        k: keys after RoPE, [B, N, Hkv, D], q's dtype; Hkv divides Hq.
        v: values, [B, N, Hkv, D], q's dtype.
        summary_query: [Hkv, D], the learned query that summarizes a chunk's keys; zero gives their mean. q's dtype,
            or float32 beside half precision.
        chunk_size: tokens per chunk, a power of two up to 128 (16 or more for Triton).
        scaling_factor: factor on the routing scores, above 0: larger routes more sparsely. A tensor [Hkv], of any
            floating dtype, has one for each key/value head, and gets a gradient. Its values are checked on CPU only.
        sigma: temperature of the prior, above 0; the router's gradient is bounded up to 2 and vanishes as it grows.
        estimate_diagonal: centre the log prior of past chunks around that of the own chunk; otherwise use it as it is,
            and sigma not at all.
        alpha: of the entmax, in (1, 2].
        cu_seqlens: boundaries of packed documents, int32 [documents + 1] from 0 to N, strictly increasing, then B == 1.
            Values are checked on CPU only, since reading them would stall a GPU.
        backend: "reference" (any device), "triton" (CUDA), or "auto": Triton on CUDA if importable, else the reference.
        return_routing: also return what the router selected.
        local_chunks: how many chunks just before its own one a token always attends to, with the prior of the own chunk.
            The router selects among the past chunks before them; they count as selected.
        query_pool: the router sees the mean of so many queries: of the token and of those just before it in its document.
            From 1 (the own query alone) to 128. Sums are in float32 or better and rounded to q's dtype.
        pool_heads: the router sees the mean of the queries of a group of heads, and takes one entmax for all of them.
        max_seqlen: tokens of the longest packed document, or a bound on them. The Triton kernels keep room for so many, and
            for documents as long as all tokens without it. Checked on CPU; a GPU stops the process where it is too small.
        routing_q: the router's own queries after RoPE, one a group, [B, N, Hkv, D], q's dtype; None: the router sees those of
            `q`. With `routing_k` and `pool_heads` only. Means of `query_pool` are of these.
        routing_k: the router's own keys after RoPE, [B, N, Hkv, D], of which summaries are made; None: summaries are of `k`.

    Returns:
        Output [B, N, Hq, D] in q's dtype, accumulated in float32 or better; with `return_routing`, also a `Routing`.

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    router = Router(
        chunk_size=chunk_size, scaling_factor=scaling_factor, sigma=sigma, estimate_diagonal=estimate_diagonal, alpha=alpha,
        local_chunks=local_chunks, query_pool=query_pool, pool_heads=pool_heads,
    )  # fmt: skip
    check_flag("return_routing", return_routing)
    rest = cu_seqlens, backend, max_seqlen, routing_q, routing_k
    out, chunks_selected = _attend(q, k, v, summary_query, router, *rest)
    return (out, routing_of(chunks_selected, chunk_size, cu_seqlens)) if return_routing else out


def attention_and_routing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    router: Router,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    max_seqlen: int | None = None,
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """What `dash_attention` returns with `return_routing`, for a router that is one value."""
    rest = cu_seqlens, backend, max_seqlen, routing_q, routing_k
    out, chunks_selected = _attend(q, k, v, summary_query, router, *rest)
    return out, routing_of(chunks_selected, router.chunk_size, cu_seqlens)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    router: Router,
    cu_seqlens: Tensor | None,
    backend: str,
    max_seqlen: int | None,
    routing_q: Tensor | None,
    routing_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, Hq, D] and chunks selected, int32 [B, N, Hkv]."""
    check_tensors(q, k, v, summary_query)
    check_router(router, k.shape[2], q.device)
    check_cu_seqlens(cu_seqlens, q)
    check_max_seqlen(max_seqlen, cu_seqlens)
    check_own_router(routing_q, routing_k, k, router.pool_heads)
    tensors = q, k, v, summary_query, router, cu_seqlens, routing_q, routing_k
    if pick_backend(backend, q, router.chunk_size) == "triton":
        from dash_megatron.ops.kernels.dash import dash_attention_triton

        return dash_attention_triton(*tensors, max_seqlen=max_seqlen)
    return dash_attention_reference(*tensors)
