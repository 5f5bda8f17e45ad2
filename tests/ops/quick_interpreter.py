"""Triton's interpreter without work whose result is known or thrown away: kernels give the same bits in a third of the time."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, interpreted kernels do without that work. This knows Triton 3.6 from inside, and leaves others as they are."""
    if not triton.__version__.startswith("3.6."):
        return
    builder, core = interpreter.interpreter_builder, tl.core
    # else every sum and product of integers is made in int64 too, for assertions that only `debug` makes
    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))
    monkeypatch.setattr(interpreter, "_patch_attr", _patch_attribute)
    monkeypatch.setattr(core.dtype, "__eq__", _same_dtype)
    monkeypatch.setattr(core.tensor, "__init__", _init_tensor)
    for owner, name, quicker in (
        (interpreter, "_patch_lang", _patch_once_a_launch),
        (interpreter, "_get_np_dtype", _remember_by_name),
        (core, "_unwrap_if_constexpr", _unwrap_if_constexpr),
        (core.block_type, "__init__", _share_block_types),
        (TritonSemantic, "broadcast_impl_value", _broadcast),
        (TritonSemantic, "binary_op_type_checking_impl", _of_one_type),
    ):
        monkeypatch.setattr(owner, name, quicker(getattr(owner, name)))


class _Scope:
    """What a launch, or a function it calls, changed in the language."""

    def __init__(self, scope: Any, patched: set[str]) -> None:
        self.scope, self.patched = scope, patched

    def restore(self) -> None:
        self.patched.clear()
        self.scope.restore()


def _patch_once_a_launch(plain: Any) -> Any:
    """Where the language already has its interpreted forms, functions that kernels call need not look through it again."""
    patched: set[str] = set()

    @cache
    def languages(fn: Any) -> set[str]:
        return {x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core}

    def patch(fn: Any) -> _Scope:
        if languages(fn) <= patched:
            return _Scope(interpreter._LangPatchScope(), patched)
        scope = plain(fn)
        patched.update(languages(fn))
        return _Scope(scope, patched)

    return patch


def _patch_attribute(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """The function itself, with what it needs, instead of two around it."""
    semantic = TritonSemantic(builder)
    inner = member.__wrapped__ if member.__code__ is tl.core.load.__code__ else member

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return inner(*args, _semantic=semantic, **kwargs)

    scope.set_attr(obj, name, call)


def _remember_by_name(plain: Any) -> Any:
    dtypes: dict[str, np.dtype] = {}

    def numpy_dtype(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = plain(dtype)
        return dtypes[name]

    return numpy_dtype


def _unwrap_if_constexpr(plain: Any) -> Any:
    nothing_to_unwrap = {tl.core.tensor, tl.core.dtype, tl.core.block_type, tl.core.pointer_type, int, bool}

    def unwrap(x: Any) -> Any:
        return x if type(x) in nothing_to_unwrap else plain(x)

    return unwrap


def _same_dtype(self: Any, other: Any) -> bool:
    other = tl.core._unwrap_if_constexpr(other)
    return self is other or (isinstance(other, tl.core.dtype) and self.name == other.name)


def _share_block_types(plain: Any) -> Any:
    """Types never change: those of the same elements and shape share all they have."""
    made: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *[tl.core._unwrap_if_constexpr(x) for x in shape]
        if key not in made:
            plain(self, element_ty, shape)
            self.of_tensor = _of_tensor(self.shape.values)
            made[key] = self.__dict__
        self.__dict__ = made[key]

    return init


def _of_tensor(shape: list[int]) -> tuple[Any, Any]:
    """A tensor's shape and number of elements."""
    return tl.core.tuple([tl.constexpr(x) for x in shape]), tl.constexpr(prod(shape))


_SCALAR = _of_tensor([])


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _SCALAR


def _broadcast(plain: Any) -> Any:
    shapes: dict[Any, Any] = {}

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() == b.is_block() and (not a.is_block() or a.shape.values == b.shape.values):
            return lhs, rhs
        key = a.name, b.name
        if key not in shapes:
            shapes[key] = [x.type for x in plain(self, lhs, rhs)]
        return [_stretch(x, wanted) for x, wanted in zip((lhs, rhs), shapes[key], strict=True)]

    return broadcast


def _stretch(x: Any, wanted: Any) -> Any:
    """A tensor of the wanted type: its own, or with its memory for all that repeats along an axis."""
    if x.type.name == wanted.name:
        return x
    data, shape = x.handle.data, wanted.shape.values
    if not x.type.is_block():
        data = data.astype(interpreter._get_np_dtype(x.dtype), copy=False).reshape(())
    if data.flags.c_contiguous:
        missing = len(shape) - data.ndim
        steps = zip(data.strides, data.shape, shape[missing:], strict=True)
        strides = [0] * missing + [step if size == whole else 0 for step, size, whole in steps]
        data = np.ndarray(shape, data.dtype, data, strides=strides)
    else:
        data = np.broadcast_to(data, shape)
    return tl.core.tensor(interpreter.TensorHandle(data, x.dtype), wanted)


def _of_one_type(plain: Any) -> Any:
    """Numbers of one type are computed with in that type, except for divisions of short floats; constants are made once."""
    constants: dict[Any, Any] = {}

    def check(
        self: Any, lhs: Any, rhs: Any, lhs_ptr: bool = False, rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        if type(lhs) is type(rhs) is tl.core.tensor:
            if not div_or_mod and lhs.dtype.name == rhs.dtype.name and not lhs.dtype.is_ptr():
                return self.broadcast_impl_value(lhs, rhs)
        elif type(lhs) is tl.core.tensor and type(rhs) in (int, float):
            key = lhs.type.name, type(rhs), rhs, lhs_ptr, arithmetic_check, div_or_mod
            if key in constants:
                return lhs, constants[key]
            same, constant = plain(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic_check, div_or_mod)
            if same is lhs:
                constant.handle.data.flags.writeable = False
                constants[key] = constant
            return same, constant
        return plain(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic_check, div_or_mod)

    return check
