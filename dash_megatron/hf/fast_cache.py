"""The package's kernels under the exported model file: prompts, a cache for decoding, and attention against it.

Letters and columns are those of `fast_layer.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from dash_megatron.hf.fast_layer import FastLayer, pack, tokens_of
from dash_megatron.ops import dash_attention
from dash_megatron.ops.backend import TRITON_CHUNK_SIZES, pick_backend


def _kernels_run(backend: str, q: Tensor, k: Tensor, chunk_size: int) -> bool:
    if backend == "auto":
        return q.is_cuda and pick_backend(backend, q) == "triton" and _kernels_take(q, k, chunk_size)
    return backend != "torch"


def _kernels_take(q: Tensor, k: Tensor, chunk_size: int) -> bool:
    """Whether the Triton kernels take queries and keys [B, heads, T, D] of such a shape."""
    from dash_megatron.ops.kernels.geometry import check_supported

    try:
        check_supported(q.transpose(1, 2), k.shape[1])
    except ValueError:
        return False
    return chunk_size in TRITON_CHUNK_SIZES


def _padded(newest: Tensor | None, like: Tensor, columns: int) -> Tensor:
    """What is known of the newest columns [B, heads, t, D] with zeros for those before, [B, heads, columns, D]."""
    out = like.new_zeros(*like.shape[:2], columns, like.shape[3])
    if newest is not None and newest.shape[2]:
        out[:, :, -newest.shape[2] :] = newest
    return out


def fast_layer(
    cache: Cache, index: int, chunk_size: int, query_pool: int, q: Tensor, *places: Any, own: bool = False
) -> FastLayer:
    """The cache's layer, which a layer of the model file is replaced by; `places` as in `FastLayer.write`.

    q has the dtype and the heads of the queries [B, Hq, T, D] that come next: of the router, if it has its `own`.
    """
    plain: Any = cache.layers[index]
    if isinstance(plain, FastLayer):
        return plain
    layer = FastLayer(plain, chunk_size, query_pool, q.shape[1], own)
    columns = int(plain.get_seq_length())
    if columns:
        keys, values = plain.keys[:, :, :columns], plain.values[:, :, :columns]
        # of columns before those whose queries and keys are known, no router sees any
        newest: dict[str, Any] = {ring: getattr(plain, ring, None) for ring in layer.rings}
        past_q = _padded(newest.get("queries"), q, columns)
        past_k = [_padded(newest["routing_keys"], keys, columns)] if own else []
        layer.write(keys, values, past_q, *places, *past_k)
        layer.known = {ring: 0 if x is None else x.shape[2] for ring, x in newest.items()}
        if own:
            most = torch.finfo(layer.store.summary.dtype).max
            summary = plain.summary.transpose(1, 2).clamp(-most, most)
            layer.store.summary[:, : summary.shape[1]] = summary
    plain.keys = plain.values = None
    plain.is_initialized = False
    plain.reset()
    cache.layers[index] = layer
    return layer


def _attend_prompt(
    q: Tensor, k: Tensor, v: Tensor, own: list[Tensor], summary_query: Tensor, start: Tensor, latest_start: int,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Attention among all columns [B, heads, T, D], each row a document from its first token on; zero for padding."""
    names = "routing_q", "routing_k"
    if latest_start == 0:
        q, k, v, *own = (x.transpose(1, 2) for x in (q, k, v, *own))
        options |= zip(names, own, strict=False)
        return dash_attention(q, k, v, summary_query, **options).transpose(1, 2)
    T = q.shape[2]
    real = tokens_of(start, 0, T)
    bounds = F.pad((T - start).cumsum(0), (1, 0)).int()
    q_1nHD, k_1nHD, v_1nHD, *own = (pack(x, real)[None] for x in (q, k, v, *own))
    options |= zip(names, own, strict=False)
    out = torch.zeros_like(q.transpose(1, 2))
    out[real] = dash_attention(q_1nHD, k_1nHD, v_1nHD, summary_query, cu_seqlens=bounds, **options)[0]
    return out.transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, summary_query: Tensor, start: Tensor, latest_start: int,
    cache: Cache | None, index: int, backend: str, chunk_size: int, query_pool: int = 1,
    routing_q: Tensor | None = None, routing_k: Tensor | None = None, **router: Any,
) -> Tensor | None:  # fmt: skip
    """DashAttention of new columns to themselves and what a cache holds, which they are added to.

    Decoding never waits for the device.

    Args:
        q: queries after RoPE, [B, Hq, T, D].
        k: keys after RoPE, [B, H, T, D].
        v: values, the same.
        summary_query: [H, D].
        start: column of each row's first token, int64 [B].
        latest_start: the last of them.
        cache: its layer `index` is one of the model file's or a `FastLayer`.
        backend: "auto" (Triton, on CUDA), "torch" (never), or that of `dash_attention`, wherever tensors are.
        routing_q, routing_k: of a router that has its own, like k.
        chunk_size, query_pool, router: further arguments of `dash_attention`.

    Returns:
        Output [B, Hq, T, D] in q's dtype, zero for padding; or None where the model file must attend by itself, and then
        the cache is as it was.
    """
    if not _kernels_run(backend, q, k, chunk_size):
        return None
    # under autocast dtypes differ
    k, v, start = k.to(q.dtype), v.to(q.dtype), start.to(q.device)
    own = [] if routing_q is None or routing_k is None else [routing_q.to(q.dtype), routing_k.to(q.dtype)]
    seen_q = own[0] if own else q
    layer: Any = None if cache is None else cache.layers[index]
    past = 0 if layer is None else int(layer.get_seq_length())
    prompt = past == 0 and latest_start < q.shape[2]
    pooled_q: Tensor | None = None
    if cache is not None:
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if cache.offloading or differentiable:
            if not prompt or isinstance(layer, FastLayer):
                return None
            cache.update(k, v, index)
            if query_pool > 1:
                layer.keep_queries(seen_q, query_pool)
            if own:
                layer.add_keys(own[1], q.shape[2], q.shape[2], summary_query, start, chunk_size, True)
        else:
            places = (summary_query, start, latest_start, backend)
            layer = fast_layer(cache, index, chunk_size, query_pool, seen_q, *places, own=bool(own))
            pooled_q = layer.write(k, v, seen_q, *places, *own[1:])
    if not prompt:
        return layer.attend(q, pooled_q, start, backend, query_pool=query_pool, **router)
    options = {"backend": backend, "chunk_size": chunk_size, "query_pool": query_pool, **router}
    return _attend_prompt(q, k, v, own, summary_query, start, latest_start, **options)
