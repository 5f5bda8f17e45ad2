"""Which chunks the routers of trained models selected (`benchmarks/choices`): `python -m benchmarks.choices` prints what tiles visit.

Each file is one model on one document; the README beside them says which.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dash_megatron.command_line import ending_with_reader

FOLDER = Path(__file__).parent / "choices"
TILES = (1, 2, 4, 8, 16, 32)
POSITIONS = (512, 1024, 2048, 4096, 8192, 16384)


def model_names() -> list[str]:
    """Names of the models there are files of."""
    return sorted(path.stem for path in FOLDER.glob("*.npz"))


def layers_of(model: str) -> list[int]:
    """Numbers of the layers a model's file holds, counted from 0."""
    with np.load(FOLDER / f"{model}.npz") as arrays:
        return sorted(int(name.removeprefix("layer_")) for name in arrays.files)


def chunk_size_of(model: str) -> int:
    """Tokens of a chunk in a model's file."""
    with np.load(FOLDER / f"{model}.npz") as arrays:
        _, chunks, token_bytes = arrays[arrays.files[0]].shape
    return int(8 * token_bytes // chunks)


class RouterKind(NamedTuple):
    """What the name of a model says of its routers; fields are those of `Router`, but for the last."""

    local_chunks: int = 0
    query_pool: int = 1
    pool_heads: bool = False
    projections: bool = False
    """Whether they have projections of their own."""


def router_of(model: str) -> RouterKind:
    """The routers of a model, by its name: `_w4m16gp` are 4 local chunks, means of 16 queries and of a group, and projections."""
    found = re.search(r"_w(\d+)m(\d+)(g?)(p?)$", model)
    return RouterKind(int(found[1]), int(found[2]), bool(found[3]), bool(found[4])) if found else RouterKind()


def load_selected(model: str, layer: int) -> Tensor:
    """Past chunks that each token selected in one layer.

    Returns:
        Bool [key/value heads, tokens, chunks]. A token's own chunk, which it always attends to, is not in it.
        The chunk size is tokens / chunks.

    Raises:
        FileNotFoundError: no file of that model.
        KeyError: a layer the file does not hold.
    """
    with np.load(FOLDER / f"{model}.npz") as arrays:
        packed_HcN = arrays[f"layer_{layer}"]
    return torch.from_numpy(np.unpackbits(packed_HcN, axis=-1)).bool().transpose(1, 2)


def past_density(selected_HNc: Tensor) -> float:
    """Selected past chunks over available ones."""
    _, tokens, chunks = selected_HNc.shape
    own_N = torch.arange(tokens) // (tokens // chunks)
    return selected_HNc.count_nonzero().item() / (selected_HNc.shape[0] * own_N.sum().item())


def visited_over_selected(selected_HNc: Tensor, tiles: Sequence[int] = TILES) -> dict[int, float]:
    """How many times the selected past chunks a tile visits, by tokens in a tile: it visits what any token of it selected.

    Raises:
        ValueError: tiles that do not divide the tokens, or are no powers of two.
    """
    tokens = selected_HNc.shape[1]
    if any(tokens % tile or tile & (tile - 1) for tile in tiles):
        raise ValueError(
            f"{tokens} tokens are no whole number of tiles of {list(tiles)}, all of them powers of two"
        )
    selected, visited = selected_HNc.count_nonzero().item(), {}
    union_HNc, width = selected_HNc, 1
    for tile in sorted(tiles):
        while width < tile:
            union_HNc, width = union_HNc[:, ::2] | union_HNc[:, 1::2], 2 * width
        visited[tile] = tile * union_HNc.count_nonzero().item() / selected
    return visited


def density_by_position(model: str, edges: Sequence[int] = POSITIONS) -> list[float]:
    """Selected past chunks over available ones, of all layers and heads, for tokens from one edge up to the next."""
    selected, available = torch.zeros(len(edges) - 1), torch.zeros(len(edges) - 1)
    for layer in layers_of(model):
        selected_HNc = load_selected(model, layer)
        heads, tokens, chunks = selected_HNc.shape
        own_N = torch.arange(tokens) // (tokens // chunks)
        for i, (first, last) in enumerate(pairwise(edges)):
            selected[i] += selected_HNc[:, first:last].count_nonzero()
            available[i] += heads * own_N[first:last].sum()
    return (selected / available).tolist()


@ending_with_reader()
def main() -> None:
    """Print one line for each layer of each model, then past densities by position."""
    print("model          layer  chunk  past density  visited/selected at", *(f"{tile:5d}" for tile in TILES))
    for model in model_names():
        for layer in layers_of(model):
            selected_HNc = load_selected(model, layer)
            size = selected_HNc.shape[1] // selected_HNc.shape[2]
            visited = visited_over_selected(selected_HNc)
            figures = " ".join(f"{visited[tile]:5.2f}" for tile in TILES)
            print(f"{model:14s} {layer:5d} {size:6d} {past_density(selected_HNc):13.3f} {'':19s} {figures}")
    print("\nmodel          past density from", *(f"{first}-{last}" for first, last in pairwise(POSITIONS)))
    for model in model_names():
        print(f"{model:31s}", *(f"{x:9.3f}" for x in density_by_position(model)))


if __name__ == "__main__":
    main()
