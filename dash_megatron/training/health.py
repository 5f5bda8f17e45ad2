"""Signs of trouble in a run that still trains: hangs, slow processes, routers that no longer select."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dash_megatron.exit_codes import machine_name
from dash_megatron.training.hang import HangReport

logger = logging.getLogger(__name__)

# Bounds of a collapsed router: mean selected chunks per token, own chunk included, at most; density at least.
_OWN_CHUNK_ONLY = 1.01
_EVERY_CHUNK = 0.999


class Watchdog:
    """Ends this process when it makes no progress, with the stacks of all its threads on standard error.

    The timer is Python's own faulthandler, which needs no Python to run: it works while a collective, a kernel or a
    file system holds the process. The exit code is 1, a fault, so that the scheduler starts the run again.

    Shortly before, processes tell in a sentence which of them stand where: `report`, a `HangReport`.

    Args:
        minutes: longest time between two beats; 0 switches it off.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.report: HangReport | None = None
        # a lost file under a memory map, or a crash within a library, also shows where
        faulthandler.enable(file=2)

    def tell_of(self, run_dir: str | Path, hosts: Sequence[str]) -> None:
        """From now on, tell of all processes of the run; see `HangReport`."""
        if self.seconds:
            self.report = HangReport(run_dir, dist.get_rank(), hosts, 0.9 * self.seconds)

    def beat(self) -> None:
        """Tell that progress was made: the time starts anew."""
        if self.report is not None:
            self.report.beat()
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=2)

    def stop(self) -> None:
        """Switch the watchdog off: no more progress is expected."""
        if self.report is not None:
            self.report.stop()
        faulthandler.cancel_dump_traceback_later()


class BusyTime:
    """Measures how long this process waits for data and computes forward passes, before it meets other processes.

    On a GPU, forward passes are timed by events, which are read when the step has waited for the device anyway.
    With ZeRO 3, tensor or context parallelism, forward passes communicate too, and a slow process slows those of others.

    Args:
        device: what this process computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, machine_name())
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Add the wall-clock time spent within."""
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Add the time that the device spends on what is launched within."""
        if self.device.type != "cuda":
            with self.reading():
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def end_of_step(self) -> None:
        """Read the timers of the step's forward passes, which the device has finished."""
        self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        self._events.clear()

    def slowest(self) -> tuple[int, float]:
        """The rank that was busiest since the last call, and its time over the median of all ranks; collective."""
        times = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        times[dist.get_rank()] = self._seconds
        dist.all_reduce(times)
        self._seconds = 0.0
        seconds = times.tolist()
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        # the lower of two in the middle: of two processes, the faster one is what to compare with
        return rank, seconds[rank] / max(statistics.median_low(seconds), 1e-9)

    def warn_of(self, rank: int, over_median: float, limit: float) -> None:
        """Log a warning that names the rank and its host, if its time is above `limit` times the median."""
        if over_median > limit:
            logger.warning(
                "rank %d on %s takes %.2f times the median to read data and compute; look at its GPU clocks and disks",
                rank,
                self.hosts[rank],
                over_median,
            )


class CollapseAlarm:
    """Warns of layers whose router selects only each token's own chunk, or every chunk, step after step.

    Args:
        steps: how many in a row make an alarm.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._since: dict[int, int] = {}

    def update(self, step: int, densities: Sequence[float | None], selected: Sequence[float | None]) -> None:
        """Take in the routing of a step.

        Args:
            step: number of the step.
            densities: selected over available chunks of each layer, a mean; None without a router.
            selected: chunks per token that each layer selects, own chunk included, a mean; None without a router.
        """
        for layer, (density, chunks) in enumerate(zip(densities, selected, strict=True)):
            state = _collapse(density, chunks)
            if state is None or density is None or chunks is None:
                if self._since.pop(layer, 0) >= self.steps:
                    logger.warning("step %d: layer %d's router selects again", step, layer)
                continue
            self._since[layer] = self._since.get(layer, 0) + 1
            if self._since[layer] == self.steps:
                logger.warning(
                    "step %d: layer %d's router has selected %s for %d steps (density %.4f, %.3f chunks per token)",
                    step,
                    layer,
                    state,
                    self.steps,
                    density,
                    chunks,
                )

    @property
    def alarms(self) -> int:
        """Number of layers whose router has collapsed."""
        return sum(count >= self.steps for count in self._since.values())


def _collapse(density: float | None, chunks: float | None) -> str | None:
    # at neither bound it works; at both, documents have one chunk and there is nothing to select
    if density is None or chunks is None or (density >= _EVERY_CHUNK) == (chunks <= _OWN_CHUNK_ONLY):
        return None
    return "every chunk" if density >= _EVERY_CHUNK else "only the own chunk"
