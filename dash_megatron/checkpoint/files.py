"""Files of one checkpoint: what each process kept, a description, and a manifest with every file's size and checksum.

    state_00000.safetensors    what process 0 kept: fragments of master weights and moments, and its random state
    probe.safetensors          a row of tokens, whose loss `checkpoint.json` holds
    checkpoint.json            step, layout, config, trainer's state, and where each fragment belongs
    manifest.json              size and SHA-256 of all the others

Fragments are consecutive elements of a parameter of one tensor-parallel rank, flattened; together they are all of it.
So weights can be read whole, or cut for any other layout. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dash_megatron.layers.sharding import Split, join, whole_shape
from dash_megatron.retry import retry

DESCRIPTION = "checkpoint.json"
MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
FORMAT = 1


def state_file(rank: int) -> str:
    """Name of a process's file."""
    return f"state_{rank:05d}.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, all the way to the disk, and give its manifest entry."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it tells a full disk in words only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    return _sealed(path)


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a JSON file, all the way to the disk, and give its manifest entry."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return _sealed(path)


def _sealed(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint's files; None: they are as they were written.

    Args:
        folder: the checkpoint.
        share, shares: compare checksums of one of `shares` equal shares of the files only, so that many processes can
            divide the reading; sizes are compared of all.

    Raises:
        OSError: the files cannot be read at present, which says nothing about them.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for number, (name, facts) in enumerate(files.items()):
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, but {facts['bytes']} were written"
            if number % shares == share and checksum(folder / name) != facts["sha256"]:
                return f"the checksum of {name} differs from that of what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    return None


def agreed_damage(folder: Path, seconds: float = 0.0) -> str | None:
    """As `damage`, the same on all processes, which divide the reading; collective.

    Where no processes have joined, this one reads everything, once.

    Args:
        folder: the checkpoint, the same on all processes.
        seconds: how long a process that cannot read its share tries again.

    Raises:
        OSError: on all processes, if one cannot read its share.
    """
    if not dist.is_initialized():
        return damage(folder)
    share, shares = dist.get_rank(), dist.get_world_size()
    found: str | OSError | None
    try:
        found = retry(lambda: damage(folder, share, shares), f"read {folder.name}", seconds)
    except OSError as error:
        found = error  # raised when the others, which wait for this process, know of it
    results: list[str | OSError | None] = [None] * shares
    dist.all_gather_object(results, found)
    for result in results:
        if isinstance(result, OSError):
            raise result
    return next((result for result in results if isinstance(result, str)), None)


class StoredState:
    """Reads a checkpoint's weights and moments, by parameter and range; on CPU, without process groups.

    Args:
        folder: the checkpoint.

    Raises:
        FileNotFoundError: there is no description.
        ValueError: it is none, or of an unknown format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / DESCRIPTION
        self.facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.facts.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format={self.facts.get('format')} must be {FORMAT}; read it with the code that wrote it"
            )
        self.shapes: dict[str, list[int]] = self.facts["shapes"]
        self.splits = {name: Split(*values) for name, values in self.facts["splits"].items()}
        self.tensor_size: int = self.facts["layout"]["tensor"]
        self._files: dict[str, Any] = {}
        # for each parameter of each tensor-parallel rank: where its fragments start, and in which files they are
        self._places: dict[tuple[str, int], dict[int, str]] = {}
        for file, held in self.facts["fragments"].items():
            for name, start in held["starts"].items():
                self._places.setdefault((name, held["tensor_rank"]), {})[start] = file

    def read(self, kind: str, name: str, tensor_rank: int, start: int, numel: int) -> Tensor:
        """Elements of a flattened parameter of a tensor-parallel rank of the run that wrote it: float32 [numel].

        Raises:
            ValueError: the files do not hold all of them, or one is damaged.
        """
        result = torch.empty(numel)
        missing, stop = numel, start + numel
        for first, file in self._places.get((name, tensor_rank), {}).items():
            stored = self._open(file).get_slice(f"{kind}/{name}")
            begin, end = max(start, first), min(stop, first + stored.get_shape()[0])
            if begin < end:
                result[begin - start : end - start] = stored[begin - first : end - first]
                missing -= end - begin
        if missing:
            raise ValueError(f"{self.folder} lacks {missing} of {numel} elements of {kind}/{name}")
        return result

    def shard(self, kind: str, name: str, tensor_rank: int) -> Tensor:
        """A parameter of one tensor-parallel rank, in its shape."""
        shape = self.shapes[name]
        return self.read(kind, name, tensor_rank, 0, torch.Size(shape).numel()).view(shape)

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter, whole."""
        split = self.splits.get(name)
        ranks = range(self.tensor_size if split is not None else 1)
        return join([self.shard(kind, name, rank) for rank in ranks], split)

    def whole_shape(self, name: str) -> list[int]:
        """Shape of a parameter, whole."""
        return whole_shape(self.shapes[name], self.splits.get(name), self.tensor_size)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """Random states of a process, by device."""
        tensors = self._all(state_file(rank), "random/")
        return {key.removeprefix("random/"): tensor for key, tensor in tensors.items()}

    def probe(self) -> dict[str, Tensor]:
        """The row of tokens whose loss is known."""
        return self._all(PROBE)

    def _all(self, name: str, prefix: str = "") -> dict[str, Tensor]:
        file = self._open(name)
        keys: list[str] = list(file.keys())
        return {key: file.get_tensor(key) for key in keys if key.startswith(prefix)}

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.folder / name} is damaged: {error}") from error
        return self._files[name]


class CheckpointWeights(Mapping[str, Tensor]):
    """A checkpoint's float32 master weights by parameter name, each read and made whole when asked for.

    Files are mapped, not read: what is asked for takes memory, and what was given back and dropped takes none.
    """

    def __init__(self, state: StoredState) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.state.shapes:
            raise KeyError(name)
        return self.state.whole("weight", name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state.shapes)

    def __len__(self) -> int:
        return len(self.state.shapes)


def describe_fragments(
    ranks: Sequence[tuple[int, dict[str, int]]],
) -> dict[str, dict[str, Any]]:
    """The description's part about fragments.

    Args:
        ranks: of each process its tensor-parallel rank and the first elements of what it keeps.
    """
    return {
        state_file(rank): {"tensor_rank": tensor_rank, "starts": starts}
        for rank, (tensor_rank, starts) in enumerate(ranks)
    }
