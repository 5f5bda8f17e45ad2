"""How a weight is split over tensor-parallel ranks: cut a rank's shard out of it, and join shards to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor


class Split(NamedTuple):
    """A weight is `blocks` equal blocks along `dim`; a rank holds its share of each, in the blocks' order."""

    dim: int
    blocks: int
    """2 for the gate and up rows of a gated feed-forward layer, which one matrix holds; 1 otherwise."""


def mark_splits(model: torch.nn.Module) -> None:
    """Give every weight that Megatron's layers split the attributes that say so.

    Megatron does it while it initializes weights, which here it does not. Biases it marks when it makes them.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (VocabParallelEmbedding, ColumnParallelLinear, RowParallelLinear)):
            continue
        if module.weight is not None:  # the output layer borrows a tied embedding's
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            blocks = 2 if name.endswith("linear_fc1") and module.config.gated_linear_unit else 1
            set_tensor_model_parallel_attributes(module.weight, True, dim, blocks)


def split_of(parameter: Tensor) -> Split | None:
    """How a parameter is split; None: every rank holds all of it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Split(parameter.partition_dim, parameter.partition_stride)  # type: ignore[attr-defined]


def splits(model: torch.nn.Module) -> dict[str, Split]:
    """How each split parameter is split, by name; parameters that are not split are skipped."""
    found = {name: split_of(parameter) for name, parameter in model.named_parameters()}
    return {name: split for name, split in found.items() if split is not None}


def whole_shape(shape: Sequence[int], split: Split | None, size: int) -> list[int]:
    """Shape of a weight whose shards, one on each of `size` ranks, have `shape`."""
    return [
        length * size if split is not None and dim == split.dim else length
        for dim, length in enumerate(shape)
    ]


def shard(whole: Tensor, split: Split | None, rank: int, size: int) -> Tensor:
    """The part of a weight that a rank of `size` holds."""
    if split is None:
        return whole
    blocks = whole.chunk(split.blocks, split.dim)
    return torch.cat([block.chunk(size, split.dim)[rank] for block in blocks], split.dim)


def join(shards: Sequence[Tensor], split: Split | None) -> Tensor:
    """The weight whose shards, in the order of ranks, these are: the inverse of `shard`."""
    if split is None:
        return shards[0]
    by_block = zip(*(part.chunk(split.blocks, split.dim) for part in shards), strict=True)
    return torch.cat([piece for block in by_block for piece in block], split.dim)
