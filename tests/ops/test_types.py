"""The router as one value."""

import torch

from dash_megatron.ops.types import Router


def test_a_router_with_one_number_splits_into_plain_numbers():
    head_scaling, numbers = Router(32, 3, 2, True, 2, 4, 16, True).split()
    assert head_scaling is None
    assert numbers == (32, 3.0, 2.0, True, 2.0, 4, 16, True)
    assert [type(x) for x in numbers] == [int, float, float, bool, float, int, int, bool]


def test_a_router_with_a_factor_for_each_head_splits_into_these_and_one():
    factors = torch.tensor([0.5, 3.0], requires_grad=True)
    head_scaling, numbers = Router(scaling_factor=factors, alpha=1.7).split()
    assert head_scaling is factors
    assert numbers == Router(scaling_factor=1.0, alpha=1.7)


def test_some_heads_of_a_router_keep_their_factors():
    router = Router(scaling_factor=torch.tensor([1.0, 2.0, 3.0]), sigma=1.0)
    some = router.of_heads(slice(1, 3))
    assert some.scaling_factor.tolist() == [2, 3]
    assert some.sigma == 1
    assert Router(scaling_factor=2.0).of_heads(slice(0, 1)) == Router(scaling_factor=2.0)


def test_factors_of_scores_are_a_number_or_one_for_each_head():
    assert Router(scaling_factor=3.0).factors(torch.float64) == 3.0
    by_head = Router(scaling_factor=torch.tensor([1.0, 2.0])).factors(torch.float64)
    assert (by_head.dtype, by_head.tolist()) == (torch.float64, [[[[1]]], [[[2]]]])
