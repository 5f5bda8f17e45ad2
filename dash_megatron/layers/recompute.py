"""Transformer layers that keep less for the backward pass and compute it again: `training.recompute`.

Megatron-core's own selective recomputation is not used: it reads the random state of CUDA, which a CPU has not, and needs
Transformer Engine where it discards outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Out = TypeVar("Out")


class RecomputedTransformerLayer(TransformerLayer):
    """A transformer layer whose backward runs its forward again instead of keeping activations."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """As `TransformerLayer.forward`."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, **kwargs)
        # re-entrant, because ZeRO-3 regathers parameters by module hooks that only a full re-run triggers
        run = functools.partial(super().forward, **kwargs)
        return checkpoint(run, hidden_states, use_reentrant=True, preserve_rng_state=False)


class SelectiveTransformerLayer(TransformerLayer):
    """A transformer layer that keeps all of attention, and of the feed-forward part only its input.

    The backward computes norm, first matrix product and activation of the feed-forward part again. Its second product is
    not repeated: its output is part of the residual stream.
    """

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        out_and_bias = with_recomputed_input(self.mlp.linear_fc2, self._activate, hidden_states)
        return self._forward_post_mlp(out_and_bias, hidden_states)

    def _activate(self, hidden_states: Tensor) -> Tensor:
        return self.mlp.activate(self.pre_mlp_layernorm(hidden_states))


def with_recomputed_input(use: Callable[[Tensor], Out], make: Callable[[Tensor], Tensor], x: Tensor) -> Out:
    """`use(make(x))`, of whose backward `make(x)` is computed again instead of being kept.

    Args:
        use: keeps what it takes in for its backward as it is, such as a matrix product; is not run again.
        make: keeps nothing; deterministic.
        x: kept, and needs a gradient.
    """
    computation = _Recomputation(make, x)
    y = _Recomputed.apply(x, computation)
    address, size = y.data_ptr(), y.numel()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == address and kept.numel() == size else kept

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else computation.again()[1].detach().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return use(y)


class _Recomputation:
    """Input, and once the backward asks for it output, of a function that is computed twice."""

    def __init__(self, make: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.make, self.x = make, x
        self._again: tuple[Tensor, Tensor] | None = None

    def again(self) -> tuple[Tensor, Tensor]:
        """Input and output of a second computation, which autograd follows; the same ones until `take`."""
        if self._again is None:
            x = self.x.detach().requires_grad_()
            with torch.enable_grad():
                self._again = x, self.make(x)
        return self._again

    def take(self) -> tuple[Tensor, Tensor]:
        """As `again`, and forget them."""
        both, self._again = self.again(), None
        return both


class _Recomputed(torch.autograd.Function):
    """The first computation, whose backward goes through the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, computation: _Recomputation) -> Tensor:
        ctx.computation = computation
        return computation.make(x)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        x, y = ctx.computation.take()
        torch.autograd.backward(y, d_y)
        return x.grad, None
