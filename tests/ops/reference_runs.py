"""Small inputs of DashAttention's reference, and what it gives for them."""

import torch
import torch.nn.functional as F

from dash_megatron.ops import dash_attention
from tests.ops.dash_by_hand import learned

# (absolute, relative) differences allowed, by the dtype of the inputs.
TOLERANCE = {
    torch.float64: (1e-9, 1e-8),  # sums in another order; 1 / p of a chunk near its threshold magnifies them
    torch.float32: (2e-4, 2e-4),  # against float64 of the same inputs, gradients included
    torch.bfloat16: (2e-2, 1e-2),  # outputs only: float32 inside, rounded once
    torch.float16: (2e-3, 2e-3),
}


def make_inputs(B=1, N=29, Hq=4, Hkv=2, D=8, dtype=torch.float64, seed=0):
    """Random q, k, v, summary_query that ask for gradients, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, N, Hq, D), (B, N, Hkv, D), (B, N, Hkv, D), (Hkv, D), (B, N, Hq, D)]
    *leaves, upstream = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [x.requires_grad_() for x in leaves], upstream


def with_defaults(**changes):
    return {"chunk_size": 4, "scaling_factor": 6.0, "backend": "reference", **changes}


def bounds_of(*lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def run_reference(leaves, upstream, **settings):
    settings = with_defaults(**settings)
    out, routing = dash_attention(*leaves, return_routing=True, **settings)
    leaves = [*leaves, *learned(settings["scaling_factor"])]
    return out.detach(), torch.autograd.grad(out, leaves, upstream), routing.chunks_selected


def assert_close(actual, expected, dtype):
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False)
