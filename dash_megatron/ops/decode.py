"""Decoding: attention of one new token a sequence against a cache."""

from typing import Literal, overload

import torch
from torch import Tensor

from dash_megatron.ops.attention import (
    TRITON_CHUNK_SIZES,
    _check_flag,
    _check_length_scaling,
    _check_positive,
    _check_scaling,
    _resolve_backend,
)
from dash_megatron.ops.cache import DashCache
from dash_megatron.ops.entmax import check_alpha
from dash_megatron.ops.types import Router


def _check(q: Tensor, cache: DashCache) -> None:
    if not isinstance(cache, DashCache):
        raise ValueError(f"cache={type(cache).__name__} must be a DashCache; see DashCache.contiguous")
    Hkv, D = cache.k.shape[2:]
    good = isinstance(q, Tensor) and q.ndim == 3 and q.shape[::2] == (cache.batch, D) and q.shape[1] > 0
    if not good or q.shape[1] % Hkv:
        seen = f"q.shape={list(q.shape)}" if isinstance(q, Tensor) else f"q={q!r}"
        raise ValueError(
            f"{seen} must be [B, Hq, D] with B={cache.batch}, D={D} and Hq a multiple of the cache's {Hkv} heads; "
            "reshape q"
        )
    if q.dtype != cache.k.dtype or q.device != cache.k.device:
        raise ValueError(
            f"q={q.dtype} on {q.device} must be {cache.k.dtype} on {cache.k.device}, as the cache; "
            "cast or move q with .to(cache.k)"
        )


@overload
def dash_decode(
    q: Tensor,
    cache: DashCache,
    scaling_factor: float | Tensor = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    backend: str = ...,
    return_selected: Literal[False] = ...,
    length_scaling: float = ...,
) -> Tensor: ...


@overload
def dash_decode(
    q: Tensor,
    cache: DashCache,
    scaling_factor: float | Tensor = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    backend: str = ...,
    *,
    return_selected: Literal[True],
    length_scaling: float = ...,
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def dash_decode(
    q: Tensor,
    cache: DashCache,
    scaling_factor: float | Tensor = 1.0,
    sigma: float = 2.0,
    estimate_diagonal: bool = True,
    alpha: float = 1.5,
    backend: str = "auto",
    return_selected: bool = False,
    length_scaling: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `dash_attention` gives for the last token of every sequence in a cache, which has that token already.

    First `cache.append` the token's key and value (or `cache.prefill` a prompt), then call this with its query. With
    Triton nothing waits for the device, and grids depend on shapes alone: both calls can be captured in one CUDA graph
    and replayed as sequences grow. Has no gradient.

    Args:
        q: queries after RoPE, [B, Hq, D], the cache's dtype and device; the cache's Hkv divides Hq.
        cache: keys, values and summaries; its `chunk_size` is the model's.
        scaling_factor, sigma, estimate_diagonal, alpha, backend: as in `dash_attention`.
        return_selected: also return how many chunks each sequence attends to.
        length_scaling: as in `dash_attention`.

    Returns:
        Output [B, Hq, D] in q's dtype, accumulated in float32 or better: zero for an empty sequence, NaN (on a GPU) for one
        longer than `cache.capacity`. With `return_selected`, also the chunks selected, the own one included, int32 [B, Hkv].

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    _check(q, cache)
    _check_scaling(scaling_factor, cache.k.shape[2], q.device)
    _check_length_scaling(length_scaling)
    _check_positive("sigma", sigma, "try 2.0, or 1e6 for a flat prior")
    _check_flag("estimate_diagonal", estimate_diagonal)
    check_alpha(alpha)
    _check_flag("return_selected", return_selected)
    tensors = q, cache.k, cache.v, cache.summary, cache.lengths, cache.page_table
    router = Router(cache.chunk_size, scaling_factor, sigma, estimate_diagonal, alpha, length_scaling)
    if _resolve_backend(backend, q)[0] == "triton":
        if cache.chunk_size not in TRITON_CHUNK_SIZES:
            raise ValueError(
                f"chunk_size={cache.chunk_size} must be one of {list(TRITON_CHUNK_SIZES)} for the Triton backend; "
                "make the cache with 64, or pass backend='reference'"
            )
        from dash_megatron.ops.kernels.decode import decode

        head_scaling, numbers = router.split()
        out, selected = decode(*tensors, head_scaling, *numbers)
    else:
        from dash_megatron.ops.decode_reference import decode_reference

        out, selected = decode_reference(*tensors, router)
    return (out, selected) if return_selected else out
