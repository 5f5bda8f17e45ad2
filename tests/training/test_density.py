"""Routers select the share of chunks that was asked for, and go on doing so in a later start."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dash_megatron.checkpoint.weights import open_weights
from dash_megatron.config import AttentionConfig
from dash_megatron.training.density import DensityController
from dash_megatron.training.metrics import read_metrics
from tests.training.test_resume import EXACT, run_of
from tests.training.workers import train_all


def simulate(
    target: Any, steps: int, slopes: tuple[float, ...] = (1.0, 0.5), noise: float = 0.05, **attention: Any
) -> Any:
    """Layers whose log-odds of density fall with the logarithm of their factor: densities by step, which are measured with noise."""
    layers: Any = {i: SimpleNamespace(scaling_factor=1.0) for i in range(len(slopes))}
    controller = DensityController(AttentionConfig(target_density=target, **attention), layers)
    generator, history = random.Random(0), []
    for step in range(1, steps + 1):
        true = [
            1 / (1 + math.exp(slope * math.log(layers[i].scaling_factor) - 2))
            for i, slope in enumerate(slopes)
        ]
        controller.update(step, [min(1.0, max(0.0, x * (1 + generator.gauss(0, noise)))) for x in true])
        history.append(true)
    return history, controller, layers


@pytest.mark.parametrize("target", [0.5, 0.25, 0.1, 0.03])
def test_density_reaches_its_target_within_two_points_and_stays_there(target: float) -> None:
    history, _, _ = simulate(target, 600)
    for densities in history[200:]:
        assert all(abs(density - target) <= 0.02 for density in densities)


def test_each_layer_has_its_own_target() -> None:
    history, _, _ = simulate((0.6, 0.2), 400)
    assert history[-1] == pytest.approx([0.6, 0.2], abs=0.02)


def test_layers_share_the_budget_of_the_model() -> None:
    history, controller, layers = simulate((0.5, 0.1), 400, density_budget="model")
    assert sum(history[-1]) / 2 == pytest.approx(0.3, abs=0.02)
    # one factor for both: the layer whose density falls faster with it is the sparser one
    assert layers[0].scaling_factor == pytest.approx(layers[1].scaling_factor)
    assert history[-1][0] < history[-1][1] - 0.1
    other = DensityController(AttentionConfig(target_density=0.3, density_budget="model"), layers)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.state_dict() == controller.state_dict()


def test_factors_that_a_target_moved_outlive_it() -> None:
    _, controller, _ = simulate(0.3, 10)
    factors = controller.state_dict()["factors"]
    state = controller.state_dict()
    for _ in range(2):  # a start without the target, and one after that
        layers: Any = {i: SimpleNamespace(scaling_factor=1.0) for i in range(2)}
        later = DensityController(AttentionConfig(), layers)
        assert later.state_dict() == {}
        later.load_state_dict(state)
        state = later.state_dict()
        assert state["factors"] == factors == {str(i): layers[i].scaling_factor for i in range(2)}


def test_a_state_of_earlier_releases_is_taken_up() -> None:
    _, controller, _ = simulate(0.3, 10)
    state = controller.state_dict()
    old = {**state, "means": {name.removeprefix("layer "): mean for name, mean in state["means"].items()}}
    assert set(old["means"]) == {"0", "1"}
    controller.load_state_dict(old)
    assert controller.state_dict() == state


def test_a_schedule_is_followed_with_straight_lines_between_its_steps() -> None:
    attention = AttentionConfig(target_density={0: 1.0, 1000: 0.2, 2000: (0.4, 0.1)})
    expected = {0: (1.0, 1.0), 500: (0.6, 0.6), 1000: (0.2, 0.2), 1500: (0.3, 0.15), 9000: (0.4, 0.1)}
    for step, targets in expected.items():
        assert [attention.target_density_at(step, i) for i in (0, 1)] == pytest.approx(targets)
    # as config.yaml and checkpoints keep it
    stored = json.loads(json.dumps(attention.model_dump(mode="json")))
    assert AttentionConfig(**stored) == attention
    history, _, _ = simulate({0: 0.8, 400: 0.8, 1200: 0.2}, 1600, slopes=(1.0,))
    assert [history[step][0] for step in (399, 799, 1599)] == pytest.approx([0.8, 0.5, 0.2], abs=0.05)


def test_a_target_out_of_reach_stops_moving_factors_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, controller, layers = simulate(0.01, 3000, slopes=(0.0,))
    assert caplog.text.count("no scaling factor brings it to attention.target_density=0.01") == 1
    assert layers[0].scaling_factor == pytest.approx(1e6)
    assert controller.factors(2) == [layers[0].scaling_factor, None]


def test_without_a_target_factors_are_left_alone() -> None:
    _, controller, layers = simulate(None, 20)
    assert [core.scaling_factor for core in layers.values()] == [1.0, 1.0]
    assert controller.state_dict() == {}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (0, "target_density=0.0 must be above 0 and at most 1"),
        ((0.5, 1.5), "must be above 0 and at most 1"),
        ({}, "must name steps from 0 on"),
        ({-1: 0.5}, "must name steps from 0 on"),
    ],
)
def test_targets_that_cannot_be_are_refused(target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig(target_density=target)


def test_full_attention_has_no_density_to_ask_for() -> None:
    with pytest.raises(ValueError, match=r"needs a router: set attention\.kind=dash"):
        AttentionConfig(kind="full", target_density=0.5)


def test_a_run_reaches_its_target_and_resumes_bit_identically(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "attention": {"target_density": 0.75, "scaling_factor": 300.0},
        "training": {"steps": 90, "global_batch": 4, "micro_batch": 4},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 50},
        "data": {"pack_documents": False},
    }
    whole = run_of(tiny_config, tmp_path / "whole", **sections)
    halves = run_of(tiny_config, tmp_path / "halves", **sections)
    run_processes(1, train_all, [(whole, None), (halves, 52), (halves, None)])
    expected, found = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "halves")
    assert expected[0]["density_per_layer"] != pytest.approx([0.75, 0.75], abs=0.05), (
        "there is something to do"
    )
    for layer in (0, 1):
        last = [line["density_per_layer"][layer] for line in expected[-30:]]
        assert sum(last) / len(last) == pytest.approx(0.75, abs=0.02)
    exact = (*EXACT, "scaling_factor_per_layer")
    for one, other in zip(expected, found, strict=True):
        assert {key: one[key] for key in exact} == {key: other[key] for key in exact}
    config, _, _ = open_weights(tmp_path / "halves")
    assert list(config.attention.scaling_factor) == expected[-1]["scaling_factor_per_layer"]
