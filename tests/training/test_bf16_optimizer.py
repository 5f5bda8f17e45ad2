"""What replaces DeepSpeed's passes over gradients and weights, beside DeepSpeed and torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from dash_megatron.config import ParallelConfig
from dash_megatron.ops.adamw import adamw_step
from dash_megatron.parallel import Launch, init_process_groups
from dash_megatron.training import gradient_sums
from dash_megatron.training.engine import Engine
from tests.layers.test_gpt_model import config_of, model_of, positions_of, tokens_of
from tests.training.test_checkpoint import leave_groups
from tests.training.test_global_batch import assert_same_step, relative_error, with_changes
from tests.training.workers import steps_in_bf16

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def single_process() -> Iterator[None]:
    leave_groups()
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    yield
    leave_groups()


def test_one_pass_makes_the_update_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1000, generator=generator, dtype=torch.float64).requires_grad_()
    adamw = torch.optim.AdamW([reference], **ADAMW)
    master = reference.detach().float()
    moments, weight = torch.zeros(2, 1000), torch.zeros(1000, dtype=torch.bfloat16)
    for step in range(1, 6):
        gradient = torch.randn(1000, generator=generator)
        reference.grad = 0.25 * gradient.double()
        adamw.step()
        adamw_step(master, gradient, *moments, weight, clip=0.25, step=step, **ADAMW)
    torch.testing.assert_close(master.double(), reference.detach(), rtol=1e-5, atol=1e-6)
    state = adamw.state[reference]
    torch.testing.assert_close(moments[0].double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moments[1].double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-7)
    assert torch.equal(weight, master.bfloat16())


def train(by_deepspeed: bool, early: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms of a skipped update and another one, of two micro-batches each, and what is kept after them.

    Beyond one update, weights that are rounded to their neighbours in bf16 would make gradients differ. `early` is as several
    processes add gradients up.
    """
    config = config_of(
        training={"global_batch": 2, "micro_batch": 1, "precision": "bf16"},
        attention={"kind": "full"},
        optimizer={"lr": 1e-2, "grad_clip": 0.5},
    )
    engine = Engine(model_of(config), config, world_size=1)
    if by_deepspeed:
        engine._optimizer.__class__, engine._adam.update = BF16_Optimizer, None
    if early:
        engine._optimizer.sums = gradient_sums.GradientSums(engine._optimizer)
    unused = dict(engine.model.named_parameters())["decoder.layers.1.pre_mlp_layernorm.weight"]
    norms = []
    for step in range(2):
        for seed in range(2):
            inputs = tokens_of(64, seed + 2 * step), positions_of(64), tokens_of(64, seed + 100)
            loss = engine.forward(*inputs, None, None, None, torch.full((1, 64), 1 / 128))
            # a parameter without a gradient in one step keeps none of the last one's
            unused.requires_grad_(step == 0)
            engine.backward(loss)
            engine.skip_update(step == 0)
            engine.step()
        norms.append(engine.grad_norm())
    return norms, {name: tensor.clone() for name, tensor in engine.state().items()}


@pytest.mark.usefixtures("single_process")
def test_gradients_and_updates_are_those_of_deepspeed() -> None:
    expected_norms, expected = train(by_deepspeed=True)
    norms, found = train(by_deepspeed=False)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("single_process")
def test_deepspeed_waits_for_the_device_in_no_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(
        training={"global_batch": 2, "micro_batch": 1, "precision": "bf16"}, attention={"kind": "full"}
    )
    engine = Engine(model_of(config), config, world_size=1)
    waits: list[None] = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append(None))
    # it would begin with the third step
    for seed in range(6):
        engine.backward(
            engine.forward(tokens_of(64, seed), positions_of(64), tokens_of(64, seed + 100)).mean()
        )
        engine.step()
    assert not waits


@pytest.mark.usefixtures("single_process")
def test_gradients_are_added_up_over_processes_while_the_backward_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norms, expected = train(by_deepspeed=False)
    monkeypatch.setattr(gradient_sums, "MIN_BUCKET_ELEMENTS", 1000)
    finish, left = gradient_sums.GradientSums.finish, []

    def count_and_finish(self: Any) -> None:
        left.append((len(self._buckets) - self._sent, len(self._buckets)))
        finish(self)

    monkeypatch.setattr(gradient_sums.GradientSums, "finish", count_and_finish)
    found_norms, found = train(by_deepspeed=False, early=True)
    assert found_norms == norms
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (left_of_one, buckets), (left_of_other, _) = left
    assert buckets > 4
    assert left_of_one == 0, "all were sent before the backward had ended"
    # a bucket waits for a gradient that does not come, and those after it wait for the bucket
    assert 0 < left_of_other < buckets


def test_processes_get_the_sums_and_updates_of_deepspeed(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(
        tiny_config,
        model={"layers": 1},
        # every parameter group
        attention={"learned_scaling": True},
        optimizer={"lr": 0.03, "eps": 2e-3, "grad_clip": 0.1},
        # two micro-batches of each process, and a validation between steps
        training={"steps": 2, "global_batch": 4, "micro_batch": 1, "precision": "bf16"},
        evaluation={"every": 1, "samples": 2},
        zero={"stage": 1},
    )
    trees = {"untied": tree, "tied": with_changes(tree, model={"tie_embeddings": True})}
    cases = [
        (f"{name}_{by}", case, by == "deepspeed", False)
        for name, case in trees.items()
        for by in ("us", "deepspeed")
    ]
    run_processes(2, steps_in_bf16, [*cases, ("lacking", tree, False, True)], str(tmp_path))
    for name in trees:
        expected = torch.load(tmp_path / f"{name}_deepspeed_0.pt")
        copies = [torch.load(tmp_path / f"{name}_us_{rank}.pt") for rank in range(2)]
        for found in copies:
            assert_same_step(found, expected, 1e-6)
            for parameter, weight in expected["weights"].items():
                # a weight that rounds to its neighbour in bf16 makes other gradients of the second step
                assert relative_error(found["weights"][parameter], weight) <= 1e-3, (name, parameter)
    # a norm without it would clip the weights of one process otherwise than those of another
    norms = [torch.load(tmp_path / f"lacking_{rank}.pt")["norm"] for rank in range(2)]
    assert norms[0] == norms[1]
