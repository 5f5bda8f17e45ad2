"""Runs and configs that version 0.1 wrote are read, resumed and exported by today's code.

`run_of_0_1/` was trained by 0.1.0 (commit f143646) on the tiny corpus, with 2 data- and 2 tensor-parallel processes under
ZeRO 1, for 6 steps; of its two checkpoints the one of step 4 is kept, and `metrics.jsonl` has all 6 steps. The loss of step 2
was made NaN, so that its update was skipped and its batch kept. Density was controlled: the routed layer's scaling factor
moved. `tests/config/configs_of_0_1.json` has the texts of the `configs/*.yaml` of then, and the values that 0.1.0 loaded.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dash_megatron.__main__ import main
from dash_megatron.checkpoint.weights import open_weights
from dash_megatron.config import config_from_dict, load_config
from dash_megatron.training.faults import read_fault
from dash_megatron.training.metrics import read_metrics
from tests.training.workers import train_all

RUN = Path(__file__).parent / "run_of_0_1"
CONFIGS = json.loads((Path(__file__).parents[1] / "config" / "configs_of_0_1.json").read_text())


@pytest.fixture
def old_run(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run beside its data, where its relative paths lead."""
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "data").symlink_to(tiny_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_run_of_0_1_resumes_in_another_layout_and_goes_on(
    old_run: Path, tiny_config: dict[str, Any], run_processes: Any
) -> None:
    expected = read_metrics(old_run)
    tree = yaml.safe_load((old_run / "config.yaml").read_text())
    tree |= {"run_dir": str(old_run), "parallel": {**tree["parallel"], "tensor": 1}}
    tree["data"] |= {name: tiny_config["data"][name] for name in ("tokenizer", "train", "valid")}
    run_processes(1, train_all, [(tree, None)])
    found = read_metrics(old_run)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert json.dumps(found[:4]) == json.dumps(expected[:4])  # as text: NaN differs from itself
    for new, old in zip(found[4:], expected[4:], strict=True):
        assert new.keys() >= old.keys()
        # other sums of float32, which the bounds of a router's choice feel more than the loss does
        assert values(new, "loss", "lr", "grad_norm", "valid_loss") == pytest.approx(
            values(old, "loss", "lr", "grad_norm", "valid_loss"), rel=1e-5
        )
        routing = ("density_per_layer", "chunks_selected_per_layer", "scaling_factor_per_layer")
        assert values(new, *routing) == pytest.approx(values(old, *routing), rel=1e-3)
        assert (new["tokens"], new["skipped"]) == (old["tokens"], 1)


def values(line: Any, *names: str) -> list[float]:
    """A line's numbers, in order; -1 where there is none."""
    parts = [
        part for name in names for part in (line[name] if isinstance(line[name], list) else [line[name]])
    ]
    return [-1.0 if part is None else part for part in parts]


def test_a_checkpoint_of_0_1_gives_whole_weights_and_factors(old_run: Path) -> None:
    config, step, weights = open_weights(old_run)
    assert step == 4
    moved, full = config.attention.scaling_factor
    assert (round(moved, 4), full) == (round(read_metrics(RUN)[3]["scaling_factor_per_layer"][0], 4), 4.0)
    assert weights["embedding.word_embeddings.weight"].shape == (320, 12)
    assert weights["decoder.layers.0.self_attention.core_attention.summary_query"].shape == (2, 8)
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_checkpoint_of_0_1_is_exported_to_hugging_face(
    old_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "to-hf", "run", "exported", "--dtype", "float32"]) == 0
    assert "the same chunks in the 1 of 2 layers that select as the training model" in capsys.readouterr().out
    assert (old_run.parent / "exported" / "model.safetensors").is_file()


def test_a_fault_of_0_1_is_read_for_a_replay(old_run: Path) -> None:
    fault, batches = read_fault(old_run / "faults" / "step_00000002")
    assert (fault.step, fault.policy, fault.first_sample, fault.num_samples) == (2, "skip", 4, 4)
    assert math.isnan(fault.loss)
    ids = {rank: [batch.sample_ids for batch in of_rank] for rank, of_rank in batches.items()}
    assert sorted(index for of_rank in ids.values() for sample in of_rank for index in sample) == [4, 5, 6, 7]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_0_1_loads_to_the_values_of_then(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIGS[name]["written"])
    then = CONFIGS[name]["loaded"]
    for config in (load_config(path), config_from_dict(then)):
        assert only(config.model_dump(mode="json"), then) == then


def only(found: Any, then: Any) -> Any:
    """The values of the keys that were there then; keys may have come since, and one that was off has gone."""
    if not isinstance(then, dict):
        return found
    return {key: 0.0 if key == "length_scaling" else only(found[key], value) for key, value in then.items()}
