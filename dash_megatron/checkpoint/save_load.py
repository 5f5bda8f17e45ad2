"""Checkpoints of a run, `<run>/checkpoints/step_00000100/`: saved while training goes on, published whole by a rename,
checked before they are read, and read into any layout."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from dash_megatron.checkpoint import files as files
from dash_megatron.checkpoint.files import StoredState
from dash_megatron.config import Config, config_from_dict
from dash_megatron.files import write_whole
from dash_megatron.layers.sharding import shard, split_of, splits, whole_shape
from dash_megatron.parallel import tensor_group
from dash_megatron.retry import retry
from dash_megatron.training.engine import Engine

logger = logging.getLogger(__name__)

_TAG = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those published before are whole."""


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def finished_steps(run_dir: str | Path) -> list[int]:
    """Steps of which a published checkpoint exists, oldest first."""
    folder = checkpoint_folder(run_dir)
    names = [_TAG.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match.group(1)) for match in names if match)


def agreed_steps(run_dir: str | Path) -> list[int]:
    """As `finished_steps`, on all processes as rank 0 sees the folder, which others may be saving to; collective."""
    steps = [finished_steps(run_dir)]
    if dist.is_initialized():
        dist.broadcast_object_list(steps)
    return steps[0]


def tag_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


class Checkpointer:
    """Saves and restores an engine; every method is to be called by all processes at the same step.

    Saving copies this process's state to host memory, which is all that training waits for; a thread writes the copy.
    `poll`, called once a step, publishes the checkpoint when the threads of all processes are done.

    Args:
        engine: weights and optimizer.
        config: the run.
        about: kept in each checkpoint: what code wrote it, on what.
    """

    def __init__(self, engine: Engine, config: Config, about: dict[str, str]) -> None:
        self.engine = engine
        self.config = config
        self.about = about
        self.folder = checkpoint_folder(config.run_dir)
        self._copies: dict[str, Tensor] = {}
        self._writing: _Writing | None = None

    def save(self, step: int, trainer: dict[str, Any], probe: dict[str, Tensor], probe_loss: float) -> None:
        """Begin to save; collective.

        Args:
            step: finished optimizer steps.
            trainer: what the trainer needs to go on, the same on every process, of types that JSON has.
            probe, probe_loss: a row of tokens and its loss under the weights that are saved.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.finish()
        begin = time.perf_counter()
        partial = self.folder / f"{tag_of(step)}.partial"
        tensors = self._copy_state()
        description = self._describe(step, trainer, probe_loss)
        failure = self._on_main(lambda: _make_empty(partial, self.config.checkpoint.retry_seconds))
        if failure is not None:
            raise CheckpointError(failure)
        rank = dist.get_rank()

        def write() -> dict[str, Any]:
            entries = {files.state_file(rank): files.write_tensors(partial / files.state_file(rank), tensors)}
            if rank == 0:
                entries[files.PROBE] = files.write_tensors(partial / files.PROBE, probe)
                entries[files.DESCRIPTION] = files.write_json(partial / files.DESCRIPTION, description)
            return entries

        self._writing = _Writing(step, write, self.config.checkpoint.retry_seconds, partial)
        self._writing.stalled = time.perf_counter() - begin
        if not self.config.checkpoint.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Publish the checkpoint that is being written, if all processes have written it; collective.

        Raises:
            CheckpointError: a process could not write, or rank 0 could not publish.
        """
        if self._writing is None:
            return
        running = torch.tensor(self._writing.thread.is_alive(), dtype=torch.int32)
        dist.all_reduce(running, dist.ReduceOp.MAX)
        if not running:
            self._publish()

    def finish(self) -> None:
        """Wait until nothing is left to write and publish; collective.

        Raises:
            CheckpointError: as `poll`.
        """
        if self._writing is None:
            return
        begin = time.perf_counter()
        self._writing.thread.join()
        self._writing.stalled += time.perf_counter() - begin
        self.poll()

    def load(self) -> StoredState | None:
        """Load the newest checkpoint that is undamaged, in whatever layout it was saved; collective.

        Returns:
            What was stored, of which weights, optimizer and random state are set already. None without checkpoints.

        Raises:
            ValueError: the checkpoint is of another model, or there are only damaged ones.
        """
        step = self._choose()
        if step is None:
            return None
        stored = StoredState(self.folder / tag_of(step))
        _check_same_run(stored, self.config)
        self._check_shapes(stored)
        self.engine.load_state(self._reader(stored), stored.facts["adam_steps"])
        layout = self.config.layout(dist.get_world_size())
        if stored.facts["layout"] == layout:
            _set_random_state(stored.random_state(dist.get_rank()))
        else:
            logger.info("%s was saved by %s and goes on as %s", stored.folder, stored.facts["layout"], layout)
        return stored

    def _copy_state(self) -> dict[str, Tensor]:
        """Copies in host memory, always the same, of all that this process keeps."""
        state = self.engine.state()
        for name, tensor in state.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                )
            self._copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {**self._copies, **{f"random/{name}": value for name, value in _random_state().items()}}

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
            "splits": splits(self.engine.module),
            "shapes": self.engine.local_shapes(),
            "fragments": files.describe_fragments(ranks),
            "config": self.config.model_dump(mode="json"),
        }

    def _publish(self) -> None:
        writing, self._writing = self._writing, None
        assert writing is not None
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, (writing.entries, writing.error))
        failures = [f"process {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
        failure = "; ".join(failures[:3]) or self._on_main(lambda: self._rename(writing.step, results))
        if failure:
            raise CheckpointError(
                f"the checkpoint of step {writing.step} could not be written: {failure}. Those published before are whole"
            )
        if dist.get_rank() == 0:
            print(
                f"saved {self.folder / tag_of(writing.step)} (written in {writing.seconds:.2f} s, for which training "
                f"stood still {writing.stalled:.2f} s)",
                flush=True,
            )

    def _rename(self, step: int, results: list[Any]) -> None:
        """On rank 0: complete the folder, publish it and remove what is no longer kept."""
        tag = tag_of(step)
        partial = self.folder / f"{tag}.partial"
        manifest = {"files": {name: facts for entries, _ in results for name, facts in entries.items()}}

        def publish() -> None:
            if partial.exists():  # not the second attempt after the rename itself
                files.write_json(partial / files.MANIFEST, manifest)
                files.sync(partial)
                _remove(self.folder / tag)  # this step's, of before the run went back to an earlier one
                os.rename(partial, self.folder / tag)
            files.sync(self.folder)
            latest = self.folder / "latest.partial"
            latest.write_text(tag + "\n")
            os.replace(latest, self.folder / "latest")

        retry(publish, f"publish {tag}", self.config.checkpoint.retry_seconds, self.folder)
        keep, every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        old = finished_steps(self.config.run_dir)[:-keep] if keep else []
        for step in old:
            if not every or step % every:
                _remove(self.folder / tag_of(step))

    def _choose(self) -> int | None:
        """The newest step whose files are as they were written; damaged ones are set aside. Collective."""
        steps = agreed_steps(self.config.run_dir)
        for step in reversed(steps):
            problem = files.agreed_damage(self.folder / tag_of(step), self.config.checkpoint.retry_seconds)
            if problem is None:
                return step
            failure = self._on_main(lambda step=step, problem=problem: self._set_aside(step, problem))  # type: ignore[misc]
            if failure:
                raise CheckpointError(failure)
        if steps:
            raise ValueError(
                f"{self.folder} has no undamaged checkpoint: those of steps {steps} were set aside as "
                "*.damaged; restore one from a copy, or remove them all to begin from scratch"
            )
        return None

    def _set_aside(self, step: int, problem: str) -> None:
        place = self.folder / f"{tag_of(step)}.damaged"
        number = 1
        while place.exists():
            number += 1
            place = place.with_suffix(f".damaged{number}")
        os.rename(self.folder / tag_of(step), place)
        logger.warning("%s is damaged (%s): kept as %s and skipped", tag_of(step), problem, place.name)

    def _reader(self, stored: StoredState) -> Callable[[str, str, int, int], Tensor]:
        """Reads this tensor-parallel rank's elements, from whatever tensor-parallel size."""
        group = tensor_group()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        own = {name: split_of(parameter) for name, parameter in self.engine.module.named_parameters()}

        def read(kind: str, name: str, start: int, numel: int) -> Tensor:
            if stored.tensor_size == size or own[name] is None:
                source = rank if stored.tensor_size == size else 0
                return stored.read(kind, name, source, start, numel)
            part = shard(stored.whole(kind, name), own[name], rank, size)
            return part.flatten()[start : start + numel]

        return read

    def _check_shapes(self, stored: StoredState) -> None:
        size = dist.get_world_size(tensor_group())
        shapes = {
            name: whole_shape(shape, split_of(self.engine.module.get_parameter(name)), size)
            for name, shape in self.engine.local_shapes().items()
        }
        for name in sorted(shapes.keys() | stored.shapes.keys()):
            before = stored.whole_shape(name) if name in stored.shapes else None
            if shapes.get(name) != before:
                raise ValueError(
                    f"{name} has shape {shapes.get(name)} in this run and {before} in {stored.folder}; restore the "
                    "config (model, attention, parallel.tensor pads the vocabulary), or choose a new run_dir"
                )

    def _on_main(self, function: Callable[[], object]) -> str | None:
        """Call a function on rank 0 and give its error's text to all; collective."""
        message: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                function()
            except OSError as error:
                message = [error.strerror or str(error)]
        dist.broadcast_object_list(message)
        return message[0]


class _Writing:
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


def write_config(config: Config, commit: str) -> None:
    """Write `<run>/config.yaml`: the resolved config, with the code's commit in its first line."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_whole(Path(config.run_dir) / "config.yaml", f"# commit: {commit}\n{text}")


def _check_same_run(stored: StoredState, config: Config) -> None:
    # a run may go on with another layout, and with one where that of its checkpoint is refused today
    saved = config_from_dict({**stored.facts["config"], "parallel": {}})
    for name, old in saved.model:
        new = getattr(config.model, name)
        if old != new:
            raise ValueError(
                f"model.{name}={new} differs from {old} in {stored.folder}; restore it, or choose a new run_dir"
            )
    order = {
        "data.train": (saved.data.train, config.data.train),
        "data.seq_length": (saved.data.seq_length, config.data.seq_length),
        "training.seed": (saved.training.seed, config.training.seed),
    }
    for name, (before, now) in order.items():
        if before != now:
            logger.warning(
                "%s was %s and is now %s: the run goes on at its sample number, yet in another order of samples, "
                "so that some are read twice and others never",
                name,
                before,
                now,
            )
    for name, before in saved.attention:
        now = getattr(config.attention, name)
        if before != now and name != "backend":
            logger.warning(
                "attention.%s was %s and is now %s: the run goes on with weights that were trained with the former; "
                "restore it if that is not meant",
                name,
                before,
                now,
            )


def _make_empty(folder: Path, seconds: float) -> None:
    """Make a folder, after removing what earlier processes left unfinished beside it."""

    def make() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in (*folder.parent.glob("*.partial"), *folder.parent.glob("*.removed")):
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()

    retry(make, f"make {folder}", seconds, folder.parent)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, which is no checkpoint any more when the removal has only begun."""
    if folder.exists():
        away = folder.with_suffix(".removed")
        shutil.rmtree(away, ignore_errors=True)
        os.rename(folder, away)
        # large folders take a file system seconds, for which nobody should wait
        threading.Thread(
            target=shutil.rmtree, args=(away,), kwargs={"ignore_errors": True}, daemon=True
        ).start()


def _random_state() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
