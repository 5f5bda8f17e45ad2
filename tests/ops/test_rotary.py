"""Splitting and rotating in one pass: in torch, and by the kernel, interpreted on CPU and compiled on a GPU."""

import pytest
import torch

from dash_megatron.ops import rotary
from dash_megatron.ops.kernels import rotary as kernels
from tests.ops.kernels_under_test import CUDA, DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TOKENS, BATCH, GROUPS = 35, 2, 3


def by_complex_numbers(mixed, turns, head_dim, keys):
    """What is to come out, as a product of complex numbers."""
    heads = mixed.unflatten(-1, (GROUPS, -1, head_dim))
    parts = [x.flatten(2, 3) for x in heads.split([heads.shape[3] - keys - 1, keys, 1], dim=3)]
    turn = torch.complex(*turns.to(mixed.dtype)).unsqueeze(2)
    for number in (0, 1):
        turned = torch.complex(*parts[number].chunk(2, dim=-1)) * turn
        parts[number] = torch.cat([turned.real, turned.imag], dim=-1)
    return parts


@pytest.fixture(params=["torch", "kernel"])
def way(request, monkeypatch):
    """Where there is no GPU, torch is replaced by the interpreted kernel."""
    if request.param == "kernel" and not CUDA:
        monkeypatch.setattr(rotary, "_turn", kernels.turn)
    return "cpu" if request.param == "torch" else DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(4, 1, 16), (3, 2, 12)], ids=["plain", "router"])
def test_heads_and_gradients_are_those_of_complex_numbers(way, dtype, queries, keys, head_dim):
    generator = torch.Generator().manual_seed(0)
    width = GROUPS * (queries + keys + 1) * head_dim
    mixed = torch.randn(TOKENS, BATCH, width, generator=generator).to(way, dtype).requires_grad_()
    turns = torch.randn(2, TOKENS, BATCH, head_dim // 2, generator=generator).to(way)
    found = rotary.split_and_rotate(mixed, turns, head_dim, GROUPS, keys)
    wide = mixed.detach().double().requires_grad_()
    expected = by_complex_numbers(wide, turns, head_dim, keys)
    upstream = [torch.randn(x.shape, generator=generator).to(way, dtype) for x in expected]
    eps = 1e-6 if dtype == torch.float32 else 2**-7
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert one.is_contiguous()
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=eps)
    (d_found,) = torch.autograd.grad(found, mixed, upstream)
    (d_expected,) = torch.autograd.grad(expected, wide, [x.double() for x in upstream])
    torch.testing.assert_close(d_found.double(), d_expected, rtol=eps, atol=eps)


def test_heads_alone_are_turned_as_queries_are(way):
    mixed = torch.randn(TOKENS, BATCH, GROUPS * 4 * 16, device=way)
    turns = torch.randn(2, TOKENS, BATCH, 8, device=way)
    queries, keys, values = rotary.split_and_rotate(mixed, turns, 16, GROUPS)
    heads = mixed.unflatten(-1, (GROUPS, 4, 16))
    # rows of wider ones
    assert torch.equal(rotary.rotate(heads[:, :, :, :2].flatten(2, 3), turns), queries)
    assert torch.equal(rotary.rotate(heads[:, :, :, 2], turns), keys)
    assert torch.equal(heads[:, :, :, 3], values)


@pytest.mark.skipif(not CUDA, reason="needs a GPU: an interpreter computes no other bits")
def test_every_bit_is_the_same_for_any_number_of_tokens():
    """A resumed run may begin with rows of another length."""
    mixed = torch.randn(1000, 1, GROUPS * 6 * 64, device=DEVICE, dtype=torch.bfloat16)
    turns = torch.randn(2, 1000, 1, 32, device=DEVICE)
    whole = rotary.split_and_rotate(mixed, turns, 64, GROUPS)
    for tokens in (1, 37, 999):
        part = rotary.split_and_rotate(mixed[:tokens], turns[:, :tokens].contiguous(), 64, GROUPS)
        assert all(torch.equal(x, y[:tokens]) for x, y in zip(part, whole, strict=True))
