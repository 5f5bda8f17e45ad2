"""Kernels for tests: compiled where there is a GPU, interpreted on CPU tensors elsewhere."""

import importlib
import os
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton

from dash_megatron.ops.types import Router

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Relative errors |x - ref| / |ref| allowed: of the output, of the gradients.
TOLERANCE = {
    torch.float32: (2e-4, 2e-3),
    torch.bfloat16: (1e-2, 4e-2),  # 2 ** -9 of every operand, and chunks at the threshold that change sides
    torch.float16: (2e-3, 2e-2),
}


def import_kernels(*names: str) -> tuple[ModuleType, ...]:
    """Modules of `dash_megatron.ops.kernels`, and "topk.triton". Whether kernels are interpreted is settled when they are first imported."""
    route = sys.modules.get("dash_megatron.ops.kernels.route")
    if not CUDA and isinstance(getattr(route, "_route_kernel", None), triton.JITFunction):
        for name in [
            x
            for x in sys.modules
            if x.startswith(("dash_megatron.ops.kernels", "dash_megatron.ops.topk.triton"))
        ]:
            del sys.modules[name]
    full_names = [f"dash_megatron.ops.{x}" if "." in x else f"dash_megatron.ops.kernels.{x}" for x in names]
    with mock.patch.dict(os.environ, {} if CUDA else {"TRITON_INTERPRET": "1"}):
        return tuple(importlib.import_module(name) for name in full_names)


def with_router(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `dash_attention` as its implementations take them: the router's constants as one value."""
    constants = {name: value for name, value in settings.items() if name in Router._fields}
    others = {name: value for name, value in settings.items() if name not in Router._fields}
    return {"router": Router(**constants), **others}
