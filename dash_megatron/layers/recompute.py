"""Transformer layers that keep less for the backward pass and compute it again: `training.recompute`.

Megatron-core's own selective recomputation is not used: it reads the random state of CUDA, which a CPU has not, and needs
Transformer Engine where it discards outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from megatron.core.transformer import transformer_layer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Out = TypeVar("Out")

MAX_ACTIVATED = 2**29
"""What the activation of a feed-forward part gives on one process at once, in elements, where layers are recomputed (1 GiB in bf16)."""


class TransformerLayer(transformer_layer.TransformerLayer):
    """Megatron's, whose backward first begins what attention's backward will wait for: one rank may come there late."""

    def _forward_post_mlp(self, *arguments: Any) -> Any:
        start = self.self_attention.core_attention.backward_start
        return start.watch(super()._forward_post_mlp(*arguments))


class RecomputedTransformerLayer(TransformerLayer):
    """A transformer layer whose backward runs its forward again instead of keeping activations.

    Of many tokens the feed-forward part goes piece by piece, of about `MAX_ACTIVATED`: in the backward each is computed again and
    differentiated before the next. Where ZeRO 3 shards weights there is one piece, because hooks of modules gather them.
    """

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """As `TransformerLayer.forward`."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, **kwargs)
        # re-entrant, because ZeRO-3 regathers parameters by module hooks that only a full re-run triggers
        run = functools.partial(super().forward, **kwargs)
        return checkpoint(run, hidden_states, use_reentrant=True, preserve_rng_state=False)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = super()._forward_mlp

        def run(x: Tensor) -> Tensor:
            return whole(x, *args, **kwargs)

        rows = self._rows_of_a_piece(hidden_states)
        every = *self.pre_mlp_layernorm.parameters(), *self.mlp.parameters()
        parameters = [parameter for parameter in every if parameter.requires_grad]
        wanted = torch.is_grad_enabled() and not self.training
        if wanted or rows >= len(hidden_states) or any(hasattr(p, "ds_id") for p in parameters):
            return run(hidden_states)
        if not torch.is_grad_enabled():
            return _piecewise(run, hidden_states, rows)
        # in training only the backward comes here with a gradient
        return _Differentiated.apply(run, rows, hidden_states, *parameters)

    def _rows_of_a_piece(self, hidden_states: Tensor) -> int:
        """How many rows of hidden states [N, B, hidden_size] one piece takes.

        Under sequence parallelism these are this rank's share of the rows that the activation sees.
        """
        rows, batch, _ = hidden_states.shape
        shares = self.mlp.tp_group.size() if self.config.sequence_parallel else 1
        activated = rows * batch * shares * self.mlp.linear_fc2.input_size_per_partition
        return math.ceil(rows / math.ceil(activated / MAX_ACTIVATED))


def _piecewise(run: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Compute `run(x)` some rows at a time, without a gradient."""
    out = torch.empty_like(x)
    for own, own_out in zip(x.split(rows), out.split(rows), strict=True):
        own_out.copy_(run(own))
    return out


class _Differentiated(torch.autograd.Function):
    """A function of single rows, whose backward computes and differentiates it some rows at a time.

    The forward computes nothing and returns zeros: it runs only where nobody reads its values.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], rows: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.run, ctx.rows, ctx.parameters = run, rows, parameters
        ctx.save_for_backward(x)
        # takes the memory of one element
        return x.new_zeros(()).expand_as(x)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        sums = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in ctx.parameters
        ]
        for piece in zip(x.split(ctx.rows), d_out.split(ctx.rows), d_x.split(ctx.rows), strict=True):
            _differentiate(ctx.run, ctx.parameters, *piece, sums)
        return None, None, d_x, *(total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True))


def _differentiate(
    run: Callable[[Tensor], Tensor],
    parameters: tuple[Tensor, ...],
    x: Tensor,
    d_out: Tensor,
    d_x: Tensor,
    sums: list[Tensor],
) -> None:
    """Write the gradient of x, and add those of parameters.

    A function, so that what a piece leaves is forgotten before the next one.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = run(x)
    own, *found = torch.autograd.grad(out, (x, *parameters), d_out)
    d_x.copy_(own)
    for total, gradient in zip(sums, found, strict=True):
        total.add_(gradient)


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
    """Compute `use(make(x))`; its backward computes `make(x)` again instead of keeping it.

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
    """A function and its input, and what a second computation gives, once the backward asks for it."""

    def __init__(self, make: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.make, self.x = make, x
        self._again: tuple[Tensor, Tensor] | None = None

    def again(self) -> tuple[Tensor, Tensor]:
        """Input and output of the second computation, which autograd follows; computed once, and kept until `take`."""
        if self._again is None:
            x = self.x.detach().requires_grad_()
            with torch.enable_grad():
                self._again = x, self.make(x)
        return self._again

    def take(self) -> tuple[Tensor, Tensor]:
        """Give what `again` gives, and forget it."""
        both, self._again = self.again(), None
        return both


class _Recomputed(torch.autograd.Function):
    """The first computation, without autograd; its backward goes through the second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, computation: _Recomputation) -> Tensor:
        ctx.computation = computation
        return computation.make(x)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        x, y = ctx.computation.take()
        torch.autograd.backward(y, d_y)
        return x.grad, None
