"""Where processes of a test compute: on the CPU over gloo, or on two or four GPUs over NCCL."""

from typing import Any

import pytest
import torch

NEEDS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
NEEDS_FOUR_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four NVIDIA GPUs")


def on_two_gpus(*values: Any) -> Any:
    """A parameter set that ends with True, whose test computes on two GPUs, has that in its name, and is skipped without them."""
    return pytest.param(*values, True, marks=NEEDS_TWO_GPUS, id="-".join(["two_gpus", *map(str, values)]))


def in_float32_on(cuda: bool, tree: dict[str, Any]) -> dict[str, Any]:
    """A run whose arithmetic is the reference's: that of kernels on a GPU is another, of products on tensor cores."""
    return {**tree, "attention": {**tree.get("attention", {}), "backend": "reference"}} if cuda else tree
