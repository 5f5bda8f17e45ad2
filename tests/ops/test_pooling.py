"""The router's queries: causal means within documents."""

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops.kernels import pool
from dash_megatron.ops.pooling import pool_queries
from tests.ops.kernels_under_test import CUDA, DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = (9, 1, 21, 4)


def _cu_seqlens(*lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def by_hand(q, query_pool, lengths):
    """Token by token, in the dtype of q [B, N, H, D]."""
    rows = []
    for document in q.split(lengths, dim=1):
        rows += [
            document[:, max(0, i - query_pool + 1) : i + 1].mean(1, keepdim=True)
            for i in range(document.shape[1])
        ]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("query_pool", [1, 2, 5, 16, 128])
@pytest.mark.parametrize("lengths", [(35,), LENGTHS], ids=str)
def test_pooled_queries_and_their_gradient_are_means_over_the_last_queries_of_a_document(lengths, query_pool):
    generator = torch.Generator().manual_seed(0)
    batch = 2 if len(lengths) == 1 else 1
    q = torch.randn(batch, 35, 3, 8, dtype=torch.float64, generator=generator).requires_grad_()
    upstream = torch.randn(q.shape, dtype=torch.float64, generator=generator)
    cu_seqlens = None if len(lengths) == 1 else _cu_seqlens(*lengths)
    pooled, expected = pool_queries(q, query_pool, cu_seqlens), by_hand(q, query_pool, lengths)
    torch.testing.assert_close(pooled, expected)
    grads = (torch.autograd.grad(x, q, upstream, retain_graph=True)[0] for x in (pooled, expected))
    torch.testing.assert_close(*grads)
    assert (pooled is q) == (query_pool == 1)


def test_half_precision_is_summed_in_float32_and_rounded_once():
    q = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    pooled = pool_queries(q, 16)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, by_hand(q.float(), 16, (40,)).bfloat16())


def test_a_piece_of_a_document_with_the_rows_before_it_gives_its_rows_of_the_whole():
    q = torch.randn(1, 35, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = pool_queries(q, 5, _cu_seqlens(*LENGTHS))
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    # two pieces with four rows before each, and, before the sequence, four rows of anything
    before = torch.full((1, 4, 2, 8), 7.0, dtype=torch.float64)
    extended = torch.cat([before, q[:, :13], q[:, 16:35]], dim=1)
    halo = torch.zeros(4, dtype=torch.long)
    places = torch.cat([halo, position[:13], halo, position[20:35]])
    pooled = pool_queries(extended, 5, position_N=places)
    torch.testing.assert_close(pooled[:, 4:17], whole[:, :13])
    torch.testing.assert_close(pooled[:, 21:], whole[:, 20:])


@pytest.mark.parametrize("query_pool", [0, 129, 2.0, True, None])
def test_a_pool_of_no_or_too_many_queries_is_refused(query_pool):
    with pytest.raises(ValueError, match=r"query_pool=.* must be an int from 1 to 128; try 16"):
        pool_queries(torch.zeros(1, 4, 2, 8), query_pool)


def _both(x, query_pool, upstream, **places):
    """Means and gradient, float64, of the kernel, and of the reference for the same numbers in float64."""
    found = []
    for backend, dtype in (("triton", x.dtype), ("reference", torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        pooled = pool_queries(leaf, query_pool, **places, backend=backend)
        assert pooled.dtype == dtype
        (grad,) = torch.autograd.grad(pooled, leaf, upstream.to(dtype))
        found.append((pooled.double(), grad.double()))
    return zip(*found, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_pool", [2, 7, 16, 128])
@pytest.mark.parametrize("lengths", [(53,), (9, 1, 33, 10)], ids=str)
def test_the_kernel_gives_the_means_and_gradients_of_the_reference(lengths, query_pool, dtype):
    lengths = [x * (40 if CUDA else 1) for x in lengths]
    generator, batch = torch.Generator().manual_seed(0), 2 if len(lengths) == 1 else 1
    # a slice of a fused projection, of more columns than a program takes
    fused = torch.randn(batch, sum(lengths), 7, 48, generator=generator).to(DEVICE, dtype)
    upstream = torch.randn(batch, sum(lengths), 5, 48, generator=generator).to(DEVICE, dtype)
    cu_seqlens = None if len(lengths) == 1 else _cu_seqlens(*lengths).to(DEVICE)
    # the interpreter cuts off what a GPU rounds
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8 if CUDA else 2**-7
    for x, expected in _both(fused[:, :, 1:6], query_pool, upstream, cu_seqlens=cu_seqlens):
        torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


def test_the_kernel_takes_rows_of_neighbours_as_the_reference_does():
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(1, 60, 3, 16, generator=generator).to(DEVICE) for _ in range(2))
    halo = torch.zeros(4, dtype=torch.long)
    places = torch.cat([halo, torch.arange(100, 120), halo, torch.arange(2, 34)]).to(DEVICE)
    places[28:30] = 0  # a document that begins inside the halo
    upstream[:, :4], upstream[:, 24:28] = 0, 0
    for y, expected in _both(x, 5, upstream, position_N=places):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_the_op_passes_torchs_own_checks_and_compiles():
    q = torch.randn(2, 9, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    torch.library.opcheck(
        pool.pool,
        (q, torch.arange(9, device=DEVICE), 4, False),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )
    compiled = torch.compile(
        lambda x: pool_queries(x, 4, backend="triton"), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(q), pool_queries(q, 4, backend="triton"))
