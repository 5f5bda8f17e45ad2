"""A resumed run is the run that was never interrupted, bit for bit, and reads the next unseen sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.checkpoint.folder import finished_steps
from dash_megatron.checkpoint.weights import load_weights
from dash_megatron.training.metrics import read_metrics
from tests.training.workers import train_all

# what a line of metrics.jsonl says of training rather than of the clock
EXACT = (
    "step",
    "loss",
    "valid_loss",
    "lr",
    "grad_norm",
    "tokens",
    "density_per_layer",
    "chunks_selected_per_layer",
)


def run_of(tree: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    changed = {name: {**tree.get(name, {}), **values} for name, values in sections.items()}
    return {**tree, **changed, "run_dir": str(folder)}


def samples_of(folder: Path, rank: int) -> dict[int, list[int]]:
    lines = (folder / f"samples_{rank}.jsonl").read_text().splitlines()
    return {line["step"]: line["samples"] for line in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_an_interrupted_run_ends_bit_identical_to_one_that_was_not(
    stage: int, precision: str, tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "zero": {"stage": stage},
        "training": {"steps": 6, "precision": precision},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 3, "samples": 5},
        "schedule": {"warmup_steps": 2},
    }
    whole = run_of(tiny_config, tmp_path / "whole", **sections)
    halves = run_of(tiny_config, tmp_path / "halves", **sections)
    # interrupted one step after it saved, so that a step is done twice
    run_processes(2, train_all, [(whole, None), (halves, 4), (halves, None)])

    expected, found = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "halves")
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(expected, found, strict=True):
        assert {key: one[key] for key in EXACT} == {key: other[key] for key in EXACT}
    for rank in (0, 1):
        assert samples_of(tmp_path / "whole", rank) == samples_of(tmp_path / "halves", rank)

    weights, resumed = load_weights(tmp_path / "whole")[2], load_weights(tmp_path / "halves")[2]
    assert weights.keys() == resumed.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, resumed[name]), name


def test_no_sample_is_read_twice_and_none_is_skipped(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = run_of(tiny_config, tmp_path / "run", checkpoint={"every": 2}, training={"steps": 4})
    run_processes(2, train_all, [(tree, 2), (tree, None)])
    read = [
        index for rank in (0, 1) for step in samples_of(tmp_path / "run", rank).values() for index in step
    ]
    assert sorted(read) == list(range(4 * tree["training"]["global_batch"]))


def test_only_the_newest_checkpoints_stay_and_half_ones_never_count(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = run_of(tiny_config, tmp_path / "run", checkpoint={"every": 1, "keep": 2})
    (tmp_path / "run" / "checkpoints" / "step_00000099.partial").mkdir(parents=True)
    run_processes(1, train_all, [(tree, None)])
    assert finished_steps(tmp_path / "run") == [3, 4]


def test_a_checkpoint_of_another_model_is_refused(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    first = run_of(tiny_config, tmp_path / "run", training={"steps": 2})
    second = run_of(tiny_config, tmp_path / "run", model={"ffn_hidden_size": 128})
    with pytest.raises(pytest.fail.Exception, match=r"model.ffn_hidden_size=128 differs from 96"):
        run_processes(1, train_all, [(first, None), (second, None)])


def test_a_resume_with_other_samples_or_attention_is_a_warning(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    first = run_of(tiny_config, tmp_path / "run", training={"steps": 2})
    second = run_of(
        tiny_config, tmp_path / "run", training={"steps": 3, "seed": 5}, attention={"chunk_size": 32}
    )
    run_processes(1, train_all, [(first, None), (second, None)])
    log = (tmp_path / "rank_0.log").read_text()
    assert "training.seed was 1234 and is now 5" in log
    assert "attention.chunk_size was 16 and is now 32" in log
    # and of nothing else
    assert log.count(" and is now ") == 2
