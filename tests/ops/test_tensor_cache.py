import gc

import pytest
import torch

from dash_megatron.ops import dash_attention
from dash_megatron.ops.kernels import geometry
from dash_megatron.ops.tensor_cache import cached
from dash_megatron.ops.topk import grid
from dash_megatron.ops.topk.infllmv2 import infllmv2_attention
from dash_megatron.topk_selection import Selection
from tests.ops.kernels_under_test import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_a_tensor_is_asked_once_for_each_key_and_anew_after_it_was_written_into():
    calls = []

    def ask(cu_seqlens, key):
        return cached(cu_seqlens, key, lambda: calls.append(key) or cu_seqlens.tolist())

    cu_seqlens = bounds(0, 3, 8)
    assert [ask(cu_seqlens, key) for key in "aabab"] == [[0, 3, 8]] * 5
    assert calls == ["a", "b"]
    cu_seqlens[1] = 5
    assert ask(cu_seqlens, "a") == [0, 5, 8]
    assert ask(bounds(0, 3, 8), "a") == [0, 3, 8]  # equal, but another
    assert calls == ["a", "b", "a", "a"]


def test_what_was_cached_goes_with_its_tensor():
    class Value:
        alive = 0

        def __init__(self):
            Value.alive += 1

        def __del__(self):
            Value.alive -= 1

    cu_seqlens = bounds(0, 8)
    cached(cu_seqlens, "value", Value)
    assert Value.alive == 1
    del cu_seqlens
    gc.collect()
    assert Value.alive == 0


def test_without_a_tensor_or_its_version_nothing_is_remembered():
    calls = []
    with torch.inference_mode():
        cu_seqlens = bounds(0, 8)
    for key in (None, None, cu_seqlens, cu_seqlens):
        cached(key, "a", lambda: calls.append(1))
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("module", "name", "attend"),
    [
        (geometry, "chunk_table", lambda x, w, b: dash_attention(*x, w, chunk_size=16, cu_seqlens=b, backend="triton")),
        (grid, "_make_grid", lambda x, w, b: infllmv2_attention(*x, Selection(16, 16, 1), chunk_size=16, cu_seqlens=b, backend="triton")[0]),
    ],
    ids=["dash", "infllmv2"],
)  # fmt: skip
def test_layers_with_the_same_documents_lay_them_out_once(module, name, attend, monkeypatch):
    calls, made = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or made(*args))
    x = [torch.randn(1, 64, 2, 16, device=DEVICE).requires_grad_() for _ in range(3)]
    w = torch.zeros(2, 16, device=DEVICE, requires_grad=True)
    cu_seqlens = bounds(0, 24, 64)
    first, second = (attend(x, w, cu_seqlens) for _ in range(2))
    assert torch.equal(first, second)
    assert calls == [name]
    other = attend(x, w, bounds(0, 40, 64))
    assert calls == [name] * 2
    assert not torch.equal(first, other)
    (first + second).sum().backward()
