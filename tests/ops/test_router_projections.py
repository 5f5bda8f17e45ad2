"""A router with queries and keys of its own: the reference against loops, the kernels against the reference."""

import pytest
import torch

from dash_megatron.ops import dash_attention
from dash_megatron.ops.kernels import dash
from dash_megatron.ops.sequence_reference import dash_attention_reference
from tests.ops.dash_by_hand import oracle
from tests.ops.kernels_under_test import CUDA, DEVICE, TOLERANCE, with_router
from tests.ops.reference_runs import assert_close, bounds_of, make_inputs, with_defaults

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMS = {
    "own queries": {},
    "pooled": {"query_pool": 5},
    "local chunks, packed": {"local_chunks": 1, "query_pool": 3, "cu_seqlens": bounds_of(9, 1, 27, 4, 19)},
    "a factor a head, not centred": {
        "scaling_factor": torch.tensor([3.0, 9.0], requires_grad=True),
        "estimate_diagonal": False,
    },
    "alpha 1.7": {"alpha": 1.7, "query_pool": 2},
}


def _own(leaves, seed=1):
    """The router's queries and keys beside other leaves."""
    generator = torch.Generator().manual_seed(seed)
    k = leaves[1]
    own = (
        torch.randn(k.shape, generator=generator, dtype=torch.float64).to(k).requires_grad_()
        for _ in range(2)
    )
    return dict(zip(("routing_q", "routing_k"), own, strict=True))


def _gradients(out, upstream, leaves, settings):
    tensors = [x for x in settings.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(out, [*leaves, *tensors], upstream)


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_output_gradients_and_selection_equal_loops_over_tokens_and_chunks(settings):
    leaves, upstream = make_inputs(N=60, Hq=6)
    settings = {"pool_heads": True, **_own(leaves), **settings}
    if "scaling_factor" in settings:
        settings["scaling_factor"] = settings["scaling_factor"].detach().double().requires_grad_()
    out, routing = dash_attention(*leaves, return_routing=True, **with_defaults(**settings))
    expected_out, expected_gradients, expected_counts = oracle(leaves, upstream, **settings)
    assert torch.equal(routing.chunks_selected, expected_counts.int())
    assert_close(out, expected_out, torch.float64)
    found = _gradients(out, upstream, leaves, settings)
    for gradient, expected in zip(found, expected_gradients, strict=True):
        assert_close(gradient, expected, torch.float64)


def test_means_of_the_queries_and_the_keys_route_as_without():
    leaves, upstream = make_inputs(N=60, Hq=6)
    q, k = (x.detach() for x in leaves[:2])
    settings = with_defaults(pool_heads=True, query_pool=5)
    own = {
        "routing_q": q.unflatten(2, (2, 3)).mean(3).requires_grad_(),
        "routing_k": k.clone().requires_grad_(),
    }
    out, alone = dash_attention(*leaves, **settings), dash_attention(*leaves, **settings, **own)
    assert_close(alone, out.detach(), torch.float64)
    # what reached q and k through the router reaches its own instead
    (dq, dk), (alone_dq, alone_dk) = (
        torch.autograd.grad(x, leaves[:2], upstream, retain_graph=True) for x in (out, alone)
    )
    d_routing_q, d_routing_k = torch.autograd.grad(alone, list(own.values()), upstream)
    assert_close(alone_dq + d_routing_q.repeat_interleave(3, dim=2) / 3, dq, torch.float64)
    assert_close(alone_dk + d_routing_k, dk, torch.float64)


def _run(attend, leaves, upstream, settings):
    out, selected = attend(*leaves, **with_router(settings))
    return [out.detach(), *_gradients(out, upstream, leaves, settings)], selected


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("form", [name for name in FORMS if "alpha" not in name])
def test_kernels_equal_the_reference(form, group, deterministic):
    size = 16 if CUDA else 1
    leaves, upstream = make_inputs(N=60 * size, Hq=2 * group, D=16, dtype=torch.float32)
    leaves, upstream = [x.detach().to(DEVICE).requires_grad_() for x in leaves], upstream.to(DEVICE)
    settings = {"chunk_size": 16, "scaling_factor": 3.0, "pool_heads": True, "cu_seqlens": None}
    settings |= {**_own(leaves), **FORMS[form]}
    settings = {name: x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for name, x in settings.items()}  # fmt: skip
    if settings["cu_seqlens"] is not None:
        settings["cu_seqlens"] = settings["cu_seqlens"].detach() * size
    found, selected = _run(
        lambda *x, **y: dash.dash_attention_triton(*x, **y, deterministic=deterministic),
        leaves,
        upstream,
        settings,
    )
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    wide = {
        name: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else x
        for name, x in settings.items()
    }
    expected, expected_selected = _run(dash_attention_reference, doubles, upstream.double(), wide)
    floor = 1e-3 * upstream.norm()
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        allowed = TOLERANCE[torch.float32][number > 0]
        assert (x.double() - y).norm() <= allowed * max(y.norm(), floor), number
    if not CUDA:
        assert torch.equal(selected, expected_selected)


WRONG = {
    "one alone": ({"routing_k": None}, "routing_k=None must be float32"),
    "heads of q": ({"routing_q": torch.zeros(1, 29, 4, 8)}, r"routing_q=float32 \[1, 29, 4, 8\]"),
    "another dtype": ({"routing_k": torch.zeros(1, 29, 2, 8).double()}, "routing_k=float64"),
    "a query a head": ({"pool_heads": False}, "pool_heads=False beside routing_q must be True"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_wrong_queries_and_keys_of_the_router_are_named(wrong, message):
    leaves, _ = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        dash_attention(*leaves, **with_defaults(**{"pool_heads": True, **_own(leaves), **wrong}))
