"""Reference or kernels of the top-k baselines: what the backend that `ops/backend.py` picks is made of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.backend import pick_backend
from dash_megatron.ops.topk.reference import attend_selected_reference, select_chunks_reference


class Backend(NamedTuple):
    """What a baseline's attention is made of; kernels take the same arguments as the reference."""

    attend: Callable[..., Tensor]
    """`attend_selected_reference` or the kernels."""
    select: Callable[..., Tensor]
    """`select_chunks_reference` or the kernels."""
    dtype: torch.dtype
    """Data type that operands of matrix products are rounded to."""


def find_backend(backend: str, q: Tensor, chunk_size: int) -> Backend:
    """The backend of this name, or the one that suits the tensors if it is "auto".

    Raises:
        ValueError: the backend cannot run here.
    """
    if pick_backend(backend, q, chunk_size) == "reference":
        dtype = torch.promote_types(q.dtype, torch.float32)
        return Backend(attend_selected_reference, select_chunks_reference, dtype)
    from dash_megatron.ops.topk.triton import attend_selected_triton, select_chunks_triton

    return Backend(attend_selected_triton, select_chunks_triton, q.dtype)


def count_selected(selected_SHK: Tensor) -> Tensor:
    """int32 [S, H]: chunks attended to, the own one included."""
    return ((selected_SHK >= 0).sum(-1) + 1).int()
