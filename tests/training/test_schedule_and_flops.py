"""Learning rates and operation counts against arithmetic done by hand."""

from typing import Any

import pytest

from dash_megatron.config import Config, config_from_dict
from dash_megatron.config.flops import matmul_parameters, peak_flops, training_flops_per_token
from dash_megatron.training.schedule import learning_rate


def config_of(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"layers": 2, "hidden_size": 8, "heads": 2, "kv_heads": 1, "ffn_hidden_size": 16},
        "attention": {"chunk_size": 16},
        "data": {"seq_length": 128},
        "optimizer": {"lr": 1.0},
        "training": {"steps": 101, "global_batch": 1},
    }
    return config_from_dict({**tree, **sections})


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = config_of(schedule={"kind": "constant", "warmup_steps": 4})
    assert [learning_rate(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_falls_from_the_peak_to_the_floor_at_the_last_step() -> None:
    config = config_of(schedule={"kind": "cosine", "min_lr_ratio": 0.2})
    assert learning_rate(0, config) == 1
    assert learning_rate(50, config) == pytest.approx(0.6)
    assert learning_rate(100, config) == pytest.approx(0.2)


def test_cosine_begins_where_warm_up_ends() -> None:
    config = config_of(schedule={"kind": "cosine", "warmup_steps": 21, "min_lr_ratio": 0.0})
    assert learning_rate(20, config) == learning_rate(21, config) == 1
    assert learning_rate(21 + 79 // 2, config) == pytest.approx(0.5, abs=0.02)
    assert learning_rate(100, config) == pytest.approx(0.0)


def test_wsd_is_stable_then_falls_linearly_to_the_floor() -> None:
    config = config_of(schedule={"kind": "wsd", "warmup_steps": 10, "decay_steps": 20, "min_lr_ratio": 0.0})
    assert {learning_rate(step, config) for step in range(9, 81)} == {1.0}
    assert learning_rate(81, config) == pytest.approx(0.95)
    assert learning_rate(90, config) == pytest.approx(0.5)
    assert learning_rate(100, config) == pytest.approx(0)


def test_operations_count_weights_keys_attended_and_summaries_scored() -> None:
    config = config_of()
    # per layer: q, k, v, o and three feed-forward matrices; then the output projection
    assert matmul_parameters(config, 32) == 2 * (8 * 4 * (2 + 1 + 1 + 2) + 3 * 8 * 16) + 8 * 32
    weights = 6 * matmul_parameters(config, 32)
    assert training_flops_per_token(config, 32, context=100) == weights + 2 * 12 * 8 * 100
    measured = training_flops_per_token(config, 32, context=100, chunks_selected={0: 3.0})
    assert measured == weights + 12 * 8 * (2.5 * 16) + 6 * 8 * 100 / 16 + 12 * 8 * 100


def test_peak_rates_are_known_for_listed_gpus_only() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("Some New GPU") is None
