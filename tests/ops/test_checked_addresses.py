"""The memory checker of interpreted kernels tells accesses that lie outside of a launch's tensors, and no others."""

import pytest
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from tests.ops.checked_addresses import check_addresses


def _add(x, y, count, FIRST: tl.constexpr, ATOMIC: tl.constexpr):
    i = tl.program_id(0) * 4 + FIRST + tl.arange(0, 4)
    if ATOMIC:
        tl.atomic_add(y + i, tl.load(x + i, mask=i < 6, other=0.0), mask=i < count)
    else:
        tl.store(y + i, tl.load(x + i, mask=i < 6, other=0.0), mask=i < count)


def _run(monkeypatch, x, y, count, first=0, atomic=False):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_addresses(monkeypatch)
    InterpretedFunction(_add)[(2,)](x, y, count, FIRST=first, ATOMIC=atomic)


@pytest.mark.parametrize("atomic", [False, True])
def test_masked_accesses_may_point_anywhere(atomic, monkeypatch):
    x, y = torch.arange(6.0), torch.zeros(6)
    _run(monkeypatch, x, y, 6, atomic=atomic)
    assert torch.equal(x, y)


@pytest.mark.parametrize("atomic", [False, True])
def test_an_access_past_a_tensor_is_told_with_kernel_argument_distance_and_program(atomic, monkeypatch):
    memory = torch.zeros(100)
    kind = "atomic" if atomic else "store"
    told = rf"_add, program \(1, 0, 0\): {kind} of 4 bytes reaches 4 bytes past the last byte of y \(24 bytes\), at 1 of 3"
    with pytest.raises(InterpreterError, match=told):
        _run(monkeypatch, torch.zeros(6), memory[20:26], 7, atomic=atomic)


def test_an_access_before_a_tensor_is_told(monkeypatch):
    with pytest.raises(InterpreterError, match=r"load of 4 bytes reaches 8 bytes before the first byte of x"):
        _run(monkeypatch, torch.zeros(100)[20:26], torch.zeros(6), 6, first=-2)


def test_a_view_with_gaps_is_one_range(monkeypatch):
    x, y = torch.zeros(6, 3)[:, 0], torch.zeros(6)
    _run(monkeypatch, x, y, 6)
