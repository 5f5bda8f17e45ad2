"""What the processes of a run agree on over the CPU, in ways that suit hundreds of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def agreed(function: Callable[[], T]) -> T:
    """Call a function on rank 0; return its result, or raise its OSError or ValueError, on all processes. Collective.

    What all need of a shared file system is asked for once.
    """
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


def largest(numbers: Tensor) -> Tensor:
    """Largest of each number over all processes; collective, on the CPU, so that it never waits for the device.

    Rank 0 hears from each, and tells all by a tree. In `all_reduce` over gloo 2 (n - 1) messages wait for each other.
    """
    import torch
    import torch.distributed as dist

    found = (
        [torch.empty_like(numbers) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    )
    dist.gather(numbers, found)
    result = numbers if found is None else torch.stack(found).amax(0)
    dist.broadcast(result, 0)
    return result
