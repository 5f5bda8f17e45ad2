"""DashAttention in stages, for context parallelism: queries and keys lie in different buffers, on chunk borders.

A rank holds whole chunks of a packed sequence. It summarizes them, gets the summaries of all chunks, routes its own
queries, and then attends to keys and values wherever they lie, buffer by buffer. `stages` gives the functions of a
backend; they compute forwards and backwards and build no autograd graph.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

from torch import Tensor


class QueryChunks(NamedTuple):
    """Where the chunks of a rank's queries lie, in ascending order; int32 [local chunks] each."""

    start: Tensor
    """First row of the chunk's queries in q."""
    end: Tensor
    """One past the last; equal to `start` for an empty padding entry."""
    number: Tensor
    """The chunk's number among all chunks of the whole packed sequence."""
    first: Tensor
    """Number of the first chunk of its document."""
    num_chunks: int
    """Chunks of the whole sequence."""
    list_bound: int
    """At least the number of pairs of a local chunk and a strictly past chunk of its document."""


class KeyBuffer(NamedTuple):
    """Which chunks' keys a buffer holds, and where; heads may be laid out differently."""

    row: Tensor
    """int32 [Hkv, chunks of the whole sequence]: first row of the chunk in the buffer."""
    length: Tensor
    """int32 [Hkv, chunks of the whole sequence]: its rows, 0 where the buffer does not hold it."""
    first: int
    """Attention considers chunks from this number on,"""
    last: int
    """and up to but without this one."""


def stages(backend: str, q: Tensor) -> ModuleType:
    """The module of the stages: `summarize`, `route`, `listed`, `attend` and their backwards.

    Args:
        backend: as in `dash_attention`.
        q: decides where `backend` is "auto".

    Raises:
        ValueError: the backend cannot run here.
    """
    from dash_megatron.ops.attention import _resolve_backend

    if _resolve_backend(backend, q)[0] == "triton":
        return importlib.import_module("dash_megatron.ops.kernels.sharded")
    return importlib.import_module("dash_megatron.ops.sharded_reference")
