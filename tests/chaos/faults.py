"""What can go wrong with a run: seeded plans, and the places within a process where it dies."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, EVERY, RANKS = 12, 3, 2
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "zero1": {"zero": {"stage": 1}},
    "zero2_bf16": {"zero": {"stage": 2}, "training": {"precision": "bf16"}},
    "zero3": {"zero": {"stage": 3}},
    "tensor2": {"zero": {"stage": 1}, "parallel": {"tensor": 2, "sequence": True}},
}

# process dies by SIGKILL within: an optimizer step, the copy that a save makes, the thread that writes, publishing before
# and after the rename, loading
PLACES = ("step", "copy", "write", "before_rename", "after_rename", "load")
DAMAGES = ("truncate", "flip", "delete", "manifest")
DATA_DAMAGES = ("truncate_bin", "flip_idx", "flip_bin")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

KINDS = {
    "killed in a step": ("place", "step"),
    "killed while a save copies": ("place", "copy"),
    "killed while a save writes": ("place", "write"),
    "killed before a checkpoint is published": ("place", "before_rename"),
    "killed after a checkpoint was published": ("place", "after_rename"),
    "killed in a load": ("place", "load"),
    "killed at a random moment": ("kill", ""),
    "killed, newest checkpoint damaged": ("damage", ""),
    "disk full for a while": ("disk", "while"),
    "disk full until the run dies": ("disk", "long"),
    "signal": ("signal", ""),
    "a rank delayed": ("delay", "short"),
    "a rank hangs": ("delay", "for ever"),
    "data file corrupted": ("data", ""),
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, at a step of a run."""

    seed: int
    kind: str
    """A key of `KINDS`."""
    layout: str
    """A key of `LAYOUTS`."""
    rank: int
    step: int
    """Finished steps after which it happens; for a place of a save, the step that is saved."""
    seconds: float
    """Further delay, for what happens at any moment."""
    detail: str
    """Which damage, or which signal."""

    @property
    def family(self) -> tuple[str, str]:
        """What to do, and where."""
        return KINDS[self.kind]

    @property
    def ends_a_start(self) -> bool:
        """Whether the run has to be started again, if the fault comes in time. Disks may be full when no save is left."""
        return self.family[0] != "disk" and self.family != ("delay", "short")


def draw(seed: int, kind: str | None = None) -> Fault:
    """The fault of a seed."""
    generator = random.Random(seed)
    names = list(KINDS)
    kind = kind or names[seed % len(names)]
    family, place = KINDS[kind]
    step = generator.randrange(1, STEPS)
    rank = generator.randrange(RANKS)
    if family == "place" and place != "step":
        step = generator.randrange(1, STEPS // EVERY) * EVERY
    if place in ("before_rename", "after_rename"):
        rank = 0  # it publishes
    if family in ("damage", "disk") or place == "load":
        step = generator.randrange(2 * EVERY + 1, STEPS)  # two checkpoints are there
    details = {
        "damage": DAMAGES,
        "data": DATA_DAMAGES,
        "signal": [f"{number.name} to {who}" for number in SIGNALS for who in ("one", "all")],
    }
    detail = generator.choice(list(details.get(family, [""])))
    layout = generator.choice(list(LAYOUTS))
    return Fault(seed, kind, layout, rank, step, generator.uniform(0, 0.3), detail)


def harm_checkpoint(folder: Path, detail: str, generator: random.Random) -> None:
    """Damage a published checkpoint as a failing disk might."""
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    path = folder / "manifest.json" if detail == "manifest" else generator.choice(files)
    content = path.read_bytes()
    if detail == "delete":
        path.unlink()
    elif detail == "truncate":
        path.write_bytes(content[: generator.randrange(len(content))])
    elif detail == "manifest":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = generator.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]
        )


def harm_data(prefix: Path, detail: str) -> Path:
    """Damage a data set, and say which file."""
    path = prefix.with_suffix(".idx" if detail == "flip_idx" else ".bin")
    content = bytearray(path.read_bytes())
    if detail == "truncate_bin":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def install(place: str, step: int) -> None:
    """Make this process kill itself at a place of its code."""
    from dash_megatron.checkpoint import files, saving, stored
    from dash_megatron.checkpoint.folder import tag_of
    from dash_megatron.training.engine import Engine

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    tag = tag_of(step)
    if place == "step":
        update, calls = Engine.step, iter(range(10**9))

        def step_and_die(engine: Any, *arguments: Any, **options: Any) -> Any:
            if next(calls) == 2 * step + 1:  # in the midst of the micro-batches
                die()
            return update(engine, *arguments, **options)

        Engine.step = step_and_die  # type: ignore[method-assign]
    elif place == "copy":
        copy = saving.Checkpointer._describe

        def copy_and_die(self: Any, saved: int, *arguments: Any) -> Any:
            if saved == step:
                die()
            return copy(self, saved, *arguments)

        saving.Checkpointer._describe = copy_and_die  # type: ignore[method-assign]
    elif place == "write":
        write = files.write_tensors

        def write_and_die(path: Path, tensors: Any) -> Any:
            entry = write(path, tensors)
            if tag in str(path):
                path.write_bytes(path.read_bytes()[: entry["bytes"] // 2])
                die()
            return entry

        files.write_tensors = write_and_die
    elif place in ("before_rename", "after_rename"):
        rename = os.rename

        def rename_and_die(source: Any, target: Any) -> None:
            mine = str(target).endswith(tag)
            if mine and place == "before_rename":
                die()
            rename(source, target)
            if mine:
                die()

        saving.os.rename = rename_and_die  # type: ignore[assignment]
    elif place == "load":
        read, reads = stored.StoredState.read, iter(range(10**9))

        def read_and_die(self: Any, *arguments: Any) -> Any:
            if next(reads) == 10:
                die()
            return read(self, *arguments)

        stored.StoredState.read = read_and_die  # type: ignore[method-assign]
