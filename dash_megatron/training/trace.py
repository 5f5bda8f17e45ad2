"""Traces of a few steps: what host and device did when, and what filled the device's memory."""

from __future__ import annotations

import contextlib
import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEMORY_EVENTS = 200_000
"""The newest allocations and frees that a memory snapshot tells; older ones are dropped."""


class StepTracer:
    """Records a range of steps with torch's profiler, and leaves one process's files in `<run_dir>/profile`.

    `rank_R.trace.json.gz` is a Chrome trace; on a GPU `rank_R.memory.pickle` is a snapshot of its allocator. They are
    written after the range's last step, or by `close` where the run ends within the range.

    Args:
        steps: first and last step, counted from 1; None records nothing.
        run_dir: folder of the run.
        rank: of this process.
        device: what this process computes on.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: str, rank: int, device: torch.device) -> None:
        self.first, self.last = steps or (0, -1)
        self.folder, self.rank, self.device = Path(run_dir, "profile"), rank, device
        self._profile: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record what happens within as a step of this number, if it is in the range."""
        if self._profile is None and self.first <= number <= self.last:
            self._start()
        if self._profile is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        if number >= self.last:
            self.close()

    def close(self) -> None:
        """Stop recording and write the files, if there is anything to write; a second range of steps does not follow."""
        if self._profile is None:
            return
        self._profile.stop()
        name = self.folder / f"rank_{self.rank}.trace.json"
        self._profile.export_chrome_trace(str(name))
        with name.open("rb") as plain, gzip.open(f"{name}.gz", "wb", compresslevel=3) as packed:
            shutil.copyfileobj(plain, packed)
        name.unlink()
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank_{self.rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self.last = None, -1

    def _start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()
