"""What layers keep for the backward pass, and that computing the rest again changes nothing."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_megatron.layers import recompute as recompute_module
from dash_megatron.layers.recompute import (
    RecomputedTransformerLayer,
    _Differentiated,
    with_recomputed_input,
)
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


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_attentions_backward_waits_for_is_begun_before_the_feed_forward_parts(recompute: str) -> None:
    model, log = model_in_pieces({}, recompute), []

    class Start:
        def prepare(self, *_: Any) -> None: ...

        def watch(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                x.register_hook(lambda _: log.append("begin"))
            return x

    for layer in model.decoder.layers:
        layer.self_attention.core_attention.backward_start = Start()
        for name, part in (
            ("feed-forward", layer.mlp.linear_fc2),
            ("attention", layer.self_attention.linear_proj),
        ):
            part.weight.register_hook(lambda _, name=name: log.append(name))
    model(
        tokens_of(128), positions_of(128), labels=tokens_of(128, 1), cu_seqlens=cu_seqlens_of(128)
    ).mean().backward()
    assert [name for name, before in zip(log, [None, *log], strict=False) if name != before] == [
        "begin", "feed-forward", "attention",
    ] * len(model.decoder.layers)  # fmt: skip


FFN = 96


def model_in_pieces(attention: dict[str, Any], recompute: str = "full") -> torch.nn.Module:
    """In float64, so that sums of pieces are those of the whole."""
    training = {"steps": 1, "global_batch": 1, "recompute": recompute}
    torch.manual_seed(0)
    return model_of(config_of(attention=attention, training=training)).double()


@pytest.fixture
def three_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 tokens."""
    monkeypatch.setattr(recompute_module, "MAX_ACTIVATED", 50 * FFN)


@pytest.mark.usefixtures("single_process", "three_pieces")
@pytest.mark.parametrize("documents", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("kind", ["dash", "full"])
def test_a_feed_forward_part_in_pieces_gives_the_loss_and_gradients_of_the_whole(
    kind: str, documents: bool
) -> None:
    lengths = (37, 1, 70, 20)

    def results(recompute: str) -> dict[str, Tensor]:
        model = model_in_pieces({"kind": kind}, recompute)
        embedded: list[Tensor] = []

        def keep(module: torch.nn.Module, inputs: Any, hidden: Tensor) -> None:
            hidden.retain_grad()
            embedded.append(hidden)

        model.embedding.register_forward_hook(keep)
        tokens, labels = tokens_of(128), tokens_of(128, 1)
        if documents:
            inputs = {"position_ids": positions_of(*lengths), "cu_seqlens": cu_seqlens_of(*lengths)}
        else:
            inputs = {"position_ids": positions_of(64).expand(2, -1)}
            tokens, labels = tokens.view(2, 64), labels.view(2, 64)
        loss = model(tokens, labels=labels, loss_weight=torch.ones(tokens.shape), **inputs)
        loss.backward()
        found = {"loss": loss.detach(), "input": embedded[0].grad}
        return found | {name: p.grad for name, p in model.named_parameters()}

    expected, found = results("none"), results("full")
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert (found[name] - one).abs().max() <= 1e-13 * one.abs().max(), name


@pytest.mark.usefixtures("single_process", "three_pieces")
def test_of_pieces_of_a_feed_forward_part_one_is_alive_and_each_parameter_gets_its_gradient_once() -> None:
    model = model_in_pieces({})
    rows: list[int] = []
    activated: list[weakref.ref[Tensor]] = []
    gradients: dict[str, int] = {}

    def see(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(len(inputs[0]))
        assert not (module.training and [one for one in activated if one() is not None])
        activated.append(weakref.ref(inputs[0]))

    def count(name: str) -> Callable[[Tensor], None]:
        return lambda _: gradients.update({name: gradients.get(name, 0) + 1})

    for layer in model.decoder.layers:
        layer.mlp.linear_fc2.register_forward_pre_hook(see)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(name))
    arguments = {"tokens": tokens_of(128), "position_ids": positions_of(128), "labels": tokens_of(128, 1)}
    arguments["loss_weight"] = torch.ones(1, 128)
    loss = model(**arguments)
    assert rows == [43, 43, 42] * 2
    loss.backward()
    # the same once more, and no more
    assert rows == [43, 43, 42] * 4
    assert gradients == dict.fromkeys(dict(model.named_parameters()), 1)
    # without training: in pieces where nothing is kept, and whole where a gradient may be wanted
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**arguments), loss.detach())
    assert rows == [43, 43, 42] * 6
    torch.testing.assert_close(model(**arguments), loss)
    assert rows == [43, 43, 42] * 6 + [128] * 2


@pytest.mark.usefixtures("single_process", "three_pieces")
def test_weights_that_do_not_learn_leave_other_gradients_of_pieces_as_they_are() -> None:
    def gradients(recompute: str) -> dict[str, Tensor | None]:
        model = model_in_pieces({}, recompute)
        for layer in model.decoder.layers:
            layer.mlp.linear_fc2.weight.requires_grad_(False)
        arguments = {"position_ids": positions_of(128), "loss_weight": torch.ones(1, 128)}
        model(tokens_of(128), labels=tokens_of(128, 1), **arguments).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected, found = gradients("none"), gradients("full")
    for name, one in expected.items():
        assert (one is None) == (found[name] is None) == name.endswith("linear_fc2.weight"), name
        if one is not None:
            torch.testing.assert_close(found[name], one)


def test_pieces_are_of_what_a_tensor_parallel_rank_activates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute_module, "MAX_ACTIVATED", 24 * 48)
    feed_forward = SimpleNamespace(
        tp_group=SimpleNamespace(size=lambda: 2), linear_fc2=SimpleNamespace(input_size_per_partition=48)
    )
    rows = {}
    for sequence in (False, True):
        layer = SimpleNamespace(mlp=feed_forward, config=SimpleNamespace(sequence_parallel=sequence))
        rows[sequence] = RecomputedTransformerLayer._rows_of_a_piece(layer, torch.empty(30, 2, 8))
    # with sequence parallelism it gathers the tokens of two ranks: 120 in 5 pieces, not 60 in 3
    assert rows == {False: 10, True: 6}


def test_gradients_of_pieces_are_summed_in_float32() -> None:
    # every row adds the same; beyond 256, bf16 would not count it
    x = torch.ones(1024, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    _Differentiated.apply(lambda rows: rows * weight, 1, x, weight).backward(torch.ones_like(x))
    assert weight.grad.tolist() == [1024]
