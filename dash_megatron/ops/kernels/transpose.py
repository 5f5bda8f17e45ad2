"""Transposed routing lists: for every chunk the tiles that list it, in order, and an even partition of that work.

A counting sort that gives the same order every time: tiles are cut into runs, one program counts (then places) the
entries of a run tile by tile, and the places where runs begin are prefix sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.tiles import tile_place

# Tiles of a run, of which there are more where the table of counts would pass the bound on its entries.
MIN_RUN_TILES = 32
MAX_COUNTS = 2**24
BLOCK_ENTRIES = 128


class Transposed(NamedTuple):
    """For row r = head * chunks + chunk, chunks counted from the first of a window: entries offset[r] up to offset[r + 1], by ascending tile."""

    place: Tensor
    """int64 [room]: first token of the tile that lists the chunk + 2 ** 32 * number of its tokens."""
    entry: Tensor
    """int64 [room]: where in the lists."""
    offset: Tensor
    """int64 [rows + 1]."""


class WorkPartition(NamedTuple):
    """All work of the transposed pass, split evenly (stream-K): part p does the work from bound[p] up to bound[p + 1].

    The work of a row is its own chunk's tiles, then its entries; work is numbered through all rows.
    """

    work: Tensor
    """int64 [rows + 1]: where each row's work begins."""
    bound: Tensor
    """int64 [parts + 1]."""
    row: Tensor
    """int64 [parts]: the row in which each part begins."""


@triton.jit(do_not_specialize=["first"])
def _scatter_run_kernel(
    places, place_out, entry_out, list_chunk, list_offset, list_count, chunk_start, chunk_end,
    first, num_chunks, tiles_per_head, runs_per_head,
    T: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Count how often the tiles of a run list each chunk or, if FILL, write their entries to the places counted."""
    i_h, i_run = tl.program_id(0) // runs_per_head, tl.program_id(0) % runs_per_head
    places += tl.program_id(0).to(tl.int64) * num_chunks - first
    for i_tile in range(i_run * RUN, min(i_run * RUN + RUN, tiles_per_head)):
        p_tile = i_h.to(tl.int64) * tiles_per_head + i_tile
        count = tl.load(list_count + p_tile)
        if count > 0:
            offset = tl.load(list_offset + p_tile)
            _, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
            place = start.to(tl.int64) + ((end - start).to(tl.int64) << 32)
            for i_e in range(0, count, BLOCK):
                o_e = i_e + tl.arange(0, BLOCK)
                m_e = o_e < count
                # a tile lists a chunk once, so that no two lanes meet
                b_c = tl.load(list_chunk + offset + o_e, mask=m_e, other=0)
                b_place = tl.load(places + b_c, mask=m_e, other=0)
                if FILL:
                    tl.store(place_out + b_place, tl.zeros([BLOCK], tl.int64) + place, mask=m_e)
                    tl.store(entry_out + b_place, offset + o_e, mask=m_e)
                tl.store(places + b_c, b_place + 1, mask=m_e)
            # the next tile may read what other lanes wrote
            tl.debug_barrier()


def run_tiles(sizes: Sizes, num_chunks: int, run: int) -> int:
    """Tiles of a run: `run`, or so many more that the table of counts keeps to its bound."""
    while (
        triton.cdiv(sizes.tiles_per_head, run) * sizes.num_kv_heads * num_chunks > MAX_COUNTS
        and run < sizes.tiles_per_head
    ):
        run *= 2
    return run


def transpose(
    lists: Lists, chunks: Tensor, sizes: Sizes, window: tuple[int, int] | None = None
) -> Transposed:
    """Transpose lists whose chunks all lie in the `window` first <= c < last, or are those of the queries if None."""
    first, last = (0, sizes.num_chunks) if window is None else window
    device, Hkv, nc = lists.chunk.device, sizes.num_kv_heads, last - first
    run = run_tiles(sizes, nc, MIN_RUN_TILES)
    runs = triton.cdiv(sizes.tiles_per_head, run)
    place, entry = torch.empty(2, *lists.chunk.shape, dtype=torch.int64, device=device)

    def launch(places: Tensor, FILL: bool) -> None:
        _scatter_run_kernel[(runs * Hkv,)](
            places, place, entry, lists.chunk, lists.offset, lists.counts, chunks[0], chunks[1],
            first, nc, sizes.tiles_per_head, runs,
            T=sizes.tile_tokens, C=sizes.chunk_size, RUN=run, BLOCK=BLOCK_ENTRIES, FILL=FILL, num_warps=4,
        )  # fmt: skip

    counts = torch.zeros(Hkv, runs, nc, dtype=torch.int64, device=device)
    launch(counts, FILL=False)
    per_row = counts.sum(1).view(-1)
    offset = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    launch(counts.cumsum(1) - counts + offset[:-1].view(Hkv, 1, nc), FILL=True)
    return Transposed(place, entry, offset)


def rows_of_bounds(work: Tensor, bound: Tensor) -> Tensor:
    """The row whose work contains each bound; rows without work share their beginning with the next."""
    return torch.searchsorted(work, bound, right=True) - 1


def partition_work(
    transposed: Transposed, queries: Tensor, sizes: Sizes, parts: int, absent: Tensor | None = None
) -> WorkPartition:
    """Give every part the same amount of work, wherever that cuts a row. The last parts may be empty.

    `queries`, int32 [2, Hkv, window], gives first and one past the last row of the queries of each row's chunk. There is no
    work where `absent`, bool [], says so.
    """
    start, end = queries
    row_work = transposed.offset.diff().view(start.shape) + (end > start) * sizes.tiles_per_chunk
    if absent is not None:
        row_work = row_work.masked_fill(absent, 0)
    work = torch.cat([row_work.new_zeros(1), row_work.flatten().cumsum(0)])
    share = ((work[-1] + parts - 1) // parts).clamp(1)
    bound = torch.minimum(torch.arange(parts + 1, device=work.device) * share, work[-1])
    return WorkPartition(work, bound, rows_of_bounds(work, bound[:-1]))
