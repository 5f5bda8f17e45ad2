"""InfLLM v2 and Native Sparse Attention as layers of a model that trains."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.config import Config, ConfigError
from dash_megatron.config.flops import parameter_count, training_flops_per_token
from dash_megatron.hf.export import export_run
from dash_megatron.layers import DashCoreAttention, build_model, init_weights, routing_means
from dash_megatron.layers.model import CORE_ATTENTION
from dash_megatron.planning.routing import AssumedRouting, effective_routing
from dash_megatron.training.metrics import read_metrics
from tests.layers.test_gpt_model import VOCABULARY, config_of, cu_seqlens_of, positions_of, tokens_of
from tests.training.test_global_batch import relative_error
from tests.training.workers import one_step, train_all

# a new kind comes along by itself, once `attention_of` knows it
BASELINES = [kind for kind in CORE_ATTENTION if kind not in ("dash", "full")]
KINDS = pytest.mark.parametrize("kind", BASELINES)
CHOICE = {"kernel_size": 8, "kernel_stride": 4, "top_k": 1, "initial_blocks": 1, "local_blocks": 1}


def attention_of(kind: str, **choice: int) -> dict[str, Any]:
    section = {**CHOICE, **({"window": 16} if kind == "nsa" else {}), **choice}
    return {"kind": kind, "chunk_size": 16, kind: section}


def baseline_of(kind: str, **sections: Any) -> Config:
    return config_of(attention=attention_of(kind), **sections)


@pytest.mark.usefixtures("single_process")
@KINDS
def test_every_weight_learns(kind: str) -> None:
    config = baseline_of(kind, model={"qk_norm": True})
    model = build_model(config, VOCABULARY)
    init_weights(model, 0, 0.5)
    assert sum(isinstance(module, CORE_ATTENTION[kind]) for module in model.modules()) == 2
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config, VOCABULARY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):  # weights after those that start at zero have no gradient at first
        optimizer.zero_grad()
        model(tokens_of(128), positions_of(128), labels=tokens_of(128, seed=1)).mean().backward()
        dead = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
        assert all(name.endswith("mlp_in") for name in dead) if step == 0 else not dead
        optimizer.step()


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", ["infllmv2", "nsa"])
def test_layers_report_the_density_of_their_lists(kind: str) -> None:
    config = baseline_of(kind)
    model = build_model(config, VOCABULARY)
    init_weights(model, 0, 0.5)
    model(tokens_of(128), positions_of(128))
    means = routing_means(model)
    assert sorted(means) == [0, 1]
    found = (means[0].chunks_selected / means[0].chunks_available).item()
    # of 8 chunks own, first and best, and for nsa the one before, which may be the best
    least, most = (sum(min(c, listed) for c in range(1, 9)) / 36 for listed in (3, 4))
    assert least < found <= most if kind == "nsa" else found == pytest.approx(least)
    planned = effective_routing(config, AssumedRouting(density=0.9)).density
    assert planned == pytest.approx(most if kind == "nsa" else least)


@pytest.mark.usefixtures("single_process")
@KINDS
def test_packed_documents_and_recomputation_change_nothing(kind: str) -> None:
    losses, gradients = [], []
    lengths = (50, 16, 62)
    for recompute in ("none", "selective", "attention", "full"):
        config = baseline_of(kind, training={"steps": 1, "global_batch": 1, "recompute": recompute})
        model = build_model(config, VOCABULARY)
        init_weights(model, 0, 0.5)
        loss = model(tokens_of(128), positions_of(*lengths), tokens_of(128, seed=1), cu_seqlens_of(*lengths))
        loss.mean().backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    documents = zip(tokens_of(128).split(lengths, 1), tokens_of(128, seed=1).split(lengths, 1), strict=True)
    alone = [model(tokens, positions_of(tokens.shape[1]), labels) for tokens, labels in documents]
    torch.testing.assert_close(losses[0], torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert torch.equal(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.usefixtures("single_process")
def test_layers_may_differ() -> None:
    config = config_of(attention={**attention_of("nsa"), "full_layers": [1]})
    model = build_model(config, VOCABULARY)
    init_weights(model, 0, 0.02)
    model(tokens_of(64), positions_of(64))
    assert sorted(routing_means(model)) == [0]
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config, VOCABULARY)
    assert not any(isinstance(module, DashCoreAttention) for module in model.modules())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"attention": {"kind": "infllmv2", "chunk_size": 16}},
            "attention.infllmv2.kernel_size=32 must be a multiple of attention.infllmv2.kernel_stride=16 and at most "
            "attention.chunk_size=16",
        ),
        (
            {"attention": attention_of("nsa", kernel_stride=3)},
            "attention.nsa.kernel_stride=3 must divide attention.chunk_size=16",
        ),
        (
            {"attention": attention_of("nsa", window=20)},
            "attention.nsa.window=20 must be a multiple of attention.chunk_size=16",
        ),
        (
            {"attention": attention_of("nsa"), "parallel": {"context": 2}},
            "parallel.context=2 must be 1 with attention.kind=nsa",
        ),
        (
            {"attention": attention_of("infllmv2"), "parallel": {"context": 2}},
            "must be a2a: the other exchanges serve DashAttention alone, but attention.kind=infllmv2",
        ),
    ],
)
def test_what_a_baseline_cannot_do_is_refused_with_the_config(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**sections)
    assert message in str(error.value)


def test_operations_count_what_each_baseline_reads() -> None:
    plain = training_flops_per_token(baseline_of("infllmv2"), VOCABULARY, 100)
    width = 64
    selected = training_flops_per_token(baseline_of("infllmv2"), VOCABULARY, 100, {0: 3.0, 1: 3.0})
    assert plain - selected == pytest.approx(2 * (12 * width * (100 - 2.5 * 16) - 2 * width * 100 / 4))
    native = training_flops_per_token(baseline_of("nsa"), VOCABULARY, 100, {0: 3.0, 1: 3.0})
    compression = 6 * 2 * 2 * 16 * (8 + 2 * 16) / 4
    again = 12 * width * (100 / 4 + 0.5 * 16)
    assert native - selected == pytest.approx(2 * (compression + again - 2 * width * 100 / 4))


def test_a_plan_takes_the_density_that_the_baseline_fixes() -> None:
    given = AssumedRouting(density=0.9)
    assert effective_routing(config_of(), given) == given
    found = effective_routing(baseline_of("infllmv2"), given)
    assert found.density == found.peak_density == pytest.approx((1 + 2 + 6 * 3) / 36)


def test_small_runs_learn_resume_and_are_not_exported(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tiny_config["training"] |= {"steps": 12}
    tiny_config["checkpoint"] = {"every": 8, "asynchronous": False}
    trees = {
        kind: {**tiny_config, "attention": attention_of(kind), "run_dir": str(tmp_path / kind)}
        for kind in BASELINES
    }
    run_processes(1, train_all, [(tree, last) for tree in trees.values() for last in (8, None)])
    for kind, tree in trees.items():
        lines = read_metrics(tree["run_dir"])
        assert [line["step"] for line in lines] == list(range(1, 13))
        assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
        densities = lines[-1]["density_per_layer"]
        assert len(densities) == 2
        assert all(density is not None and 0 < density < 1 for density in densities)
        with pytest.raises(ValueError, match=f"attention.kind={kind}, a baseline"):
            export_run(tree["run_dir"], tmp_path / "exported")
        assert not (tmp_path / "exported").exists()


def test_tensor_parallel_processes_under_zero_train_as_one_process(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tiny_config["attention"] = attention_of("nsa")
    # Adam's own normalisation would hide a gradient of the wrong size
    tiny_config["optimizer"] = {"lr": 0.03, "eps": 2e-3, "grad_clip": 0.1}
    run_processes(1, one_step, [("one", tiny_config)], str(tmp_path), None, 3)
    shared = [
        (
            f"two_{stage}",
            {**tiny_config, "parallel": {"tensor": 2, "sequence": True}, "zero": {"stage": stage}},
        )
        for stage in (1, 3)
    ]
    run_processes(2, one_step, shared, str(tmp_path), None, 3)
    one = torch.load(tmp_path / "one.pt")
    for name, _ in shared:
        found = torch.load(tmp_path / f"{name}.pt")
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert found["norm"] == pytest.approx(one["norm"], rel=1e-5)
        assert found["density"] == pytest.approx(one["density"], rel=1e-5)
        assert found["weights"].keys() == one["weights"].keys()
        for parameter, weight in one["weights"].items():
            assert (weight - one["first_weights"][parameter]).norm() > 0, parameter
            assert relative_error(found["weights"][parameter], weight) <= 1e-4, parameter
