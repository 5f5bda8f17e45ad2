"""One process among those that examine a run: how it meets the others, and agrees with them."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from dash_megatron.config import Config, ParallelConfig
from dash_megatron.parallel import (
    Launch,
    destroy_model_groups,
    forget_model_groups,
    join_processes,
    make_model_groups,
)

# A collective of a check whose partner failed ends after this.
COLLECTIVE_TIMEOUT_SECONDS = 180.0

T = TypeVar("T")


class LostProcesses(RuntimeError):
    """Some processes did not answer in time: they died, or hang."""


class DisagreementError(RuntimeError):
    """A part of a check that all processes do together failed on some; the message names them."""


class Session:
    """This process among those that examine a run.

    Args:
        config: the run.
        launch: how this process was started.

    Raises:
        ValueError: there are GPUs, but fewer on this machine than processes.
    """

    def __init__(self, config: Config, launch: Launch) -> None:
        self.config = config
        self.launch = launch
        # the kernels' sums are the same in every run only where torch is told so; this one is read with the first matmul
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # a collective whose partner failed raises, as over gloo, in place of ending the process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        self.device = join_processes(launch, COLLECTIVE_TIMEOUT_SECONDS / 60)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # no check communicates over it, so that it is whole after one failed
        self._agreement = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=60))

    def gather(self, value: T, wait_seconds: float = COLLECTIVE_TIMEOUT_SECONDS) -> list[T]:
        """Give every process the values of all processes, by rank; collective.

        Args:
            value: anything that pickles.
            wait_seconds: how much later than the first the last process may come.

        Raises:
            LostProcesses: one did not come; rank 0 knows which.
        """
        if self.size > 1:
            try:
                patience = datetime.timedelta(seconds=wait_seconds)
                dist.monitored_barrier(self._agreement, patience, wait_all_ranks=True)
            except RuntimeError as error:
                # without the place in gloo's sources, and its advice
                reason = re.sub(r"\[\S+\.cc:\d+\] ", "", str(error).splitlines()[0]).split(". ")[0]
                raise LostProcesses(reason) from error
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self._agreement)
        return values

    def run_on_all(self, function: Callable[[], T], wait_seconds: float = COLLECTIVE_TIMEOUT_SECONDS) -> T:
        """Call a function on every process, and go on only if it succeeds on all; collective.

        Args:
            function: what to call.
            wait_seconds: as for `gather`.

        Raises:
            DisagreementError: it raised on a process; the message is that process's.
        """
        problem, result = "", []
        try:
            result.append(function())
        except Exception as error:
            problem = describe_error(error)
        problems = self.gather(problem, wait_seconds)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
        if failed:
            raise DisagreementError("; ".join(failed))
        return result[0]

    @contextlib.contextmanager
    def model_groups(self, parallel: ParallelConfig) -> Iterator[None]:
        """Make new Megatron groups of a layout, and destroy them at the end; collective."""
        make_model_groups(parallel, COLLECTIVE_TIMEOUT_SECONDS / 60)
        try:
            yield
        except BaseException:
            # other processes may be in the middle of a collective: the groups cannot be left in good order
            forget_model_groups()
            raise
        # models hold groups, and groups hold threads and memory of the GPU
        gc.collect()
        destroy_model_groups()


def describe_error(error: BaseException) -> str:
    """One line about an error: the message alone where a user can mend it, else with the error's type."""
    text = " ".join(str(error).split())[:600]
    mendable = isinstance(error, ValueError | FileNotFoundError | DisagreementError)
    return text if text and mendable else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def deterministic_sums() -> Iterator[None]:
    """Let torch and the kernels sum in an order that is always the same."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
