"""A memory checker for Triton's interpreter: what a kernel touches must lie inside a tensor of its launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.jit import TensorWrapper


class AddressError(Exception):
    """A kernel touched memory that no tensor of its launch covers."""


class _Launch:
    """What one launch of a kernel may touch."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.kernel = kernel
        bounds = {name: _bounds(x) for name, x in tensors.items() if x.numel() > 0}
        self.names = sorted(bounds, key=lambda name: bounds[name])
        self.bounds = [bounds[name] for name in self.names]
        joined: list[list[int]] = []
        for begin, end in self.bounds:
            if joined and begin <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([begin, end])
        self.begins, self.ends = np.array(joined, dtype=np.uint64).reshape(-1, 2).T

    def check(self, access: str, address: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        """Refuse an access of `size` bytes at each address that the mask lets through.

        Raises:
            AddressError: an address lies outside of all tensors.
        """
        if mask is not None and not mask.all():
            address = np.broadcast_to(address, np.broadcast_shapes(address.shape, mask.shape))[mask]
        if address.size == 0:
            return
        # almost always all in one tensor
        first, last = int(address.min()), int(address.max()) + size
        if any(begin <= first and last <= end for begin, end in zip(self.begins, self.ends, strict=True)):
            return
        place = np.searchsorted(self.begins, address, side="right").astype(np.int64) - 1
        end = np.where(place < 0, 0, self.ends[np.maximum(place, 0)])
        outside = address[address + np.uint64(size) > end]
        if outside.size:
            raise AddressError(self._describe(access, int(outside.flat[0]), outside.size, address.size, size))

    def _describe(self, access: str, address: int, outside: int, of: int, size: int) -> str:
        distance, name = min(
            (max(begin - address, address + size - end), name)
            for name, (begin, end) in zip(self.names, self.bounds, strict=True)
        )
        begin, end = self.bounds[self.names.index(name)]
        side = f"before the first byte of {name}" if address < begin else f"past the last byte of {name}"
        program = interpreter.interpreter_builder.grid_idx
        return (
            f"{self.kernel}, program {program}: {access} of {size} bytes reaches {distance} bytes {side} "
            f"({end - begin} bytes), at {outside} of {of} addresses"
        )


def _bounds(x: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and one past its last; strides are not negative."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def _tensors(name: str, argument: Any) -> dict[str, torch.Tensor]:
    """The tensors in an argument of a launch, by name."""
    if isinstance(argument, tuple):
        return {
            key: x for i, item in enumerate(argument) for key, x in _tensors(f"{name}[{i}]", item).items()
        }
    if isinstance(argument, TensorWrapper):
        argument = argument.base
    return {name: argument} if isinstance(argument, torch.Tensor) else {}


def check_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, interpreted kernels that touch memory outside of the tensors they were launched with raise `AddressError`."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    init_args = executor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store
    exchange, update = builder.create_atomic_cas, builder.create_atomic_rmw
    launches: list[_Launch] = []

    def note_launch(self: Any, args: Any, kwargs: Any) -> Any:
        found = init_args(self, args, kwargs)
        named = dict(zip(self.arg_names, found[0], strict=False)) | found[1]
        tensors = {key: x for name, item in named.items() for key, x in _tensors(name, item).items()}
        launches[:] = [_Launch(self.fn.__name__, tensors)]
        return found

    def check(access: str, pointer: Any, mask: Any) -> None:
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        launches[0].check(access, pointer.data, None if mask is None else mask.data.astype(bool), size)

    def checked_load(self: Any, pointer: Any, mask: Any, *rest: Any) -> Any:
        check("load", pointer, mask)
        return load(self, pointer, mask, *rest)

    def checked_store(self: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("store", pointer, mask)
        return store(self, pointer, value, mask, *rest)

    def checked_exchange(self: Any, pointer: Any, *rest: Any) -> Any:
        check("atomic", pointer, None)
        return exchange(self, pointer, *rest)

    def checked_update(self: Any, kind: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("atomic", pointer, mask)
        return update(self, kind, pointer, value, mask, *rest)

    monkeypatch.setattr(executor, "_init_args_hst", note_launch)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(builder, "create_atomic_cas", checked_exchange)
    monkeypatch.setattr(builder, "create_atomic_rmw", checked_update)
