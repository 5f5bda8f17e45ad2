"""What layers keep for the backward pass, and that computing the rest again changes nothing."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_megatron.layers.recompute import with_recomputed_input
from tests.layers.test_gpt_model import config_of, cu_seqlens_of, model_of, positions_of, tokens_of


class Product(torch.autograd.Function):
    """A matrix product that saves its input as Megatron's layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return d_out @ weight.T, x.flatten(0, -2).T @ d_out.flatten(0, -2)


def test_an_input_that_is_computed_again_is_not_kept_and_gives_the_same_gradients() -> None:
    made: list[weakref.ref[Tensor]] = []

    def results(
        run: Callable[[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor], Tensor],
    ) -> Any:
        torch.manual_seed(0)
        x, first, second = (torch.randn(size, requires_grad=True) for size in ((5, 3, 8), (8, 16), (16, 4)))

        def make(x: Tensor) -> Tensor:
            y = (x @ first).sin()
            made.append(weakref.ref(y))
            return y

        # x goes on, as a residual stream does
        out = run(lambda y: Product.apply(y, second), make, x).sum(-1) + x.sum(-1)
        alive = [y() is not None for y in made]
        (out**2).sum().backward()
        found = alive, len(made), [out, x.grad, first.grad, second.grad]
        made.clear()
        return found

    alive, calls, expected = results(lambda use, make, x: use(make(x)))
    assert (alive, calls) == ([True], 1)
    alive, calls, found = results(with_recomputed_input)
    assert (alive, calls) == ([False], 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(
    "attention",
    [{}, {"router_projections": True, "pool_heads": True, "query_pool": 3}, {"kind": "full"}],
    ids=["dash", "own router", "full"],
)
def test_every_way_to_recompute_gives_the_same_loss_and_gradients(attention: dict[str, Any]) -> None:
    lengths = (37, 1, 70, 20)

    def gradients(recompute: str) -> dict[str, Tensor]:
        config = config_of(
            attention=attention, training={"steps": 1, "global_batch": 1, "recompute": recompute}
        )
        torch.manual_seed(0)
        model = model_of(config)
        loss = model(
            tokens_of(128),
            positions_of(*lengths),
            labels=tokens_of(128, 1),
            cu_seqlens=cu_seqlens_of(*lengths),
        )
        loss.mean().backward()
        return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}

    expected = gradients("none")
    for recompute in ("selective", "attention", "full"):
        found = gradients(recompute)
        assert torch.equal(found["loss"], expected["loss"]), recompute
        for name, gradient in expected.items():
            # on CPU a norm's input gets its gradient in several parts, which selective adds up in another order
            error = (found[name] - gradient).abs().max() / gradient.abs().max()
            assert error <= (1e-6 if recompute == "selective" else 0), (recompute, name, error)
