"""What the processes of a run agree on over the CPU, in ways that suit hundreds of them."""

from __future__ import annotations

import errno
import itertools
import logging
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dash_megatron.exit_codes import machine_id, machine_name

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")

_calls = itertools.count()
_FIRST_PAUSE, _MAX_PAUSE = 0.01, 1.0
_STALLED_SECONDS = 2 * 3600.0
_TELL_SECONDS = 60.0


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


def once_a_machine(what: str, tasks: Sequence[Callable[[], object]]) -> None:
    """Do every task once on each machine: on rank 0's first, then on the others, which may have disks of their own. Collective.

    The processes of a machine take the next task when they are done with one, except rank 0 where it is not alone: a task may keep
    Python's other threads from running, and one of rank 0's tells that the run is alive. It ends when all tasks are done everywhere.
    Nobody waits in a collective operation, whose timeout would end the run: tasks may take longer. The log tells each minute how many
    are done; where rank 0 is alone on its machine, between two of its tasks.

    Args:
        what: completes "could not ...", such as "order data sets".
        tasks: as many on all processes.

    Raises:
        OSError, ValueError: of a task, on all processes.
        TimeoutError: on a machine no task ended for two hours, so that a process or its file system hangs; on all processes.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        for task in tasks:
            task()
        return
    store, call = dist.distributed_c10d._get_default_store(), f"once_a_machine {next(_calls)}"
    failed = f"{call} failed"
    here = machine_name(), machine_id()
    begin = told = time.monotonic()

    def fail(error: Exception) -> NoReturn:
        store.set(failed, pickle.dumps(error))  # type: ignore[arg-type]
        time.sleep(2 * _MAX_PAUSE)  # for all to read it: the store ends with rank 0
        raise error

    def tell(done: int, machine: tuple[str, str]) -> None:
        nonlocal told
        if (now := time.monotonic()) > told + _TELL_SECONDS:
            told = now
            logger.info(
                "to %s: %d of %d done on %s after %.0f s", what, done, len(tasks), machine[0], now - begin
            )

    def wait(machine: tuple[str, str]) -> None:
        done, changed, pause = 0, time.monotonic(), _FIRST_PAUSE
        while (now_done := store.add(f"{call} done on {machine}", 0)) < len(tasks):
            tell(now_done, machine)
            if store.check([failed]):
                raise pickle.loads(store.get(failed))
            if now_done > done:
                done, changed = now_done, time.monotonic()
            if time.monotonic() > changed + _STALLED_SECONDS:
                text = (
                    f"{machine[0]} could not {what} for {_STALLED_SECONDS / 60:.0f} minutes ({done} of {len(tasks)} done); look at "
                    "processes and file systems there"
                )
                fail(TimeoutError(errno.ETIMEDOUT, text))
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    machines = [here] * dist.get_world_size()
    dist.all_gather_object(machines, here)
    if here != machines[0]:
        wait(machines[0])
    works = dist.get_rank() > 0 or machines.count(here) == 1
    while works and (turn := store.add(f"{call} taken on {here}", 1)) <= len(tasks):
        try:
            tasks[turn - 1]()
        except (OSError, ValueError) as error:
            fail(error)
        tell(store.add(f"{call} done on {here}", 1), here)
    for machine in dict.fromkeys((here, *machines)):
        wait(machine)


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
