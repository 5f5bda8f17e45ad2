"""AdamW as runs use it: which parameters decay, and which updates are skipped. `engine.py` gives it to DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dash_megatron.checkpoint.fragments import adam_state
from dash_megatron.config import Config
from dash_megatron.layers.core_attention import MAX_LOG_FACTOR


def parameter_groups(model: torch.nn.Module, config: Config) -> list[dict[str, Any]]:
    """Parameters by weight decay: matrices; norms, biases and summary queries, which have none; learned factors, if any.

    Adam moves a parameter by at most about the learning rate, so that decay w keeps it within 1 / w. The decay of factors is
    such that their logarithms stay within `MAX_LOG_FACTOR`, however long a run is.
    """
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    factors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if name.endswith("log_scaling"):
            factors.append(parameter)
        else:
            (kept if parameter.dim() == 1 or name.endswith("summary_query") else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": kept, "weight_decay": 0.0},
        {"params": factors, "weight_decay": config.attention.learned_scaling / MAX_LOG_FACTOR},
    ]
    return [group for group in groups if group["params"]]


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that skips an update when told to, or when the global gradient norm is non-finite (NaN or inf).

    DeepSpeed knows that norm only within its own step, right before it calls this one. Its wrappers skip such
    updates too, except those of bf16 under ZeRO 1 and 2; without ZeRO nothing does.
    """

    skip = False
    norm_of_this_update: Callable[[], float] | None = None
    update: Callable[[], None] | None = None
    """What updates weights in place of `torch.optim.AdamW`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update weights; where the update is skipped, only make the moments that a first update would make."""
        norm = self.norm_of_this_update
        if not self.skip and (norm is None or math.isfinite(norm())):
            return self.update() if self.update is not None else super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                adam_state(self, parameter)
        return None
