"""What one process of a run finds out for all: of hundreds that look at the same files, a shared file system suffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def agreed(function: Callable[[], T]) -> T:
    """Call a function on rank 0; return its result, or raise its OSError or ValueError, on all processes. Collective."""
    # imported late, as a machine that only submits runs may lack it
    import torch.distributed as dist

    if not dist.is_initialized():
        return function()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [function()]
        except (OSError, ValueError) as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], OSError | ValueError):
        raise found[0]
    result: T = found[0]
    return result
