"""Kernels for tests: compiled where there is a GPU, interpreted on CPU tensors elsewhere (`tests/conftest.py`)."""

from typing import Any

import torch

from dash_megatron.ops.types import Router

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Relative errors |x - ref| / |ref| allowed: of the output, of the gradients.
TOLERANCE = {
    torch.float32: (2e-4, 2e-3),
    torch.bfloat16: (1e-2, 4e-2),  # 2 ** -9 of every operand, and chunks at the threshold that change sides
    torch.float16: (2e-3, 2e-2),
}


def with_router(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `dash_attention` as its implementations take them: the router's constants as one value."""
    constants = {name: value for name, value in settings.items() if name in Router._fields}
    others = {name: value for name, value in settings.items() if name not in Router._fields}
    return {"router": Router(**constants), **others}


def relative_error(x, expected, floor=0.0):
    """Norm of the difference over the norm of what is expected, or over `floor` where that is more."""
    expected = expected.double()
    return ((x.double() - expected).norm() / expected.norm().clamp_min(floor)).item()
