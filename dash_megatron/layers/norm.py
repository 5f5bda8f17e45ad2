"""RMSNorm whose weight gets its whole gradient on every tensor-parallel rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Divide by the root mean square over the last dimension, then multiply by a weight.

    Args:
        config: Megatron's, of which nothing is read.
        hidden_size: length of the last dimension.
        eps: added to the mean square.
        input_is_sharded: each tensor-parallel rank normalises other tokens (sequence parallel) or other heads (queries
            and keys). The weight, of which all ranks hold the same copy, then gets the sum of their gradients in
            backward, so that whatever takes gradients afterwards finds them complete.
        ignored: Megatron's arguments of other norms.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        input_is_sharded: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        # Megatron's name for: partial gradients are to be summed over the tensor-parallel group
        self.weight.sequence_parallel = input_is_sharded  # type: ignore[attr-defined]
        self.input_is_sharded = input_is_sharded

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.input_is_sharded else self.weight
        return F.rms_norm(x, self.weight.shape, weight, self.eps)
