"""The loss and every gradient belong to the global batch, whatever the processes, micro-batches and ZeRO stages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.data.batches import num_target_tokens, pack_samples
from dash_megatron.data.dataset import build_dataset
from dash_megatron.data.tokenizer import Tokenizer
from tests.gpus import in_float32_on, on_two_gpus
from tests.training.workers import one_step, sum_gradients

# float32, sums in another order
TOLERANCE = 1e-5


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def with_changes(tree: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {**tree, **{name: {**tree.get(name, {}), **values} for name, values in sections.items()}}


def assert_same_step(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert found["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert gradient.norm() > 0, f"{name} has no gradient, so nothing is compared"
        assert relative_error(found["gradients"][name], gradient) <= tolerance, name


@pytest.mark.parametrize(
    ("processes", "micro_batches", "cuda"),
    [(1, 4, False), (2, 2, False), (4, 1, False), on_two_gpus(2, 2)],
)
def test_loss_and_gradients_do_not_depend_on_split_or_zero_stage(
    processes: int,
    micro_batches: int,
    cuda: bool,
    tiny_config: dict[str, Any],
    run_processes: Any,
    tmp_path: Path,
) -> None:
    assert tiny_config["training"]["global_batch"] == processes * micro_batches
    tree = in_float32_on(cuda, tiny_config)
    # one process, four micro-batches, nothing sharded
    run_processes(1, one_step, [("one", with_changes(tree, zero={"stage": 0}))], str(tmp_path), cuda=cuda)
    one = torch.load(tmp_path / "one.pt", map_location="cpu")
    cases = [(f"zero_{stage}", with_changes(tree, zero={"stage": stage})) for stage in (0, 1, 2, 3)]
    run_processes(processes, one_step, cases, str(tmp_path), cuda=cuda)
    for name, _ in cases:
        found = torch.load(tmp_path / f"{name}.pt", map_location="cpu")
        assert_same_step(found, one)
        for parameter, weight in one["weights"].items():
            # Adam divides by the gradient's size, which magnifies its rounding
            assert relative_error(found["weights"][parameter], weight) <= 1e-3, (name, parameter)


def test_one_process_keeps_the_float32_sum_of_bf16_gradients(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(tiny_config, training={"precision": "bf16"}, zero={"stage": 1})
    run_processes(1, one_step, [("bf16", tree)], str(tmp_path))
    for name, gradient in torch.load(tmp_path / "bf16.pt")["gradients"].items():
        if gradient.dim() > 1:
            assert not torch.equal(gradient.bfloat16().float(), gradient), f"{name} is rounded to bf16"


def test_bf16_gradients_of_several_processes_are_summed_in_float32_and_in_no_more_memory_than_they_need(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    # in bf16 256 + 1 is 256, and so is that + 1; each process takes two micro-batches
    addends = [256.0, 1.0, 1.0, 0.0]
    tree = with_changes(tiny_config, training={"precision": "bf16", "global_batch": 8})
    cases = [(f"zero_{stage}", with_changes(tree, zero={"stage": stage})) for stage in (0, 1, 2, 3)]
    run_processes(4, sum_gradients, cases, addends, str(tmp_path))
    for name, _ in cases:
        gradient, largest, updates = torch.load(tmp_path / f"{name}.pt")
        assert updates == 0, name
        assert gradient.unique().tolist() == [2 * sum(addends)], name
        # DeepSpeed alone would take room for 500 million gradients under ZeRO 2 and 3
        assert largest <= 8 * gradient.numel(), name


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_recomputation_and_scoring_in_pieces_leave_gradients_alone(
    stage: int, tied: bool, tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(tiny_config, zero={"stage": stage}, model={"tie_embeddings": tied, "qk_norm": True})
    run_processes(1, one_step, [("reference", with_changes(tree, zero={"stage": 0}))], str(tmp_path))
    cases = [
        (mode, with_changes(tree, training={"recompute": mode}))
        for mode in ("none", "selective", "attention", "full")
    ]
    # 128 tokens, a vocabulary of 320 and a feed-forward part 96 wide: four pieces of logits, three of what `full` activates
    run_processes(2, one_step, cases, str(tmp_path), 32 * 320, 1, 50 * 96)
    expected = torch.load(tmp_path / "reference.pt")
    for name, _ in cases:
        assert_same_step(torch.load(tmp_path / f"{name}.pt"), expected)


def test_micro_batches_of_these_tests_have_unequal_targets(
    tiny_config: dict[str, Any], tiny_data: Path
) -> None:
    tokenizer = Tokenizer(str(tiny_data / "tokenizer.model"))
    rows = build_dataset(
        tiny_config["data"]["train"],
        seq_length=tiny_config["data"]["seq_length"],
        num_samples=4,
        seed=1234,
        tokenizer=tokenizer,
        cache_dir=tiny_config["run_dir"],
    )
    counts = {int(num_target_tokens(pack_samples([rows[index]], tokenizer.eod))) for index in range(4)}
    assert len(counts) > 1, "rows have as many targets: a mean of means would pass the tests above"
