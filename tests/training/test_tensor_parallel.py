"""Tensor-parallel processes train as one process would, with and without sequence parallel, under every ZeRO stage."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.checkpoint.folder import checkpoint_folder, tag_of
from dash_megatron.checkpoint.weights import load_weights
from dash_megatron.layers.sharding import Split, join, shard, whole_shape
from dash_megatron.training.metrics import read_metrics
from dash_megatron.training.sample import sample_from_run
from tests.gpus import in_float32_on, on_two_gpus
from tests.training.test_global_batch import assert_same_step, relative_error, with_changes
from tests.training.test_resume import EXACT, run_of
from tests.training.workers import compare_fingerprints, one_step, save_logits, train_all

# the second update has the moments of the first
STEPS = 2
# float32, sums in another order
TOLERANCE = 1e-5
# of weights after so many updates
WEIGHT_TOLERANCE = 1e-6 * STEPS
# 8 bits of mantissa
BF16_TOLERANCE = 0.03

# sections; the router has its own projections in the second
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"model": {"qk_norm": True}},
    "tied": {
        "model": {"tie_embeddings": True, "qkv_bias": True},
        "attention": {"router_projections": True},
    },
}


@pytest.fixture
def tree(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """A run whose router drops chunks and whose updates keep the gradient's size: clipped, and with a large epsilon.

    Adam's own normalisation would hide a gradient of the wrong size, and magnify rounding where it is near 0.
    """
    return with_changes(
        tiny_config,
        attention={
            "scaling_factor": 10.0,
            "learned_scaling": True,
            "query_pool": 3,
            "pool_heads": True,
        },
        optimizer={"lr": 0.03, "eps": 2e-3, "grad_clip": 0.1},
        training={"steps": STEPS},
        evaluation={"every": STEPS, "samples": 5},
    )


def tensor_parallel(
    tree: dict[str, Any], stage: int, sequence: bool, **sections: dict[str, Any]
) -> dict[str, Any]:
    parallel = {"tensor": 2, "sequence": sequence}
    return with_changes(tree, zero={"stage": stage}, parallel=parallel, **sections)


def references(
    tree: dict[str, Any], run_processes: Any, folder: Path, steps: int = STEPS, cuda: bool = False
) -> dict[str, dict[str, Any]]:
    """Every model's run in one process."""
    cases = [(f"one_process_{name}", with_changes(tree, **sections)) for name, sections in MODELS.items()]
    run_processes(1, one_step, cases, str(folder), None, steps, cuda=cuda)
    return {name: loaded(folder / f"one_process_{name}.pt") for name in MODELS}


def loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu")


def assert_bites(result: dict[str, Any], tree: dict[str, Any]) -> None:
    """The steps do what the comparison is about."""
    assert result["norm"] > 2 * tree["optimizer"]["grad_clip"], "clipping does nothing"
    for name, weight in result["first_weights"].items():
        moved = (result["weights"][name] - weight).norm()
        assert moved > 10 * TOLERANCE * weight.norm(), f"{name} hardly moves, so its updates are not compared"


def assert_copies_agree(folder: Path, name: str, processes: int) -> None:
    """Weights that every process holds whole are equal to the last bit."""
    copies = [loaded(folder / f"{name}_{rank}.pt") for rank in range(processes)]
    assert copies[0]
    for parameter, weight in copies[0].items():
        assert "norm" in parameter, "a matrix is not split"
        assert all(torch.equal(weight, other[parameter]) for other in copies), (name, parameter)


@pytest.mark.parametrize("cuda", [pytest.param(False, id="gloo"), on_two_gpus()])
def test_loss_gradients_and_weights_are_those_of_one_process(
    cuda: bool, tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = in_float32_on(cuda, tree)
    expected = references(tree, run_processes, tmp_path, cuda=cuda)
    for one in expected.values():
        assert_bites(one, tree)
    assert max(expected["untied"]["density"]) < 0.95, "every chunk is selected"
    # tensor parallel alone, then two such models side by side
    for processes, models in ((2, ["untied", "tied"]), (4, ["untied"]))[: 1 if cuda else 2]:
        cases = {
            f"{model}_{'sequence' if sequence else 'plain'}_{stage}_{processes}": (model, sequence, stage)
            for model, sequence, stage in itertools.product(models, (False, True), (1, 2, 3))
        }
        trees = [
            (name, tensor_parallel(tree, stage, sequence, **MODELS[model]))
            for name, (model, sequence, stage) in cases.items()
        ]
        run_processes(processes, one_step, trees, str(tmp_path), None, STEPS, cuda=cuda)
        for name, (model, _, _) in cases.items():
            found, one = loaded(tmp_path / f"{name}.pt"), expected[model]
            assert_same_step(found, one, TOLERANCE)
            assert found["validation"] == pytest.approx(one["validation"], rel=TOLERANCE), name
            assert found["density"] == pytest.approx(one["density"], rel=TOLERANCE), name
            for parameter, weight in one["weights"].items():
                # one that starts at 0 is made of updates alone, which are as close as gradients are
                tolerance = WEIGHT_TOLERANCE if one["first_weights"][parameter].any() else TOLERANCE
                assert relative_error(found["weights"][parameter], weight) <= tolerance, (name, parameter)
            assert_copies_agree(tmp_path, name, processes)


def test_recomputation_and_scoring_in_pieces_leave_gradients_alone(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    expected = references(tree, run_processes, tmp_path, steps=1)
    cases = []
    ways = itertools.product(MODELS, ("selective", "attention", "full"), (False, True))
    for number, (model, mode, sequence) in enumerate(ways):
        # any two of model, way, stage and sequence are together in a case
        stage = (1, 3)[number.bit_count() % 2]
        case = tensor_parallel(tree, stage, sequence, **MODELS[model], training={"recompute": mode})
        cases.append((f"{model}_{mode}_{stage}_{sequence}", case))
    # 128 tokens and a vocabulary of 320: pieces of 40 tokens, or of 20 of each rank's 64, and a shorter last one;
    # of a feed-forward part 48 wide on each rank, three pieces
    run_processes(2, one_step, cases, str(tmp_path), 20 * 320, 1, 50 * 48)
    for name, _ in cases:
        assert_same_step(torch.load(tmp_path / f"{name}.pt"), expected[name.split("_")[0]], TOLERANCE)


def test_bf16_gradients_and_their_norm_are_those_of_one_process(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(tree, training={"precision": "bf16"})
    expected = references(tree, run_processes, tmp_path, steps=1)["untied"]
    cases = [
        (f"{stage}_{sequence}", tensor_parallel(tree, stage, sequence, **MODELS["untied"]))
        for stage, sequence in itertools.product((1, 2, 3), (False, True))
    ]
    run_processes(4, one_step, cases, str(tmp_path))
    for name, _ in cases:
        assert_same_step(torch.load(tmp_path / f"{name}.pt"), expected, BF16_TOLERANCE)


def test_logits_are_whole_on_every_rank(tree: dict[str, Any], run_processes: Any, tmp_path: Path) -> None:
    run_processes(1, save_logits, [("one", tree)], str(tmp_path))
    cases = [(name, tensor_parallel(tree, 1, name == "sequence")) for name in ("plain", "sequence")]
    run_processes(2, save_logits, cases, str(tmp_path))
    one = torch.load(tmp_path / "one_0.pt")
    for name, rank in itertools.product(("plain", "sequence"), (0, 1)):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}_{rank}.pt"), one, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_bit_identical_and_has_whole_weights(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(
        tree,
        # means of queries leave learned factors, which start at 0, a gradient that is near bf16's rounding
        attention={"query_pool": 1, "pool_heads": False},
        # one micro-batch a step
        training={"steps": 4, "global_batch": 2},
        checkpoint={"every": 2},
        evaluation={"every": 2},
        schedule={"warmup_steps": 2},
    )
    cases = {
        f"{precision}_{stage}": tensor_parallel(tree, stage, sequence=True, training={"precision": precision})
        for precision, stage in itertools.product(("fp32", "bf16"), (1, 2, 3))
    }
    wholes = {name: run_of(case, tmp_path / name) for name, case in cases.items()}
    run_processes(4, train_all, [(whole, None) for whole in wholes.values()])
    found = {name: (read_metrics(tmp_path / name), load_weights(tmp_path / name)[2]) for name in cases}
    for name in cases:
        # as if it had been killed while it saved the last step
        shutil.rmtree(checkpoint_folder(tmp_path / name) / tag_of(4))
    run_processes(4, train_all, [(whole, None) for whole in wholes.values()])
    run_processes(1, train_all, [(run_of(tree, tmp_path / "one"), None)])

    expected = load_weights(tmp_path / "one")[2]
    for name, (lines, weights) in found.items():
        steps = [json.loads(line)["step"] for line in (tmp_path / name / "samples_0.jsonl").open()]
        assert steps == [1, 2, 3, 4, 3, 4]
        for one, other in zip(lines, read_metrics(tmp_path / name), strict=True):
            assert {key: one[key] for key in EXACT} == {key: other[key] for key in EXACT}, name
        resumed = load_weights(tmp_path / name)[2]
        assert weights.keys() == resumed.keys() == expected.keys()
        tolerance = TOLERANCE if name.startswith("fp32") else BF16_TOLERANCE
        for parameter, weight in weights.items():
            assert torch.equal(weight, resumed[parameter]), (name, parameter)
            assert relative_error(weight, expected[parameter]) <= tolerance, (name, parameter)
    assert isinstance(sample_from_run(tmp_path / "fp32_3", "def1 ", max_new_tokens=3), str)


def test_processes_that_run_other_code_are_named(run_processes: Any, tmp_path: Path) -> None:
    run_processes(3, compare_fingerprints, str(tmp_path))
    for rank in range(3):
        assert "ranks [0, 1] have usual; ranks [2] have other" in (tmp_path / f"{rank}.txt").read_text()


@pytest.mark.parametrize("split", [Split(0, 1), Split(1, 1), Split(0, 2)], ids=["rows", "columns", "gated"])
def test_shards_join_to_the_weight_they_were_cut_from(split: Split) -> None:
    whole = torch.randn(12, 18)
    shards = [shard(whole, split, rank, 3) for rank in range(3)]
    assert all(whole_shape(part.shape, split, 3) == [12, 18] for part in shards)
    assert torch.equal(join(shards, split), whole)


def test_a_rank_holds_its_gate_rows_and_then_its_up_rows() -> None:
    rows = torch.arange(8)[:, None]
    assert shard(rows, Split(0, 2), 1, 2).flatten().tolist() == [2, 3, 6, 7]
