"""Decoding: attention of one new token of every sequence against a cache."""

import torch
from torch import Tensor

from dash_megatron.ops.backend import pick_backend
from dash_megatron.ops.cache import DashCache
from dash_megatron.ops.checks import check_decode_query, check_router, check_routing_query
from dash_megatron.ops.types import Router


@torch.no_grad()
def dash_decode(
    q: Tensor,
    cache: DashCache,
    scaling_factor: float | Tensor = 1.0,
    sigma: float = 2.0,
    estimate_diagonal: bool = True,
    alpha: float = 1.5,
    backend: str = "auto",
    local_chunks: int = 0,
    query_pool: int = 1,
    pool_heads: bool = False,
    routing_q: Tensor | None = None,
) -> Tensor:
    """What `dash_attention` gives for the last token of every sequence in a cache, which has that token already.

    First `cache.append` the token's key and value (or `cache.prefill` a prompt), then call this with its query. With
    Triton nothing waits for the device, and grids depend on shapes alone: both calls can be captured in one CUDA graph
    and replayed as sequences grow. Has no gradient.

    Args:
        q: queries after RoPE, [B, Hq, D], the cache's dtype and device; the cache's Hkv divides Hq.
        cache: keys, values and summaries; its `chunk_size` is the model's.
        scaling_factor, sigma, estimate_diagonal, alpha, backend, local_chunks, query_pool,
            pool_heads: as in `dash_attention`.
        routing_q: where `query_pool` is above 1, the router's queries of the same tokens, [B, Hq, D] as q: what
            `cache.append` returned, or the last rows of what `cache.prefill` did. Of a router with its own projections,
            [B, Hkv, D], whatever `query_pool` is.

    Returns:
        Output [B, Hq, D] in q's dtype, accumulated in float32 or better: zero for an empty sequence, NaN (on a GPU) for one
        longer than `cache.capacity`.

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    if not isinstance(cache, DashCache):
        raise ValueError(f"cache={type(cache).__name__} must be a DashCache; see DashCache.contiguous")
    router = Router(
        chunk_size=cache.chunk_size, scaling_factor=scaling_factor, sigma=sigma, estimate_diagonal=estimate_diagonal, alpha=alpha,
        local_chunks=local_chunks, query_pool=query_pool, pool_heads=pool_heads,
    )  # fmt: skip
    return decode_and_count(q, cache, router, backend, routing_q)[0]


@torch.no_grad()
def decode_and_count(
    q: Tensor, cache: DashCache, router: Router, backend: str = "auto", routing_q: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `dash_decode` does, with the number of chunks selected.

    Args:
        q, cache, backend, routing_q: as in `dash_decode`.
        router: its chunk size is the cache's.

    Returns:
        Output as in `dash_decode`, and the chunks selected, the own one included, int32 [B, Hkv].
    """
    check_decode_query(q, cache.k, cache.batch)
    check_router(router, cache.k.shape[2], q.device)
    own = cache.routing_keys is not None
    check_routing_query(routing_q, q, cache.k.shape[2], router.query_pool, router.pool_heads, own)
    tensors = q, cache.k, cache.v, cache.summary, cache.lengths, cache.page_table
    if pick_backend(backend, q, cache.chunk_size) == "triton":
        from dash_megatron.ops.kernels.decode import decode

        head_scaling, numbers = router.split()
        return decode(*tensors, routing_q, head_scaling, **numbers._asdict())
    from dash_megatron.ops.decode_reference import decode_reference

    return decode_reference(*tensors, router, routing_q)
