"""Weights & Biases beside TensorBoard: the same curves, one page for all starts of a run, and never a reason to stop."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dash_megatron.config import config_from_dict
from dash_megatron.training.metrics import read_metrics
from dash_megatron.training.trackers import WANDB_ID
from dash_megatron.training.trainer import Trainer
from tests.conftest import Started
from tests.training.fake_wandb import train_beside
from tests.training.test_global_batch import with_changes
from tests.training.workers import train_all

INSTALLED = importlib.util.find_spec("wandb") is not None


@pytest.fixture
def tree(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """A run of two steps that logs all it can."""
    logging = {"every": 1, "routing_every": 2, "wandb": {"project": "tiny", "group": "tests"}}
    return with_changes(tiny_config, logging=logging, training={"steps": 2})


def test_it_gets_the_scalars_of_tensorboard_and_a_resume_goes_on_in_the_same_run(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    saving = {"every": 2, "asynchronous": False}
    tree = with_changes(tree, logging={"tensorboard": True}, checkpoint=saving, training={"steps": 4})
    # the second start does step 3 again
    run_processes(2, train_beside, [(tree, 3), (tree, None)], str(tmp_path), None)
    assert not (tmp_path / "calls_1.jsonl").exists()
    calls = [json.loads(line) for line in (tmp_path / "calls_0.jsonl").read_text().splitlines()]
    run_dir = Path(tree["run_dir"])
    first, again = (arguments for method, arguments in calls if method == "init")
    assert first["id"] == again["id"] == (run_dir / WANDB_ID).read_text().strip()
    assert (first["project"], first["group"], first["name"]) == ("tiny", "tests", "run")
    assert first["resume"] == "allow"
    assert first["config"]["optimizer"]["lr"] == tree["optimizer"]["lr"]
    assert ["define_metric", ["*", "step"]] in calls
    assert calls[-1] == ["finish", None]
    lines = [values for method, values in calls if method == "log"]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 3, 4]
    found = {(tag, line["step"]): value for line in lines for tag, value in line.items() if tag != "step"}
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert found == {
        (tag, event.step): pytest.approx(event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    assert {step for _, step in found} == {1, 2, 3, 4}
    assert any(tag.startswith("routing_") for tag, _ in found)


@pytest.mark.parametrize("method", ["init", "define_metric", "log", "finish"])
def test_whatever_fails_there_training_goes_on(method: str, tree: dict[str, Any], tmp_path: Path) -> None:
    code, output = Started(tmp_path / "log", train_beside, [(tree, None)], str(tmp_path), method).end()
    assert code == 0, output
    assert output.count("RuntimeError: no network; metrics.jsonl goes on") == 1
    assert len(read_metrics(tree["run_dir"])) == 2


def test_a_missing_package_is_told_before_anything_is_computed(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for leftover in (False, True):
        if leftover:  # where the package ran, it leaves a folder of its name, which Python would import
            (tmp_path / "wandb").mkdir()
            importlib.invalidate_caches()
        with pytest.raises(ValueError, match=r"needs the package wandb; install it with .*\[wandb\]"):
            Trainer(config_from_dict(tree), {})
    assert not Path(tree["run_dir"]).exists()


@pytest.mark.skipif(not INSTALLED, reason="needs the package wandb")
def test_offline_all_starts_are_kept_under_one_id(tree: dict[str, Any], tmp_path: Path) -> None:
    starts = [(with_changes(tree, training={"steps": steps}), None) for steps in (1, 2)]
    code, output = Started(tmp_path / "log", train_all, starts, WANDB_MODE="offline").end()
    assert code == 0, output
    assert "metrics.jsonl goes on" not in output
    run_dir = Path(tree["run_dir"])
    number = (run_dir / WANDB_ID).read_text().strip()
    files = sorted(run_dir.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))
    assert files
    assert all(b"train/loss" in file.read_bytes() for file in files)
