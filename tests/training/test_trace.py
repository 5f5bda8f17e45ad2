"""Traces of steps that `logging.profile_steps` asks for."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.training.trace import StepTracer
from tests.training.workers import train_all


def names_in(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def test_each_process_traces_the_steps_asked_for_and_no_others(
    tiny_config: dict[str, Any], run_processes: Any
) -> None:
    tiny_config["logging"]["profile_steps"] = [2, 3]
    run_processes(2, train_all, [(tiny_config, None)])
    folder = Path(tiny_config["run_dir"], "profile")
    assert {path.name for path in folder.iterdir()} == {"rank_0.trace.json.gz", "rank_1.trace.json.gz"}
    for rank in range(2):
        names = names_in(folder / f"rank_{rank}.trace.json.gz")
        assert {"step 2", "step 3", "forward", "backward", "update"} <= names
        assert not names & {"step 1", "step 4"}


def test_a_run_that_ends_within_the_range_leaves_a_trace_and_one_that_begins_behind_it_leaves_none(
    tmp_path: Path,
) -> None:
    def trace(steps: range, run_dir: Path) -> Path:
        run_dir.mkdir()
        tracer = StepTracer((2, 5), str(run_dir), 0, torch.device("cpu"))
        for step in steps:
            with tracer.step(step):
                torch.ones(2).sum()
        tracer.close()
        return run_dir / "profile" / "rank_0.trace.json.gz"

    names = names_in(trace(range(4, 5), tmp_path / "within"))
    assert {"step 4", "aten::sum"} <= names
    assert not trace(range(6, 8), tmp_path / "behind").exists()


def test_steps_that_come_again_do_not_replace_the_trace(tmp_path: Path) -> None:
    tracer = StepTracer((1, 1), str(tmp_path), 0, torch.device("cpu"))
    for step in (1, 2):
        with tracer.step(step):
            pass
    written = (tmp_path / "profile" / "rank_0.trace.json.gz").read_bytes()
    with tracer.step(1):
        torch.ones(2).sum()
    tracer.close()
    assert (tmp_path / "profile" / "rank_0.trace.json.gz").read_bytes() == written


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_leaves_kernels_and_a_snapshot_of_its_memory(tmp_path: Path) -> None:
    tracer = StepTracer((1, 1), str(tmp_path), 0, torch.device("cuda"))
    with tracer.step(1):
        (torch.randn(256, 256, device="cuda") @ torch.randn(256, 256, device="cuda")).sum().item()
    with gzip.open(tmp_path / "profile" / "rank_0.trace.json.gz") as file:
        categories = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "kernel" in categories
    snapshot = pickle.loads((tmp_path / "profile" / "rank_0.memory.pickle").read_bytes())
    assert any(snapshot["device_traces"])
