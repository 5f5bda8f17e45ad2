"""What a checkpoint saves and restores: the interface of an engine, and this process's random state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class TrainingState(Protocol):
    """A model and its optimizer, of which this process keeps fragments; `training.engine.Engine` is one.

    Kinds of tensors are `weight` (float32 master weights), `exp_avg` and `exp_avg_sq` (Adam's moments).
    """

    @property
    def model(self) -> torch.nn.Module:
        """The model, whose weights may be sharded."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Float32 views, by `KIND/NAME`, of all that this process alone keeps."""
        ...

    def fragment_starts(self) -> dict[str, int]:
        """First element, in each flattened parameter, of what this process keeps of it."""
        ...

    def adam_steps(self) -> int:
        """Updates that Adam has made."""
        ...

    def local_shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter, whole but for tensor parallelism."""
        ...

    def load_state(self, read: Callable[[str, str, int, int], Tensor], adam_steps: int) -> None:
        """Set all of it from `read(kind, name, start, numel)`; collective."""
        ...


def random_state() -> dict[str, Tensor]:
    """States of torch's generators of this process, by device."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Take up what `random_state` gave."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
