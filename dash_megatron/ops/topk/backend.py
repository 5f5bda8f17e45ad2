"""Checks of tensors that the top-k baselines share, and the one place that picks reference or kernels for them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.attention import (
    CHUNK_SIZES,
    DTYPES,
    TRITON_CHUNK_SIZES,
    _check_cu_seqlens,
    _check_heads,
    _resolve_backend,
)
from dash_megatron.ops.reference import wide
from dash_megatron.ops.topk.reference import attend_selected_reference, select_chunks_reference


class Backend(NamedTuple):
    """What a baseline's attention is made of; kernels take the same arguments as the reference."""

    attend: Callable[..., Tensor]
    """`attend_selected_reference` or the kernels."""
    select: Callable[..., Tensor]
    """`select_chunks_reference` or the kernels."""
    dtype: torch.dtype
    """Of operands of matrix products."""


def find_backend(backend: str, q: Tensor, chunk_size: int) -> Backend:
    """The backend of this name, or the one that suits the tensors if it is "auto".

    Raises:
        ValueError: the backend cannot run here.
    """
    if _resolve_backend(backend, q)[0] == "reference":
        return Backend(attend_selected_reference, select_chunks_reference, wide(q.new_empty(0))[0].dtype)
    if chunk_size not in TRITON_CHUNK_SIZES:
        raise ValueError(
            f"chunk_size={chunk_size} must be one of {list(TRITON_CHUNK_SIZES)} for the Triton backend; "
            "try 64, or pass backend='reference'"
        )
    from dash_megatron.ops.kernels.topk_attend import attend_selected_triton
    from dash_megatron.ops.kernels.topk_scores import select_chunks_triton

    return Backend(attend_selected_triton, select_chunks_triton, q.dtype)


def count_selected(selected_SHK: Tensor) -> Tensor:
    """int32 [S, H]: chunks attended to, the own one included."""
    return ((selected_SHK >= 0).sum(-1) + 1).int()


def check_tensors(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> None:
    """Refuse what no baseline takes.

    Raises:
        ValueError: naming the argument, its value, the rule and the remedy.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not isinstance(x, Tensor) or x.ndim != 4 or x.numel() == 0:
            seen = f"{name}.shape={list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x!r}"
            raise ValueError(f"{seen} must be a tensor [B, N, heads, D] that is not empty; reshape {name}")
        if x.dtype not in DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} and must be of one type with q, {q.dtype} on {q.device}, one of "
                f"{[str(d) for d in DTYPES]}; cast or move {name}"
            )
    _check_heads(q, k, v)
    if isinstance(chunk_size, bool) or chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size={chunk_size!r} must be a power of two from 1 to 128, as an int; try 64")
    _check_cu_seqlens(cu_seqlens, q)
