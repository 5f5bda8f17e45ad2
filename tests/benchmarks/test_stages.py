"""Stages are those of the whole pass that a model trains with."""

import pytest
import torch

from benchmarks.choices import router_of
from benchmarks.stages import Case, Stages, make_inputs
from dash_megatron.ops import dash_attention
from tests.ops.kernels_under_test import DEVICE
from tests.ops.quick_interpreter import quicken


@pytest.mark.parametrize("model", ["", "d25_c32_w4m16g", "d25_c32_w4m16gp"])
def test_stages_one_after_the_other_are_the_pass_with_the_routers_of_the_model(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        quicken(monkeypatch)
    # gradients have the same bits in every run
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    case = Case("", 112, heads=4, chunk_size=16, head_dim=16, batch=2, scaling_factor=2.0)
    stages = Stages(case, torch.device(DEVICE), deterministic=True, kind=router_of(model))
    stages.run(*Stages.FORWARD, *Stages.BACKWARD)
    (q, k, v, w), upstream = make_inputs(case, torch.device(DEVICE))
    own = {}
    if stages.routing_q is not None:
        own = {"routing_q": stages.routing_q.view(k.shape), "routing_k": stages.routing_k.view(k.shape)}
    out = dash_attention(q, k, v, w, **stages.router._asdict(), backend="triton", **own)
    torch.testing.assert_close(stages.out.view(out.shape), out, rtol=0, atol=0)
    expected = torch.autograd.grad(out, [q, k, v, w], upstream)
    found = stages.dq, stages.dk, stages.dv, stages.dw
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.view(y.shape).to(y.dtype), y, rtol=0, atol=0)
