"""Save checkpoints of a run while it trains: copied to host memory, written by a thread, published whole by a rename."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.agreement import agreed, largest
from dash_megatron.checkpoint import files
from dash_megatron.checkpoint.folder import (
    DESCRIPTION,
    checkpoint_folder,
    finished_steps,
    make_empty,
    remove,
    tag_of,
)
from dash_megatron.checkpoint.state import TrainingState, random_state
from dash_megatron.checkpoint.stored import describe_fragments
from dash_megatron.config import Config
from dash_megatron.files import sync, write_whole
from dash_megatron.layers.sharding import splits
from dash_megatron.parallel import tensor_group
from dash_megatron.retry import explain_os_error, retry

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves the state of an engine; every method is to be called by all processes at the same step.

    Saving copies this process's state to host memory, which is all that training waits for; a thread writes the copy.
    `poll`, called once a step, publishes the checkpoint when the threads of all processes are done.

    Args:
        engine: weights and optimizer.
        config: the run.
        about: kept in each checkpoint: what code wrote it, on what.
    """

    def __init__(self, engine: TrainingState, config: Config, about: dict[str, str]) -> None:
        self.engine = engine
        self.config = config
        self.about = about
        self.folder = checkpoint_folder(config.run_dir)
        self._copies: dict[str, Tensor] = {}
        self._writing: _WriterThread | None = None

    def save(self, step: int, trainer: dict[str, Any], probe: dict[str, Tensor], probe_loss: float) -> None:
        """Begin to save; collective.

        Args:
            step: finished optimizer steps.
            trainer: what the trainer needs to go on, the same on every process, of types that JSON has.
            probe, probe_loss: a row of tokens and its loss under the weights that are saved.

        Raises:
            OSError: the one before could not be written, or this one not begun; on all processes.
        """
        self.finish()
        begin = time.perf_counter()
        partial = self.folder / f"{tag_of(step)}.partial"
        tensors = self._copy_state()
        description = self._describe(step, trainer, probe_loss)
        agreed(lambda: make_empty(partial, self.config.checkpoint.retry_seconds))
        rank = dist.get_rank()

        def write() -> dict[str, Any]:
            entries = {files.state_file(rank): files.write_tensors(partial / files.state_file(rank), tensors)}
            if rank == 0:
                entries[files.PROBE] = files.write_tensors(partial / files.PROBE, probe)
                entries[DESCRIPTION] = files.write_json(partial / DESCRIPTION, description)
            return entries

        self._writing = _WriterThread(step, write, self.config.checkpoint.retry_seconds, partial)
        self._writing.stalled = time.perf_counter() - begin
        if not self.config.checkpoint.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Publish the checkpoint that is being written, if all processes have written it; collective.

        Raises:
            OSError: a process could not write, or rank 0 could not publish; on all processes.
        """
        if self._writing is None:
            return
        if not largest(torch.tensor(self._writing.thread.is_alive(), dtype=torch.int32)):
            self._publish()

    def finish(self) -> None:
        """Wait until nothing is left to write and publish; collective.

        Raises:
            OSError: as `poll`.
        """
        if self._writing is None:
            return
        begin = time.perf_counter()
        self._writing.thread.join()
        self._writing.stalled += time.perf_counter() - begin
        self.poll()

    def _copy_state(self) -> dict[str, Tensor]:
        """Copy all that this process keeps to host memory, into buffers that every save uses again."""
        state = self.engine.state()
        for name, tensor in state.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                )
            self._copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {**self._copies, **{f"random/{name}": value for name, value in random_state().items()}}

    def _describe(self, step: int, trainer: dict[str, Any], probe_loss: float) -> dict[str, Any]:
        own = (dist.get_rank(tensor_group()), self.engine.fragment_starts() if self.engine.state() else {})
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        return {
            "format": files.FORMAT,
            "step": step,
            "layout": self.config.layout(dist.get_world_size()),
            "about": self.about,
            "trainer": trainer,
            "probe_loss": probe_loss,
            "adam_steps": self.engine.adam_steps(),
            # weights split over tensor-parallel ranks: [dimension, number of blocks] of each
            "splits": splits(self.engine.model),
            "shapes": self.engine.local_shapes(),
            "fragments": describe_fragments(ranks),
            "config": self.config.model_dump(mode="json"),
        }

    def _publish(self) -> None:
        writing, self._writing = self._writing, None
        assert writing is not None
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, (writing.entries, writing.error))
        failures = [f"process {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
        try:
            if failures:
                raise OSError("; ".join(failures[:3]))
            agreed(lambda: self._publish_files(writing.step, results))
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {writing.step} could not be written: {error.strerror or error}. Those published before "
                "are whole"
            ) from error
        if dist.get_rank() == 0:
            print(
                f"saved {self.folder / tag_of(writing.step)} (written in {writing.seconds:.2f} s, for which training "
                f"stood still {writing.stalled:.2f} s)",
                flush=True,
            )

    def _publish_files(self, step: int, results: list[Any]) -> None:
        """On rank 0: complete the folder, publish it and remove what is no longer kept."""
        tag = tag_of(step)
        partial = self.folder / f"{tag}.partial"
        manifest = {"files": {name: facts for entries, _ in results for name, facts in entries.items()}}

        def publish() -> None:
            if partial.exists():  # not the second attempt after the rename itself
                files.write_json(partial / files.MANIFEST, manifest)
                sync(partial)
                remove(self.folder / tag)  # this step's, of before the run went back to an earlier one
                os.rename(partial, self.folder / tag)
            sync(self.folder)
            write_whole(self.folder / "latest", tag + "\n")

        retry(publish, f"publish {tag}", self.config.checkpoint.retry_seconds, self.folder)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove what is no longer kept; what cannot be removed is told, and the next save tries again."""
        keep, every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        for old in finished_steps(self.config.run_dir)[:-keep] if keep else []:
            if every and old % every == 0:
                continue
            try:
                remove(self.folder / tag_of(old))
            except OSError as error:
                logger.warning("cannot remove %s: %s", tag_of(old), explain_os_error(error))


class _WriterThread:
    """A thread that writes one process's files."""

    def __init__(self, step: int, write: Callable[[], dict[str, Any]], seconds: float, folder: Path) -> None:
        self.step = step
        self.entries: dict[str, Any] = {}
        self.error: str | None = None
        self.stalled = 0.0
        self.seconds = 0.0

        def run() -> None:
            begin = time.perf_counter()
            try:
                self.entries = retry(write, f"write {folder.name}", seconds, folder)
            except Exception as error:
                self.error = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self.seconds = time.perf_counter() - begin

        # a process that ends meanwhile leaves a folder that was never published
        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()
