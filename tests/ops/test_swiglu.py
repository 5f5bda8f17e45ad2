"""SwiGLU's kernels beside torch in float64: interpreted on CPU, compiled on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops.kernels import swiglu as kernels
from dash_megatron.ops.swiglu import swiglu
from tests.ops.kernels_under_test import CUDA, DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [24, 2048, 2050])
def test_outputs_and_gradients_are_torchs(words, dtype):
    generator = torch.Generator().manual_seed(0)
    halves = (3 * torch.randn(5, 2, 2 * words, generator=generator)).to(DEVICE, dtype)
    upstream = torch.randn(5, 2, words, generator=generator).to(DEVICE, dtype)
    wide = halves.double().requires_grad_()
    gate, linear = wide.chunk(2, dim=-1)
    expected = F.silu(gate) * linear
    eps = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(kernels.swiglu_forward(halves).double(), expected, **eps)
    (d_expected,) = torch.autograd.grad(expected, wide, upstream.double())
    torch.testing.assert_close(kernels.swiglu_backward(halves, upstream).double(), d_expected, **eps)
    leaf = halves.requires_grad_()
    (d_found,) = torch.autograd.grad(swiglu(leaf), leaf, upstream)
    assert (d_found.double() - d_expected).norm() <= 0.02 * d_expected.norm()


@pytest.mark.skipif(not CUDA, reason="needs a GPU: an interpreter computes no other bits")
def test_every_bit_is_the_same_for_any_number_of_rows():
    """A resumed run may begin with rows of another length."""
    halves = torch.randn(512, 192, device=DEVICE, dtype=torch.bfloat16)
    whole = kernels.swiglu_forward(halves), kernels.swiglu_backward(halves, halves[:, :96].contiguous())
    for rows in (1, 37, 511):
        part = halves[:rows]
        found = kernels.swiglu_forward(part), kernels.swiglu_backward(part, part[:, :96].contiguous())
        assert all(torch.equal(x, y[:rows]) for x, y in zip(found, whole, strict=True))
