"""The feed-forward part of a layer: SwiGLU between two projections without biases."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from dash_megatron.ops.swiglu import swiglu


class FeedForward(MLP):
    """Megatron's, whose activation reads and writes as little as it can."""

    def forward(self, hidden_states: Tensor, **ignored: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """[N, B, hidden_size] -> the same shape, and None for a bias; arguments of experts and inference are ignored."""
        return self.linear_fc2(self.activate(hidden_states))

    def activate(self, hidden_states: Tensor) -> Tensor:
        """What the second projection takes in."""
        return swiglu(self.linear_fc1(hidden_states)[0])
