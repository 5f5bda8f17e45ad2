"""`training.init_from` of another run."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dash_megatron.checkpoint.folder import check_initial_folder, check_start_of
from dash_megatron.checkpoint.weights import open_weights
from dash_megatron.config import AttentionConfig, config_from_dict
from dash_megatron.training.density import DensityController
from dash_megatron.training.initial import load_initial_weights
from dash_megatron.training.metrics import read_metrics
from tests.training.test_resume import run_of
from tests.training.workers import begin_all, one_step, train_all

TARGET = {"kind": "dash", "target_density": 0.75, "scaling_factor": 300.0}


def test_a_run_begins_with_the_weights_and_factors_of_any_layout(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    first = run_of(
        tiny_config,
        tmp_path / "first",
        attention=TARGET,
        training={"steps": 8, "global_batch": 4},
        parallel={"tensor": 2},
        zero={"stage": 1},
    )
    run_processes(2, train_all, [(first, None)])
    saved, step, weights = open_weights(tmp_path / "first")
    assert step == 8
    factors = [saved.attention.layer_scaling_factor(layer) for layer in (0, 1)]
    assert all(math.log(factor / 300) > 0.1 for factor in factors), "they have moved"

    again = {"training": {"steps": 1, "global_batch": 4, "init_from": str(tmp_path / "first")}}
    second = run_of(tiny_config, tmp_path / "second", attention=TARGET, zero={"stage": 3}, **again)
    fixed = {**TARGET, "target_density": None, "scaling_factor": 5.0}
    third = run_of(tiny_config, tmp_path / "third", attention=fixed, **again)
    run_processes(1, one_step, [("second", second)], str(tmp_path))
    found = torch.load(tmp_path / "second.pt")["first_weights"]
    assert set(found) == set(weights)
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
    second["run_dir"] = str(tmp_path / "trained")
    run_processes(1, train_all, [(second, None), (third, None)])
    moved = read_metrics(tmp_path / "trained")[-1]["scaling_factor_per_layer"]
    # and one step more
    assert [math.log(x) for x in moved] == pytest.approx([math.log(x) for x in factors], abs=0.05)
    assert read_metrics(tmp_path / "third")[-1]["scaling_factor_per_layer"] == [5.0, 5.0]


@pytest.fixture
def first(tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path) -> dict[str, Any]:
    """A finished run of two processes and one step."""
    tree = run_of(tiny_config, tmp_path / "first", training={"steps": 1})
    run_processes(2, train_all, [(tree, None)])
    return tree


def started_from(source: Path, tree: dict[str, Any]) -> dict[str, Any]:
    return run_of(tree, source.parent / f"from_{source.name}", training={"init_from": str(source)})


def left_by_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    """What two processes of `begin_all` left of a case."""
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]


def test_processes_check_each_file_of_an_initial_run_once(
    first: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    start = started_from(tmp_path / "first", first)
    run_processes(
        2, begin_all, [("usual", start, {}), ("late", start, {"late": 1})], str(tmp_path), seconds=120
    )
    manifest = tmp_path / "first" / "checkpoints" / "step_00000001" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    for name in ("usual", "late"):
        found = left_by_ranks(tmp_path, name)
        assert [left["error"] for left in found] == [None, None]
        assert sorted(found[0]["checked"] + found[1]["checked"]) == sorted(files)


def test_damage_that_one_process_meets_is_the_same_error_on_all(
    first: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, int]]] = []
    for rank in (0, 1):
        name = f"state_{rank:05d}.safetensors"
        shutil.copytree(tmp_path / "first", tmp_path / f"damaged_{rank}")
        path = tmp_path / f"damaged_{rank}" / "checkpoints" / "step_00000001" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        cases.append((name, started_from(tmp_path / f"damaged_{rank}", first), {}))
        cases.append((f"unable_{rank}", started_from(tmp_path / "first", first), {"unable": rank}))
    run_processes(2, begin_all, cases, str(tmp_path), seconds=120)
    for rank in (0, 1):
        name = f"state_{rank:05d}.safetensors"
        folder = tmp_path / f"damaged_{rank}" / "checkpoints" / "step_00000001"
        told = (
            f"ValueError: {folder} is damaged: the checksum of {name} differs from that of what was written; "
        )
        found = left_by_ranks(tmp_path, name)
        assert sum(name in left["checked"] for left in found) == 1, "one process alone can tell"
        assert [left["error"] for left in found] == [
            told + "restore it from a copy, name an earlier step, or move this one away"
        ] * 2
        errors = [left["error"] for left in left_by_ranks(tmp_path, f"unable_{rank}")]
        assert errors[0] == errors[1]
        assert "cannot read step_00000001: Input/output error" in errors[0]


def test_without_a_target_other_scaling_factors_than_before_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    earlier = AttentionConfig(scaling_factor=(2.0, 3.0))
    cores: Any = {layer: SimpleNamespace(scaling_factor=2.0) for layer in (0, 1)}
    DensityController(AttentionConfig(scaling_factor=2.0), cores).begin_as(earlier)
    assert "ended with scaling factors [2.0, 3.0], and this one goes on with [2.0, 2.0]" in caplog.text
    caplog.clear()
    cores[1].scaling_factor = 3.0
    DensityController(earlier, cores).begin_as(earlier)
    cores[1].scaling_factor = 3.2
    DensityController(earlier, cores).begin_as(earlier)
    DensityController(AttentionConfig(), cores).begin_as(AttentionConfig(kind="full"))
    assert not caplog.text


def test_other_chunks_and_another_router_than_before_are_told(caplog: pytest.LogCaptureFixture) -> None:
    earlier = AttentionConfig(chunk_size=32, query_pool=16, target_density=0.25)
    cores: Any = {0: SimpleNamespace(scaling_factor=1.0)}
    DensityController(AttentionConfig(target_density=0.1), cores).begin_as(earlier)
    assert (
        "attention.chunk_size=64, not 32; attention.query_pool=1, not 16 as in the run of training.init_from"
        in caplog.text
    )
    caplog.clear()
    DensityController(AttentionConfig(kind="full"), {}).begin_as(earlier)
    assert not caplog.text


def test_a_run_begins_with_an_earlier_checkpoint_that_is_named(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    training = {"steps": 2, "global_batch": 4}
    first = run_of(tiny_config, tmp_path / "first", training=training, checkpoint={"every": 1, "keep": 0})
    run_processes(1, train_all, [(first, None)])
    named = tmp_path / "first" / "checkpoints" / "step_00000001"
    branch = run_of(tiny_config, tmp_path / "branch", training={**training, "init_from": str(named)})
    check_start_of(config_from_dict(branch))
    run_processes(1, one_step, [("branch", branch)], str(tmp_path))
    found = torch.load(tmp_path / "branch.pt")["first_weights"]
    _, _, weights = open_weights(tmp_path / "first", 1)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    with pytest.raises(FileNotFoundError, match=r"step_00000007 does not exist, but steps 1, 2 do; name a"):
        check_initial_folder(named.with_name("step_00000007"))
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "model.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"step_00000007 does not exist; name a run"):
        check_initial_folder(tmp_path / "imported" / "checkpoints" / "step_00000007")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"training\.init_from=\S+/file is a file; name a run"):
        check_initial_folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"neither checkpoints nor model\.yaml; name a run"):
        load_initial_weights(torch.nn.Module(), tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"training.init_from=\S+nothing does not exist"):
        load_initial_weights(torch.nn.Module(), tmp_path / "nothing", None)  # type: ignore[arg-type]
