"""What tests of kernels share."""

import pytest
import torch

from tests.ops.checked_addresses import check_addresses
from tests.ops.poison import poison
from tests.ops.quick_interpreter import quicken


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody writes is NaN, or an integer that points nowhere; without a GPU, kernels are interpreted and keep to their tensors."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        quicken(monkeypatch)
        check_addresses(monkeypatch)
    poison(monkeypatch)
