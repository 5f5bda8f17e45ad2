"""Folders of safetensors: pieces of the model are written, and tensors are read and their shapes checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dash_megatron.checkpoint.files import save_tensors
from dash_megatron.files import lock
from dash_megatron.hf.names import Piece

INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
FILE_BYTES = 1 << 30
"""A file of weights is closed when it has so many, which is also what is held in memory beside one piece."""


def check_new(output: Path) -> None:
    """Refuse a folder that exists already, before anything is computed for it.

    Raises:
        ValueError: it exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists already; remove it or choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Make a folder that appears whole or not at all: it is filled under a hidden name and renamed at the end.

    Args:
        output: the folder to make; may not exist, see `check_new`.

    Raises:
        ValueError: another process makes it.
    """
    partial = output.parent / f".{output.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        held = f"{output} is being made by another process; wait for that one, or choose another folder"
        lock(descriptor, ValueError(held))
        for left in partial.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            os.rename(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def write_pieces(
    folder: Path,
    parts: list[Piece],
    tensors_of: Callable[[Piece], dict[str, Tensor]],
) -> None:
    """Write the pieces one after the other: one file if they are small, else several and an index.

    Args:
        folder: where to write.
        parts: the pieces, in order.
        tensors_of: makes the tensors of a piece.
    """
    files: list[dict[str, int]] = []
    waiting: dict[str, Tensor] = {}

    def close() -> None:
        save_tensors(folder / f"{len(files)}.partial", waiting, {"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in waiting.items()})
        waiting.clear()

    for piece in parts:
        waiting |= tensors_of(piece)
        if sum(tensor.nbytes for tensor in waiting.values()) >= FILE_BYTES:
            close()
    if waiting:
        close()
    count = len(files)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [_SINGLE_FILE]
    for number, name in enumerate(names):
        os.rename(folder / f"{number}.partial", folder / name)
    if count > 1:
        weight_map = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        total = sum(sum(held.values()) for held in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_tensors(
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Read some tensors, which must be there and have the given shapes.

    Args:
        weights: tensors by name.
        shapes: the shapes of the tensors to read.
        source: for messages: where the tensors come from.
        dtype: to round to, one tensor after the other; None keeps each tensor's.

    Raises:
        ValueError: one is missing, of another shape, or of whole numbers; the message names it.
    """
    tensors = {}
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"{source} has no tensor {name}, which must have shape {list(shape)}")
        tensor = weights[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{source}: tensor {name} has shape {list(tensor.shape)} and must have {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{source}: tensor {name} is of {tensor.dtype}; give weights that are not quantized"
            )
        tensors[name] = tensor.to(dtype or tensor.dtype)
    return tensors


class FolderWeights(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors by name, each read on access.

    Raises:
        FileNotFoundError: there are no safetensors.
        ValueError: a file or the index is damaged, or the index names a tensor that its file has not.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            self.files = self._read_index()
        elif (self.folder / _SINGLE_FILE).is_file():
            self.files = dict.fromkeys(self._names(_SINGLE_FILE), _SINGLE_FILE)
        else:
            raise FileNotFoundError(
                f"{self.folder} has neither {INDEX} nor {_SINGLE_FILE}; convert it to safetensors"
            )
        for file in sorted(set(self.files.values())):
            names = set(self._names(file))
            claimed = {name for name, where in self.files.items() if where == file}
            if names != claimed:
                wrong = sorted(names ^ claimed)[0]
                raise ValueError(
                    f"{self.folder / file} and {INDEX} disagree about tensor {wrong}; download both again"
                )

    def _read_index(self) -> dict[str, str]:
        try:
            files = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            if not all(isinstance(file, str) for file in files.values()):
                raise TypeError("a tensor's file is no name")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.folder / INDEX} is damaged ({type(error).__name__}: {error}); download it again"
            ) from error
        return dict(files)

    def _names(self, file: str) -> list[str]:
        if not (self.folder / file).is_file():
            raise FileNotFoundError(f"{self.folder / file} is missing, though {INDEX} names it")
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return list(opened.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file} is damaged: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
