"""What tests of kernels share."""

import pytest
import torch

from tests.ops.checked_addresses import check_addresses
from tests.ops.quick_interpreter import quicken


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody writes is NaN, or an integer that points nowhere; without a GPU, kernels are interpreted and keep to their tensors."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        quicken(monkeypatch)
        check_addresses(monkeypatch)
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            return x  # torch's own, in checkpointing
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
