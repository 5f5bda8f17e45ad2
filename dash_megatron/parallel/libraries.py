"""Megatron-core, imported without a compiler and a tracker that nothing here uses: processes start seconds earlier."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Meanwhile `torch.compile` leaves functions as they are, and there is no wandb.

    For imports of libraries which decorate functions so that training never calls: only to wrap the first, torch imports
    all of TorchInductor. A run that is shown at Weights & Biases imports wandb by itself.
    """
    compiled, tracker = torch.compile, sys.modules.get("wandb")

    def as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        return as_it_is if function is None else function

    torch.compile = as_it_is  # type: ignore[assignment]
    sys.modules["wandb"] = tracker  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled
        if tracker is None:
            del sys.modules["wandb"]


with without_compiler():
    import megatron.core  # noqa: F401
