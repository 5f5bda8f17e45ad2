"""Computing a batch again that a run has kept, because its loss or gradient was wrong."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.__main__ import main
from dash_megatron.config import Config, ParallelConfig, config_from_dict
from dash_megatron.data.batches import PackedBatch, pack_samples
from dash_megatron.doctor import replay
from dash_megatron.layers import build_model, init_weights
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups
from dash_megatron.training.faults import Fault, write_fault
from dash_megatron.training.setup import write_config

EOD, VOCAB, LENGTH = 1, 320, 128


@pytest.fixture
def config(tiny_config: dict[str, Any]) -> Config:
    Path(tiny_config["run_dir"]).mkdir()
    config = config_from_dict(tiny_config)
    write_config(config, "no commit")
    return config


def micro_batches(sample_ids: list[int]) -> list[PackedBatch]:
    """One of two samples, and one of one; each sample has documents of 50 and 78 tokens."""
    rows = []
    for sample in sample_ids:
        tokens = torch.randint(2, VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(sample))
        tokens[49] = EOD
        rows.append({"tokens": tokens[:-1], "labels": tokens[1:]})
    return [
        pack_samples(rows[:2], EOD, sample_ids=sample_ids[:2]),
        pack_samples(rows[2:], EOD, sample_ids=sample_ids[2:]),
    ]


@pytest.fixture
def kept(config: Config) -> Config:
    """A run that kept samples 8 to 10 of step 7, and has no checkpoint."""
    fault = Fault(7, "the loss is nan", float("nan"), float("nan"), 8, 3, "skip")
    write_fault(config.run_dir, fault, micro_batches([8, 9, 10]), 0, 0, main=True)
    return config


def weights_of(config: Config, change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    model = build_model(config, VOCAB)
    init_weights(model, config.training.seed, config.model.init_std)
    destroy_process_groups()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    change(weights)
    return weights


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_sound_batch_shows_each_samples_loss_in_the_runs_precision(
    precision: str, dtype: str, kept: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    training = kept.training.model_copy(update={"precision": precision})
    write_config(kept.model_copy(update={"training": training}), "no commit")
    assert main(["doctor", "replay", kept.run_dir, "7"]) == 0
    text = capsys.readouterr().out
    assert "the loss is nan (step 7, training samples 8 to 10)" in text
    assert f"initial weights, as there is no checkpoint at or before step 7, {dtype} on " in text
    losses = {int(s): float(x) for s, x in re.findall(r"^(\d+) +(\d\.\d+) +tokens", text, re.MULTILINE)}
    assert losses.keys() == {8, 9, 10}
    # a model that knows nothing yet
    assert all(5.5 < loss < 6.1 for loss in losses.values())
    assert "every output is finite" in text


def test_losses_and_gradients_are_those_of_the_global_batch(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    model = build_model(config, VOCAB, device)
    init_weights(model, 0, 0.2)
    batches = micro_batches([8, 9, 10])
    result = replay.replay_batches(model, batches, LENGTH)

    model.zero_grad()
    losses = []
    for sample in (8, 9, 10):
        batch = micro_batches([sample, sample, sample])[1].to(device)
        loss = model(batch.tokens, batch.position_ids, batch.labels, batch.cu_seqlens)
        losses.append(loss[batch.loss_mask])
    torch.cat(losses).mean().backward()
    expected = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    destroy_process_groups()

    for sample, alone in zip(result.samples, losses, strict=True):
        assert sample.loss == pytest.approx(alone.mean().item(), rel=1e-5)
        documents = {(0, 50): alone[:49].mean().item(), (50, 128): alone[49:].mean().item()}
        assert sample.document == max(documents, key=lambda bounds: documents[bounds])
        assert sample.document_loss == pytest.approx(max(documents.values()), rel=1e-5)
    assert result.gradient_norms == pytest.approx(expected, rel=1e-4)
    assert result.is_finite


def test_replay_takes_the_checkpoint_before_and_names_the_module(
    kept: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def break_layer_1(weights: dict[str, torch.Tensor]) -> None:
        weights["decoder.layers.1.mlp.linear_fc1.weight"][0, 0] = float("inf")

    weights = weights_of(kept, break_layer_1)

    def load_weights(run_dir: str, step: int) -> tuple[Config, int, dict[str, torch.Tensor]]:
        asked.append(step)
        return kept, step, weights

    monkeypatch.setattr(replay, "finished_steps", lambda run_dir: [4, 6, 8])
    monkeypatch.setattr(replay, "load_weights", load_weights)
    assert main(["doctor", "replay", kept.run_dir, "7"]) == 1
    assert asked == [6]
    text = capsys.readouterr().out
    assert "weights of step 6" in text
    assert "first module with an output that is not finite: decoder.layers.1.mlp.linear_fc1" in text
    # what is not finite comes first
    groups = [line for line in text.splitlines() if "decoder.layers.0.mlp" in line or "embedding;" in line]
    assert any("nan" in line for line in groups)
    assert re.search(r"^8 +nan", text, re.MULTILINE)


def test_a_non_finite_gradient_is_found_though_outputs_are_finite(
    kept: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = replay.build_model

    def build_with_broken_backward(*arguments: Any) -> Any:
        model = build(*arguments)
        weight = model.decoder.layers[1].mlp.linear_fc2.weight
        weight.register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(replay, "build_model", build_with_broken_backward)
    assert main(["doctor", "replay", kept.run_dir, "7"]) == 1
    text = capsys.readouterr().out
    assert "losses or gradients are not finite although the outputs of all modules are" in text
    worst = text[text.index("by group") :].splitlines()[1]
    assert worst.split() == ["nan", "decoder.layers.1.mlp;", "decoder.layers.1.mlp.linear_fc2.weight", "nan"]


def test_a_step_of_which_nothing_was_kept_is_exit_code_2(
    kept: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "replay", kept.run_dir, "9"]) == 2
    assert "step_00000009 has no fault.json" in capsys.readouterr().err
    assert main(["doctor", "replay", f"{kept.run_dir}_nowhere", "9"]) == 2
    assert "_nowhere does not exist; give the folder of a run" in capsys.readouterr().err
