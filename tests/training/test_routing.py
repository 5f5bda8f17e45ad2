"""What routers select, measured while a run trains, and drawn from its checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import choices
from dash_megatron.__main__ import main
from dash_megatron.config import config_from_dict
from dash_megatron.ops.diagnostics import MEASURES
from dash_megatron.ops.types import Router
from dash_megatron.studies import dispersion
from dash_megatron.training.metrics import MetricsWriter, read_metrics
from dash_megatron.training.routing import RoutingProbe
from tests.training.test_global_batch import with_changes
from tests.training.workers import train_all


class Layer:
    """A core attention, as far as a probe is concerned."""

    router = Router(4, 4.0, 2.0, True, 1.5)
    observer: Any = None

    def attend(self) -> None:
        q, k, w = (torch.randn(1, 16, 2, 8), torch.randn(1, 16, 1, 8), torch.zeros(1, 8))
        if self.observer is not None:
            self.observer(q, k, w, None, None, None)


def read_lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]


def test_only_the_first_micro_batch_of_a_step_that_is_due_is_measured(tmp_path: Path) -> None:
    layer: Any = Layer()
    probe, writer = RoutingProbe(2, {1: layer}), MetricsWriter(tmp_path, tensorboard=False, resumed_step=0)
    for step in (1, 2, 3, 4):
        for micro_batch in (0, 1):
            with probe.watching(step, micro_batch):
                assert (layer.observer is not None) == (step % 2 == 0 and micro_batch == 0)
                layer.attend()
        if step != 2:  # given up
            probe.report(step, 2, writer)
    assert layer.observer is None
    (line,) = read_lines(tmp_path)
    assert (line["step"], line["queries"], line["edges"]) == (4, 16, [0, 4, 8, 16])
    assert line["layers"][0] is None
    assert line["layers"][1]["heads"].keys() == MEASURES.keys()
    assert line["layers"][1]["buckets"]["entropy"][0][0] is None
    # a resumed run drops what it does again
    MetricsWriter(tmp_path, tensorboard=False, resumed_step=3)
    assert read_lines(tmp_path) == []


def test_too_little_memory_to_measure_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("of 80 GiB")

    monkeypatch.setattr("dash_megatron.training.routing.sample_routing", fail)
    errors: list[str] = []
    monkeypatch.setattr(
        "dash_megatron.training.routing.logger.error", lambda text, *values: errors.append(text % values)
    )
    layer: Any = Layer()
    probe = RoutingProbe(1, {0: layer})
    for step in (1, 2):
        with probe.watching(step, 0):
            layer.attend()
    assert layer.observer is None
    probe.report(2, 1, MetricsWriter(tmp_path, tensorboard=False, resumed_step=0))
    assert not (tmp_path / "routing.jsonl").exists()
    (error,) = errors
    assert "it stops here and training goes on: of 80 GiB" in error


def test_a_run_without_a_router_is_told_there_is_none_to_measure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("dash_megatron"), "propagate", True)
    RoutingProbe(0, {})
    assert not caplog.records
    RoutingProbe(5, {})
    assert "logging.routing_every=5 is ignored" in caplog.text


def test_tensorboard_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True, resumed_step=0)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_histogram", fail)
    for step in (1, 2):
        writer.write_routing({"step": step}, {"a": torch.ones(3)}, {})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


def test_a_config_whose_processes_share_sequences_is_refused(tiny_config: dict[str, Any]) -> None:
    tree = with_changes(tiny_config, parallel={"context": 2}, logging={"routing_every": 5})
    with pytest.raises(
        ValueError, match=r"logging\.routing_every=5 must be 0 with parallel\.context=2.*study routing"
    ):
        config_from_dict(tree)


def test_measuring_changes_no_training_and_needs_no_other_process(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(
        tiny_config, attention={"scaling_factor": 500.0}, training={"steps": 2, "global_batch": 2}
    )
    layouts: dict[str, dict[str, Any]] = {
        "off": {"logging": {"routing_every": 0}},
        "plain": {},
        "zero 3, layers recomputed": {"zero": {"stage": 3}, "training": {"recompute": "full"}},
    }
    runs = []
    for name, changes in layouts.items():
        sections = {"logging": {"routing_every": 1}, **changes}
        runs.append((with_changes({**tree, "run_dir": str(tmp_path / name)}, **sections), None))
    run_processes(2, train_all, runs)
    assert not (tmp_path / "off" / "routing.jsonl").exists()
    off, plain = read_metrics(tmp_path / "off"), read_metrics(tmp_path / "plain")
    assert [line["loss"] for line in plain] == [line["loss"] for line in off]
    measured = {name: read_lines(tmp_path / name) for name in layouts if name != "off"}
    assert all([line["step"] for line in lines] == [1, 2] for lines in measured.values())
    for name, lines in measured.items():
        for expected, found in zip(measured["plain"][0]["layers"], lines[0]["layers"], strict=True):
            for measure in MEASURES:
                one, other = expected["heads"][measure], found["heads"][measure]
                assert len(one) == 2
                assert other == pytest.approx(one, rel=1e-3, abs=1e-3), (name, measure)
    assert 0.1 < measured["plain"][0]["layers"][0]["heads"]["own_share"][0] < 1


def trained(
    tiny_config: dict[str, Any], run_processes: Any, run_dir: Path, router: dict[str, Any]
) -> list[Any]:
    """Lines of a run of one sequence a step, whose tokens are all measured."""
    tree = with_changes(
        {**tiny_config, "run_dir": str(run_dir)},
        attention={"scaling_factor": 500.0, **router},
        training={"steps": 4, "global_batch": 1, "recompute": "attention"},
        logging={"routing_every": 2, "tensorboard": True},
    )
    run_processes(1, train_all, [(tree, None)])
    return read_lines(run_dir)


@pytest.mark.parametrize(
    "router", [{}, {"router_projections": True, "pool_heads": True}], ids=["shared", "own router"]
)
def test_a_run_keeps_its_routing_and_study_routing_draws_it(
    router: dict[str, Any],
    tiny_config: dict[str, Any],
    run_processes: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = trained(tiny_config, run_processes, tmp_path, router)
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["queries"] == 128
        densities = [layer["heads"]["density"] for layer in line["layers"]]
        same_step = metrics[line["step"] - 1]["density_per_layer"]
        assert [sum(heads) / len(heads) for heads in densities] == pytest.approx(same_step, abs=2e-4)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()
    histograms = events.Histograms("routing_density_samples/layer_01")
    assert [(event.step, event.histogram_value.num) for event in histograms] == [(2, 256), (4, 256)]
    scalar = events.Scalars("routing_own_share/layer_01")[-1].value
    shares = lines[-1]["layers"][1]["heads"]["own_share"]
    assert scalar == pytest.approx(sum(shares) / 2, abs=1e-3)
    assert events.Scalars("train/loss")[-1].step == 4

    dump, places = tmp_path / "dumps" / "run.npz", ["--output", str(tmp_path / "drawn"), "--device", "cpu"]
    assert main(["study", "routing", str(tmp_path), *places, "--dump", str(dump)]) == 0
    told = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "drawn" / "routing.json").read_text())
    assert told[0].split() == [
        "layer",
        "density",
        "visited",
        "by",
        "tiles",
        "of",
        "16",
        "tokens",
        "/",
        "selected",
    ]
    rows = [line.split() for line in told[1:4]]
    for (number, density, ratio), layer in zip(rows, report["layers"], strict=False):
        heads, listed = layer["heads"]["density"], layer["listed"]
        assert (number, density) == (str(report["layers"].index(layer)), f"{sum(heads) / len(heads):.1%}")
        assert float(ratio) == pytest.approx(listed["16"] / listed["1"], abs=0.005)
        assert float(ratio) > 1
    assert float(rows[2][2]) == pytest.approx((float(rows[0][2]) + float(rows[1][2])) / 2, abs=0.011)
    assert rows[2][0] == "mean"
    assert told[5] == str(tmp_path / "drawn" / "routing.json")
    assert (report["run"], report["tokens"]) == (f"{tmp_path.name} step 4", 128)
    assert report["document_tokens"] > 128
    shares = np.load(tmp_path / "drawn" / "selected_chunks.npz")
    for index, layer in enumerate(report["layers"]):
        # 8 chunks of 16 tokens, all of them measured: both say how many chunks are selected on average
        mean = np.nansum(shares[f"layer_{index:02d}"].astype(float), axis=(1, 2)) / 8
        assert layer["heads"]["chunks_selected"] == pytest.approx(mean, rel=2e-3)
        assert sum(layer["weights"][0]) == pytest.approx(1, abs=1e-3)
    for name in ("heads", "positions", "chunks", "threshold"):
        with Image.open(tmp_path / "drawn" / f"{name}.png") as image:
            assert image.width >= 600

    monkeypatch.setattr(choices, "FOLDER", dump.parent)
    assert choices.layers_of("run") == [0, 1]
    for layer in (0, 1):
        selected_HNc = choices.load_selected("run", layer)
        assert selected_HNc.shape == (2, 128, 8)
        visited = selected_HNc.sum((1, 2)) / (16 * sum(range(8)))
        assert float(visited.mean()) == pytest.approx(report["layers"][layer]["listed"]["1"], abs=1e-4)
    assert main(["study", "routing", str(tmp_path), *places, "--dump", "run.bin"]) == 2
    assert "--dump run.bin must end in .npz; try run.npz" in capsys.readouterr().err

    monkeypatch.setattr(dispersion, "CHUNKS", (16, 64))  # of made-up inputs: thousands take seconds
    assert main(["study", "dispersion", str(tmp_path), "--output", str(tmp_path / "drawn")]) == 0
    report = json.loads((tmp_path / "drawn" / "dispersion.json").read_text())
    assert report["inputs"].keys() == {"random", "needle", "topics", "run"}
    of_run = report["inputs"]["run"]
    assert of_run["chunks"] == [4]
    # the heads of a group, of which a router of its own has one
    assert of_run["curves"]["softmax"].keys() == ({"1"} if router else {"1", "2"})

    assert main(["study", "routing", str(tmp_path), "--length", "32"]) == 2
    assert "must be at least 33" in capsys.readouterr().err
