"""Layers whose router has projections of its own: what core attention gets, and weights of models without."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dash_megatron.checkpoint.files import save_tensors
from dash_megatron.checkpoint.folder import MODEL_SECTIONS
from dash_megatron.config import Config
from dash_megatron.config.flops import parameter_count
from dash_megatron.layers.sharding import split_of
from dash_megatron.ops import dash_attention
from dash_megatron.ops.diagnostics import sample_routing
from dash_megatron.training.initial import load_initial_weights
from tests.layers.test_gpt_model import (
    VOCABULARY,
    config_of,
    cu_seqlens_of,
    model_of,
    positions_of,
    tokens_of,
)

pytestmark = pytest.mark.usefixtures("single_process")

ROUTER: dict[str, Any] = {"pool_heads": True, "query_pool": 3, "scaling_factor": 30.0}
OWN = {**ROUTER, "router_projections": True}


def own_config(**model: Any) -> Config:
    return config_of(model=model, attention=OWN)


def test_a_group_has_one_more_query_and_one_more_key() -> None:
    model = model_of(own_config())
    core = model.decoder.layers[1].self_attention.core_attention
    q, k, v = torch.randn(90, 1, 6, 16), torch.randn(90, 1, 4, 16), torch.randn(90, 1, 2, 16)
    expected = dash_attention(
        *(x.transpose(0, 1) for x in (q[:, :, [0, 1, 3, 4]], k[:, :, ::2], v)),
        core.summary_query,
        chunk_size=16,
        routing_q=q[:, :, [2, 5]].transpose(0, 1),
        routing_k=k[:, :, 1::2].transpose(0, 1),
        **ROUTER,
    )
    assert torch.equal(core(q, k, v, None), expected.transpose(0, 1).flatten(2))


def test_a_probe_of_routing_sees_the_routers_queries_and_keys() -> None:
    model = model_of(own_config())
    core = model.decoder.layers[1].self_attention.core_attention
    densities = []

    def observe(q: Tensor, k: Tensor, w: Tensor, cu_seqlens: Tensor, *own: Tensor) -> None:
        samples = sample_routing(q, k, w, core.router, *own, cu_seqlens=cu_seqlens)
        densities.append(samples.head_means("chunks_selected"))

    core.observer = observe
    model(tokens_of(128), positions_of(90, 38), cu_seqlens=cu_seqlens_of(90, 38))
    torch.testing.assert_close(densities[0].mean(), core.routing.chunks_selected)


@pytest.mark.parametrize("model", [{}, {"qk_norm": True, "qkv_bias": True}], ids=["plain", "norm and bias"])
def test_only_layers_that_route_have_rows_for_it_in_the_split_matrix(model: dict[str, Any]) -> None:
    config = config_of(model=model, attention={**OWN, "full_layers": [1], "scaling_factor": 3.0})
    built = model_of(config)
    assert sum(p.numel() for p in built.parameters()) == parameter_count(config, VOCABULARY)
    weights = [layer.self_attention.linear_qkv.weight for layer in built.decoder.layers]
    assert [len(weight) for weight in weights] == [(4 + 4 * 2) * 16, (4 + 2 * 2) * 16]
    assert split_of(weights[0]) == split_of(weights[1]) == (0, 1)
    built(tokens_of(128), positions_of(128), tokens_of(128, 1)).sum().backward()
    assert all(weight.grad.norm(dim=1).gt(0).all() for weight in weights)


def test_learned_factors_are_taken_over_at_another_rate(tmp_path: Path) -> None:
    config = config_of(attention={**OWN, "learned_scaling": 20.0})
    model = model_of(config)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.self_attention.core_attention.log_scaling.normal_(0.0, 0.1)
    folder, _ = saved(tmp_path / "base", config, model)
    config = config_of(attention={**OWN, "learned_scaling": 4.0})
    again = model_of(config, seed=1)
    load_initial_weights(again, folder, config.model)
    for one, other in zip(model.decoder.layers, again.decoder.layers, strict=True):
        factors = [x.self_attention.core_attention.router.scaling_factor for x in (one, other)]
        assert factors[0].log().abs().max() > 0.1
        torch.testing.assert_close(*factors)


def saved(folder: Path, config: Config, model: torch.nn.Module | None = None) -> tuple[Path, torch.nn.Module]:
    """A model with biases that say something, and a folder of its weights."""
    model = model or model_of(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("linear_qkv.bias"):
                parameter.normal_()
    folder.mkdir()
    save_tensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})
    sections = config.model_dump(mode="json", include={"model", "attention"})
    (folder / MODEL_SECTIONS).write_text(yaml.safe_dump(sections))
    return folder, model


def test_a_router_without_projections_goes_on_with_its_own_that_route_the_same(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "base", config_of(model={"qkv_bias": True}, attention=ROUTER))
    config = own_config(qkv_bias=True)
    own = model_of(config, seed=1)
    load_initial_weights(own, folder, config.model)
    inputs = tokens_of(128), positions_of(90, 38), tokens_of(128, 1), cu_seqlens_of(90, 38)
    loss, own_loss = model(*inputs), own(*inputs)
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-6)
    # and learns apart
    (loss.mean() + own_loss.mean()).backward()
    both = [x.decoder.layers[0].self_attention.linear_qkv.weight.grad for x in (model, own)]
    dq, dk, dv = both[0].unflatten(0, (2, 4, 16)).split([2, 1, 1], dim=1)
    own_dq, d_routing_q, own_dk, d_routing_k, own_dv = (
        both[1].unflatten(0, (2, 6, 16)).split([2, 1, 1, 1, 1], dim=1)
    )
    close = {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(own_dv, dv, **close)
    torch.testing.assert_close(own_dq + d_routing_q / 2, dq, **close)
    torch.testing.assert_close(own_dk + d_routing_k, dk, **close)
    assert d_routing_q.norm() > 0.01 * own_dq.norm()


def test_a_dense_model_goes_on_with_projections_for_the_router(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, model = saved(tmp_path / "base", config_of(attention={"kind": "full"}))
    config = own_config()
    own = model_of(config)
    with caplog.at_level(logging.INFO):
        load_initial_weights(own, folder, config.model)
    assert "no projections of routers: those of 2 layers begin as copies of attention's" in caplog.text
    weight = own.decoder.layers[1].self_attention.linear_qkv.weight.unflatten(0, (2, 6, 16))
    dense = model.decoder.layers[1].self_attention.linear_qkv.weight.unflatten(0, (2, 4, 16))
    assert torch.equal(weight[:, [0, 1, 3, 5]], dense)
    assert torch.equal(weight[:, 4], dense[:, 2])
    torch.testing.assert_close(weight[:, 2], dense[:, :2].mean(1))


@pytest.mark.parametrize(
    ("attention", "changed", "message"),
    [
        (OWN, ROUTER, r"has the router's own projections in \S+linear_qkv.weight.*set attention.router_p"),
        (
            {"learned_scaling": 2.0},
            {},
            r"log_scaling, which .*; set attention.learned_scaling=2.0, attention.kind=dash, attention.full_layers=\[\] as there",
        ),
        (
            {"full_layers": [0]},
            {"full_layers": [1]},
            r"summary_query, which .*; set attention.kind=dash, attention.full_layers=\[0\] as there",
        ),
    ],
    ids=["projections", "factors", "another layer's summary query"],
)
def test_what_the_router_learned_is_not_dropped_without_a_word(
    attention: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = saved(tmp_path / "base", config_of(attention=attention))
    config = config_of(attention=changed)
    with pytest.raises(ValueError, match=message):
        load_initial_weights(model_of(config), folder, config.model)


def test_one_query_a_group_is_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"attention.pool_heads=False must be true with .*use attention.pool_heads=true"
    ):
        config_of(attention={"router_projections": True})
