"""Alpha-entmax against the `entmax` package and against its definition."""

import entmax as package
import pytest
import torch

from dash_megatron.ops import entmax

INF = float("inf")
ALPHAS = [1.5, 2.0, 1.01, 1.2, 1.7, 1.95]

# Largest absolute difference allowed, by the dtype computed in: a few roundings of values up to 1.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    # half precision is float32 inside, rounded once at the end
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
# The package bisects to about sqrt(eps) of the threshold where 1 / (alpha - 1) magnifies it; its gradient follows.
PACKAGE_TOLERANCE = 1e-9


def _scores(*shape, scale=3.0, seed=0, dtype=torch.float64):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .mul(scale)
        .to(dtype)
    )


def _package_entmax(z, alpha, dim=-1):
    if alpha == 1.5:
        return package.entmax15(z, dim=dim)
    if alpha == 2:
        return package.sparsemax(z, dim=dim)
    return package.entmax_bisect(z, alpha=alpha, dim=dim, n_iter=100)


def _forward_and_gradient(function, z, upstream, *args):
    z = z.clone().requires_grad_()
    p = function(z, *args)
    return p.detach(), torch.autograd.grad(p, z, upstream)[0]


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_forward_and_gradient_match_the_entmax_package(alpha, dim):
    z, upstream = _scores(7, 19, 5), _scores(7, 19, 5, seed=1)
    p, dz = _forward_and_gradient(entmax, z, upstream, alpha, dim)
    expected_p, expected_dz = _forward_and_gradient(_package_entmax, z, upstream, alpha, dim)
    torch.testing.assert_close(p, expected_p, atol=PACKAGE_TOLERANCE, rtol=0)
    torch.testing.assert_close(dz, expected_dz, atol=PACKAGE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_weights_sum_to_one_and_satisfy_the_threshold_equation(alpha):
    z = _scores(50, 33)
    p = entmax(z, alpha)
    tolerance = TOLERANCE[torch.float64]
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=p.dtype), atol=tolerance, rtol=0)
    # p = [(alpha - 1) z - tau]_+ ** (1 / (alpha - 1)): one tau per row must explain every weight, the zeros included
    best, best_z = p.max(-1, keepdim=True).values, z.max(-1, keepdim=True).values
    tau = (alpha - 1) * best_z - best ** (alpha - 1)
    explained = ((alpha - 1) * z - tau).clamp_min(0) ** (1 / (alpha - 1))
    torch.testing.assert_close(p, explained, atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_higher_score_never_weighs_less(alpha):
    order = _scores(20, 40).sort(-1).values
    assert (entmax(order, alpha).diff(dim=-1) >= 0).all()


def test_a_larger_alpha_is_sparser_and_alpha_near_one_is_softmax():
    z = _scores(30, 64)
    support = [int((entmax(z, alpha) > 0).sum()) for alpha in (1.2, 1.5, 1.7, 2.0)]
    assert support == sorted(support, reverse=True)
    assert len(set(support)) == len(support)
    torch.testing.assert_close(entmax(z, 1 + 1e-6), z.softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_passes_gradcheck_once_and_twice(alpha):
    z = _scores(3, 6, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha), z)
    assert torch.autograd.gradgradcheck(lambda x: entmax(x, alpha), z)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_excluded_entries_weigh_nothing_and_leave_the_others_as_if_they_were_alone(alpha):
    z, upstream = _scores(9, 12), _scores(9, 12, seed=1)
    kept = torch.arange(12) % 3 != 1
    masked = torch.where(kept, z, -INF)
    p, dz = _forward_and_gradient(entmax, masked, upstream, alpha)
    alone_p, alone_dz = _forward_and_gradient(entmax, z[:, kept], upstream[:, kept], alpha)
    torch.testing.assert_close(p[:, kept], alone_p, atol=TOLERANCE[torch.float64], rtol=0)
    torch.testing.assert_close(dz[:, kept], alone_dz, atol=TOLERANCE[torch.float64], rtol=0)
    assert (p[:, ~kept] == 0).all()
    assert (dz[:, ~kept] == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_row_with_everything_excluded_gives_zeros_not_nan(alpha):
    z = torch.stack([torch.full((4,), -INF), torch.tensor([0.0, 1.0, -INF, 2.0])])
    p, dz = _forward_and_gradient(entmax, z, torch.randn(2, 4), alpha)
    assert (p[0] == 0).all()
    assert (dz[0] == 0).all()
    torch.testing.assert_close(p[1].sum(), torch.tensor(1.0), atol=TOLERANCE[torch.float32], rtol=0)
    assert dz.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_extreme_scores_stay_exact_in_every_dtype(alpha, dtype):
    z = torch.tensor([[1e4, -1e4, 0.0, 1e4], [1e4, 9e3, -1e4, -INF], [-1e4, -1e4, -1e4, -1e4]], dtype=dtype)
    expected = torch.tensor([[0.5, 0, 0, 0.5], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]], dtype=dtype)
    p, dz = _forward_and_gradient(entmax, z, torch.ones_like(z), alpha)
    assert p.dtype == dz.dtype == dtype
    torch.testing.assert_close(p, expected, atol=TOLERANCE[dtype], rtol=0)
    assert dz.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_lower_precision_agrees_with_float64(alpha, dtype):
    z, upstream = _scores(40, 300, dtype=dtype), _scores(40, 300, seed=1, dtype=dtype)
    p, dz = _forward_and_gradient(entmax, z, upstream, alpha)
    exact_p, exact_dz = _forward_and_gradient(entmax, z.double(), upstream.double(), alpha)
    torch.testing.assert_close(p.double(), exact_p, atol=TOLERANCE[dtype], rtol=0)
    # upstream gradients reach 4 here, and so does the rounding
    torch.testing.assert_close(dz.double(), exact_dz, atol=4 * TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_stays_accurate_when_thousands_share_the_weight(alpha):
    z = _scores(4, 4096, scale=0.01, dtype=torch.float32)
    p = entmax(z, alpha)
    # relative now: every weight is near 1 / 4096
    torch.testing.assert_close(p.double(), entmax(z.double(), alpha), atol=1e-9, rtol=2e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_equal_scores_share_equally(size, alpha):
    p = entmax(torch.full((2, size), 7.25), alpha)
    torch.testing.assert_close(p, torch.full((2, size), 1 / size), atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_row_depends_on_another_to_the_last_bit(alpha):
    # the other rows settle at once or late: the first ones must not be refined any longer for it
    rows = _scores(500, 24, scale=0.3)
    at_once, late = torch.zeros(500, 24, dtype=rows.dtype), _scores(500, 24, scale=5.0, seed=1)
    p, same_p = (entmax(torch.cat([rows, others]), alpha)[:500] for others in (at_once, late))
    assert torch.equal(p, same_p)


def test_an_empty_tensor_gives_an_empty_tensor():
    assert entmax(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    "alpha", [1, 1.0, 0.5, 2.0001, float("nan"), INF, "1.5", None, True, torch.tensor(1.5)]
)
def test_a_wrong_alpha_is_a_value_error_that_names_it(alpha):
    with pytest.raises(ValueError, match=r"alpha=.* must be .*try 1\.5"):
        entmax(torch.zeros(3), alpha)


@pytest.mark.parametrize("dim", [2, -3, 0.0, None, True])
def test_a_wrong_dim_is_a_value_error_that_names_it(dim):
    with pytest.raises(ValueError, match=r"dim=.* must be a dimension of z.*try -1"):
        entmax(torch.zeros(3, 3), dim=dim)


@pytest.mark.parametrize(
    "z", [[1.0, 2.0], None, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)]
)
def test_wrong_scores_are_a_value_error_that_names_them(z):
    with pytest.raises(ValueError, match=r"z=.* must be a floating point tensor.*use torch\.as_tensor"):
        entmax(z)


def test_a_scalar_has_no_dim_to_sum_over():
    with pytest.raises(ValueError, match=r"dim=-1 must be a dimension of z"):
        entmax(torch.tensor(1.0))
