"""Draw which chunks the router of a trained model selects in each layer:

    python -m docs.tools.chunk_picture --output docs/results/

From what tokens of one document selected (`benchmarks/choices`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.choices import chunk_size_of, layers_of, load_selected
from dash_megatron.command_line import ending_with_reader
from dash_megatron.drawing import save
from dash_megatron.studies.routing_pictures import draw_chunks

MODEL = "d25_c32_w4m16g"
PICTURE = "quality_chunks.png"
CHUNKS_PER_CELL = 4


def selected_shares(layer: int) -> np.ndarray:
    """Share of each chunk's tokens that select each chunk, [kv heads, chunks, chunks]: 1 for their own, NaN for later ones."""
    selected_HNc = load_selected(MODEL, layer).float()
    share_Hcc = selected_HNc.unflatten(1, (selected_HNc.shape[2], -1)).mean(2).numpy()
    chunk = np.arange(share_Hcc.shape[1])
    share_Hcc[:, chunk, chunk] = 1
    return np.where(chunk[:, None] >= chunk, share_Hcc, np.nan)


def in_cells(share_Hcc: np.ndarray) -> np.ndarray:
    """Means over cells of `CHUNKS_PER_CELL` chunks a side, without later chunks; NaN where a cell has no others."""
    heads, chunks, _ = share_Hcc.shape
    cells = chunks // CHUNKS_PER_CELL
    parts = share_Hcc.reshape(heads, cells, CHUNKS_PER_CELL, cells, CHUNKS_PER_CELL)
    known = np.isfinite(parts).sum((2, 4))
    return np.where(known, np.nansum(parts, (2, 4)) / np.maximum(known, 1), np.nan)


@ending_with_reader()
def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the picture")
    options = parser.parse_args(arguments)
    shares = {layer: selected_shares(layer) for layer in layers_of(MODEL)}
    densities = {layer: float(np.nanmean(share)) for layer, share in shares.items()}
    figure = draw_chunks(
        {layer: in_cells(share) for layer, share in shares.items()}, densities, CHUNKS_PER_CELL
    )
    chunks = next(iter(shares.values())).shape[1]
    figure.suptitle(f"{MODEL}: one validation document, {chunks} chunks of {chunk_size_of(MODEL)} tokens")
    print(save(figure, options.output / PICTURE))


if __name__ == "__main__":
    main()
