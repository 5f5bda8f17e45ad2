"""Runs whose context grows: each step has its length, whoever reads, splits or resumes it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.checkpoint.weights import load_weights
from dash_megatron.config import config_from_dict
from dash_megatron.config.flops import training_flops_per_token
from dash_megatron.training.metrics import read_metrics
from tests.training.test_resume import EXACT, run_of
from tests.training.workers import train_all

VOCABULARY = 320


@pytest.fixture
def tree(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """Steps 1 and 2 see 32 tokens, 3 and 4 see 64, 5 and 6 see 128."""
    curriculum = {0: 32, 2: 64, 4: 128}
    return run_of(
        tiny_config,
        Path(tiny_config["run_dir"]),
        attention={"scaling_factor": 100.0},
        data={"seq_length_curriculum": curriculum, "num_workers": 1},
        training={"steps": 6},
        checkpoint={"every": 3},
    )


def test_a_growing_context_survives_resumes_and_split_sequences(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    one = run_of(tree, tmp_path / "one")
    long = run_of(tree, tmp_path / "long", data={"pack_documents": False})
    run_processes(1, train_all, [(one, None), (long, None)])
    whole = run_of(tree, tmp_path / "whole", parallel={"context": 2})
    halves = run_of(tree, tmp_path / "halves", parallel={"context": 2})
    run_processes(2, train_all, [(whole, None), (halves, 5), (halves, None)])

    found = {name: read_metrics(tmp_path / name) for name in ("one", "whole", "halves")}
    for lines in found.values():
        assert [line["context_length"] for line in lines] == [32, 32, 64, 64, 128, 128]
        assert [line["tokens"] for line in lines] == [512 * step for step in range(1, 7)]
    for name in ("loss", "grad_norm", "density"):
        expected = [line[name] for line in found["one"]]
        assert [line[name] for line in found["whole"]] == pytest.approx(expected, rel=1e-4), name
    assert found["one"][-1]["density"] < 0.9, "every chunk is selected"
    for line, other in zip(found["whole"], found["halves"], strict=True):
        assert {key: line[key] for key in EXACT} == {key: other[key] for key in EXACT}
    weights, resumed = load_weights(tmp_path / "whole")[2], load_weights(tmp_path / "halves")[2]
    for name, weight in weights.items():
        assert torch.equal(weight, resumed[name]), name

    # one document a row
    for line in read_metrics(tmp_path / "long"):
        context = (line["context_length"] + 1) / 2
        each = line["dense_equivalent_tflops_per_second"] * 1e12 / line["tokens_per_second"]
        assert each == pytest.approx(training_flops_per_token(config_from_dict(one), VOCABULARY, context))
