"""New memory that no code may read before it has written to it."""

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, what `torch.empty` and `torch.empty_like` give is NaN, or an integer that points nowhere."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(x: Tensor) -> Tensor:
        if x.requires_grad:
            return x  # torch's own, in checkpointing
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: filled(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: filled(empty_like(*args, **kwargs)))
