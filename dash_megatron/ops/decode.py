"""Decoding: attention of one new token a sequence against a cache."""

from typing import Literal, overload

import torch
from torch import Tensor

from dash_megatron.ops.attention import TRITON_CHUNK_SIZES, _check_flag, _check_positive, _resolve_backend
from dash_megatron.ops.cache import DashCache
from dash_megatron.ops.entmax import check_alpha


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
    scaling_factor: float = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    backend: str = ...,
    return_selected: Literal[False] = ...,
) -> Tensor: ...


@overload
def dash_decode(
    q: Tensor,
    cache: DashCache,
    scaling_factor: float = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    backend: str = ...,
    *,
    return_selected: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def dash_decode(
    q: Tensor,
    cache: DashCache,
    scaling_factor: float = 1.0,
    sigma: float = 2.0,
    estimate_diagonal: bool = True,
    alpha: float = 1.5,
    backend: str = "auto",
    return_selected: bool = False,
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

    Returns:
        Output [B, Hq, D] in q's dtype, accumulated in float32 or better: zero for an empty sequence, NaN (on a GPU) for one
        longer than `cache.capacity`. With `return_selected`, also the chunks selected, the own one included, int32 [B, Hkv].

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    _check(q, cache)
    _check_positive("scaling_factor", scaling_factor, "try 1.0")
    _check_positive("sigma", sigma, "try 2.0, or 1e6 for a flat prior")
    _check_flag("estimate_diagonal", estimate_diagonal)
    check_alpha(alpha)
    _check_flag("return_selected", return_selected)
    arguments = (
        q, cache.k, cache.v, cache.summary, cache.lengths, cache.page_table, cache.chunk_size,
        float(scaling_factor), float(sigma), estimate_diagonal, float(alpha),
    )  # fmt: skip
    if _resolve_backend(backend, q)[0] == "triton":
        if cache.chunk_size not in TRITON_CHUNK_SIZES:
            raise ValueError(
                f"chunk_size={cache.chunk_size} must be one of {list(TRITON_CHUNK_SIZES)} for the Triton backend; "
                "make the cache with 64, or pass backend='reference'"
            )
        from dash_megatron.ops.kernels.decode import decode

        out, selected = decode(*arguments)
    else:
        from dash_megatron.ops.decode_reference import decode_reference

        out, selected = decode_reference(*arguments)
    return (out, selected) if return_selected else out
