"""What a checkpoint holds, read back on the CPU: tensors by parameter, whole or any range of elements of a shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dash_megatron.checkpoint.files import FORMAT, PROBE, state_file
from dash_megatron.checkpoint.folder import DESCRIPTION
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.layers.sharding import Split, join, whole_shape

_NEEDED = ("config", "layout", "shapes", "splits", "fragments")


def check_learnt_tokenizer(tokenizer: Tokenizer, learnt: str, folder: Path) -> None:
    """Compare a tokenizer with the fingerprint of the one that a folder's weights learnt.

    Raises:
        ValueError: it is another.
    """
    if learnt != tokenizer.fingerprint:
        raise ValueError(
            f"data.tokenizer={tokenizer.path} has fingerprint {tokenizer.fingerprint[:12]}, but {folder} was trained "
            f"with a tokenizer of {learnt[:12]}, whose tokens its weights know; put that one back, or train a new run"
        )


class StoredState:
    """Reads a checkpoint's weights and moments by parameter and range of elements, on the CPU and without process groups.

    Args:
        folder: the checkpoint.

    Raises:
        FileNotFoundError: the folder has no description.
        ValueError: the description is not JSON, of an unknown format, or lacks something.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / DESCRIPTION
        try:
            self.facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if self.facts.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format={self.facts.get('format')} must be {FORMAT}; read it with the code that wrote it"
            )
        missing = [key for key in _NEEDED if key not in self.facts]
        if missing:
            raise ValueError(f"{path} is damaged: it has no {missing[0]}; restore the checkpoint from a copy")
        self.shapes: dict[str, list[int]] = self.facts["shapes"]
        self.splits = {name: Split(*values) for name, values in self.facts["splits"].items()}
        self.tensor_size: int = self.facts["layout"]["tensor"]
        self._files: dict[str, Any] = {}
        # for each parameter of each tensor-parallel rank: where its fragments start, in order, and in which files they are
        self._places: dict[tuple[str, int], dict[int, str]] = {}
        for file, held in self.facts["fragments"].items():
            for name, start in held["starts"].items():
                self._places.setdefault((name, held["tensor_rank"]), {})[start] = file
        self._places = {whose: dict(sorted(places.items())) for whose, places in self._places.items()}

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Compare a tokenizer with that of the run that saved; older checkpoints do not say which it was.

        Raises:
            ValueError: it is another.
        """
        learnt = self.facts.get("about", {}).get("tokenizer", tokenizer.fingerprint)
        check_learnt_tokenizer(tokenizer, learnt, self.folder)

    def read(self, kind: str, name: str, tensor_rank: int, start: int, numel: int) -> Tensor:
        """Read elements `start` to `start + numel` of a flattened parameter, float32 [numel].

        Args:
            kind: `weight`, `exp_avg` or `exp_avg_sq`.
            name: of the parameter.
            tensor_rank: whose shard is meant, among the tensor-parallel ranks of the run that saved.
            start, numel: which elements of the flattened shard.

        Raises:
            ValueError: the files do not hold all of them, or one is damaged.
        """
        result = torch.empty(numel)
        missing, stop = numel, start + numel
        places = self._places.get((name, tensor_rank), {})
        for (first, file), following in zip(places.items(), [*list(places)[1:], stop], strict=False):
            # a fragment ends where the next one begins; of hundreds of files a process needs few, and opens no others
            if first >= stop or following <= start:
                continue
            stored = self._open(file).get_slice(f"{kind}/{name}")
            begin, end = max(start, first), min(stop, first + stored.get_shape()[0])
            if begin < end:
                result[begin - start : end - start] = stored[begin - first : end - first]
                missing -= end - begin
        if missing:
            raise ValueError(f"{self.folder} lacks {missing} of {numel} elements of {kind}/{name}")
        return result

    def shard(self, kind: str, name: str, tensor_rank: int) -> Tensor:
        """Read a tensor-parallel rank's shard of a parameter, in its shape."""
        shape = self.shapes[name]
        return self.read(kind, name, tensor_rank, 0, torch.Size(shape).numel()).view(shape)

    def whole(self, kind: str, name: str) -> Tensor:
        """Read a parameter and join the shards of all tensor-parallel ranks."""
        split = self.splits.get(name)
        ranks = range(self.tensor_size if split is not None else 1)
        return join([self.shard(kind, name, rank) for rank in ranks], split)

    def whole_shape(self, name: str) -> list[int]:
        """Shape of a parameter without tensor parallelism."""
        return whole_shape(self.shapes[name], self.splits.get(name), self.tensor_size)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """Read the states of a process's random generators, by device."""
        tensors = self._all(state_file(rank), "random/")
        return {key.removeprefix("random/"): tensor for key, tensor in tensors.items()}

    def probe(self) -> dict[str, Tensor]:
        """Read the row of tokens whose loss `checkpoint.json` holds."""
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
    """A checkpoint's float32 master weights by parameter name, each read and joined from its shards on access.

    Files are memory-mapped: only the weights that a caller holds take memory.
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
    """Say which fragments each file holds, as `checkpoint.json` keeps it.

    Args:
        ranks: for each process its tensor-parallel rank, and by parameter name the first element of its fragment.
    """
    return {
        state_file(rank): {"tensor_rank": tensor_rank, "starts": starts}
        for rank, (tensor_rank, starts) in enumerate(ranks)
    }
