"""RMSNorm is torch's, to the last bit."""

import pytest
import torch

from dash_megatron.layers.norm import RMSNorm

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize("input_is_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_those_of_torch(dtype: torch.dtype, input_is_sharded: bool) -> None:
    ours = RMSNorm(None, 48, eps=1e-5, input_is_sharded=input_is_sharded).to(dtype)
    theirs = torch.nn.RMSNorm(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    x = torch.randn(7, 3, 48, dtype=dtype, requires_grad=True)
    upstream = torch.randn(7, 3, 48, dtype=dtype)
    results = []
    for norm in (ours, theirs):
        out = norm(x)
        results.append([out, *torch.autograd.grad(out, [x, norm.weight], upstream)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_weight_whose_gradient_is_summed_over_ranks_says_so() -> None:
    assert RMSNorm(None, 8, input_is_sharded=True).weight.sequence_parallel
    assert not RMSNorm(None, 8).weight.sequence_parallel
