"""The quickened interpreter computes and refuses what Triton's own does."""

import pytest
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from dash_megatron.ops.kernels import dash
from tests.ops.kernels_under_test import with_router
from tests.ops.quick_interpreter import quicken

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_the_same_bits(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 40, 2, 16), (1, 40, 1, 16), (1, 40, 1, 16), (1, 16)
    leaves = [torch.randn(x, generator=generator).to(dtype).requires_grad_() for x in shapes]
    settings = {"chunk_size": 16, "scaling_factor": 2.0, "sigma": 2.0, "alpha": 1.5, "cu_seqlens": None}

    def results():
        out, selected = dash.dash_attention_triton(*leaves, **with_router(settings), deterministic=True)
        return out, selected, *torch.autograd.grad(out.square().sum(), leaves)

    plain = results()
    quicken(monkeypatch)
    assert all(torch.equal(x, y) for x, y in zip(plain, results(), strict=True))


def _sum_of_types(x, y, out, N: tl.constexpr):
    o = tl.arange(0, N)
    a, b = tl.load(x + o), tl.load(y + o)
    tl.store(out + o, tl.where(a < b, (a + b) * 3 - a / b, o) + tl.sum(a, 0))


def _constants(x, y, out, N: tl.constexpr):
    o = tl.arange(0, N)
    a = tl.load(x + o)
    # integers of 8 bits overflow, those that become floats do not
    tl.store(out + o, (a * 100) / 4 + a * 100.0 + (o + 100) + 100 * a)


def _sum_of_shapes(x, y, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(x + tl.arange(0, N)) + tl.arange(0, 2 * N))


def _order_of_pointers(x, y, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), x < y)


DTYPES = [torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    "kernel", [_sum_of_types, _constants, _sum_of_shapes, _order_of_pointers], ids=lambda x: x.__name__
)
def test_types_and_errors_are_the_same(kernel, monkeypatch):
    def results():
        found = []
        for x in DTYPES:
            for y in DTYPES:
                out = torch.zeros(8, dtype=torch.float64)
                values = torch.arange(1, 9).to(x), torch.arange(8, 0, -1).to(y)
                try:
                    InterpretedFunction(kernel)[(1,)](*values, out, N=8)
                except InterpreterError as error:
                    found.append(str(error))
                found.append(out.tolist())
        return found

    plain = results()
    quicken(monkeypatch)
    assert results() == plain
    errors = [x for x in plain if isinstance(x, str)]
    assert (len(errors) == len(DTYPES) ** 2) == (kernel in (_sum_of_shapes, _order_of_pointers))
