"""Selected pairs in slabs of whole tokens: gathered by chunk, while what they give is kept by token.

A slab holds all pairs of consecutive query tiles of one key/value head, own chunks left out. In it every pair has two
places: one by chunk, in which tokens that selected the same chunk lie side by side and are multiplied together, and one by
token, its slot, in which a token's chunks lie side by side in the order of its list and are summed in that order.
Where slabs begin is found on the device, so that the host never waits; those beyond the last are empty.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.configs import ByPair
from dash_megatron.ops.kernels.geometry import KeyPlaces, Lists, Sizes, own_places
from dash_megatron.ops.kernels.tiles import tile_place

# Bytes of the partial results of one slab.
WORKSPACE_BYTES = 2**31
# Bytes of the places of pairs. Places of as many slabs as fit into them are written at once, at least of one slab.
PLACES_BYTES = 2**28
# Most entries of the table of counts, 4 bytes each: a row for each tile, a column for each chunk. Where all tiles have more, the
# table is made again for every few slabs, COUNTED_SLABS at most.
MAX_COUNTS, COUNTED_SLABS = 2**26, 8
# A program is one warp, which takes a block of list entries at a time: BLOCK_ELEMENTS entries times tokens of the tile, and at most
# MOST_BLOCK entries. Each lane is a token. So a lane ranks its token's chunks alone, and a warp ranks a chunk's tokens alone.
BLOCK_ELEMENTS, MOST_BLOCK = 1024, 128
# Registers of a thread of the kernel that writes places: with so many, twelve programs fit a multiprocessor. And its programs for
# each part of a slab.
FILL_REGISTERS = 168
FILL_PROGRAMS_PER_PART = 8
# Rows and columns of a block of the table of counts.
PLACE_TILES, PLACE_CHUNKS = 64, 32
# Elements of the partial results that a program, one warp, adds up at a time. It takes up to SUM_HEADS heads of a token together,
# because it then waits only once for what tells where to load them from.
SUM_ELEMENTS, SUM_HEADS = 2048, 4
# Registers of a thread of that program. Left to itself, the compiler took 162 where outputs are merged, and 95 where gradients of 4
# heads are added: with these the sums took 13.1 ms in place of 7.1 on an H200.
SUM_REGISTERS = 128
# Such programs for each part of a slab: twice as many as run at the same time, and no more, since a launch that finds no work takes
# as long as its programs take to start.
SUM_PROGRAMS_PER_PART = 8


class Placed(NamedTuple):
    """Where the pairs of n slabs go: one after the other, nc chunks, R tiles or more."""

    first_tile: Tensor
    """int64 [n + 1]: the first tile of each slab, tiles counted through all heads."""
    tile_place: Tensor
    """int32 [R, nc]: of each tile from the first on, how many tokens of earlier tiles of its slab selected each chunk."""
    row_place: Tensor
    """int64 [n, nc + 1]: where the pairs of each chunk begin in the slab."""
    row_work: Tensor
    """int64 [n, nc + 1]: where its work begins, in steps."""
    part_bound: Tensor
    """int64 [n, parts + 1]: part p of a slab does the work from p up to p + 1."""
    part_row: Tensor
    """int64 [n, parts]: the chunk in which each part begins."""

    @property
    def work(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What programs need to find their part of a slab."""
        return self.row_place, self.row_work, self.part_bound, self.part_row, self.first_tile


class PairSlabs(NamedTuple):
    """How the pairs of all tiles are cut into slabs, of which the last may be empty."""

    by_pair: ByPair
    num_slabs: int
    room: int
    """At least the pairs of a slab, a multiple of 16."""
    at_once: int
    """Slabs whose places are written at once."""
    taken: Tensor
    """bool []: whether pairs are the cheaper way. If not, all slabs are empty."""
    key_start: Tensor
    """int32 [Hkv, nc]: the first row of the keys of each chunk."""
    first_chunk: int
    """Number of the first of these chunks."""
    slab_of_tile: Tensor
    """int64 [tiles], ascending."""
    first_tile: Tensor
    """int64 [slabs + 1]: the first tile of each slab."""
    slot: Tensor
    """int64 [tiles * T + 1]: where the slots of each token begin, counted through the rows of all tiles."""
    count_tiles: int
    """Tiles of the table of counts."""
    placed: Placed | None
    """Places of all slabs, if the table of counts has room for all tiles; None: they are made for `at_once` slabs at a time."""

    @property
    def sum_programs(self) -> int:
        """Programs of a launch that adds up what the pairs of each token gave."""
        return self.by_pair.parts * SUM_PROGRAMS_PER_PART

    def rest(self, lists: Lists) -> Lists:
        """The lists that are left to tiles: as they are, or empty where pairs are taken."""
        return lists._replace(counts=lists.counts.masked_fill(self.taken, 0))


def heads_and_slots(sizes: Sizes) -> tuple[int, int]:
    """How many heads of a token, and how many of its slots, are added up at a time."""
    heads = math.gcd(sizes.group, SUM_HEADS)
    return heads, SUM_ELEMENTS // (heads * sizes.block_d)


class SlabPairs(NamedTuple):
    """The pairs of one slab or, with one more dimension, of several, by chunk, in a workspace that is used again."""

    token_shift: Tensor
    """int64 [room]: a token, and 2 ** 32 times the bits of a float32: its centred log prior over sigma, which shifts scores."""
    slot: Tensor
    """int32 [room]: its place by token."""
    entry: Tensor | None
    """int64 [room]: its place in the lists' log priors."""


@triton.jit
def _selected(
    i_e, count, offset, first_chunk, list_chunk, list_log_prior, m_token, T: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Read a block of a tile's list entries.

    Returns whether each entry exists and its chunk, [BLOCK] each; then [T, BLOCK] each where the log priors lie, the log priors, and
    1 where the token selected the chunk, else 0.
    """
    o_e = i_e + tl.arange(0, BLOCK)
    m_e = o_e < count
    o_log, i_log = tl.arange(0, BLOCK)[None, :] * T + tl.arange(0, T)[:, None], (offset + i_e) * T
    b_log = tl.load(list_log_prior + i_log + o_log, mask=m_e[None, :] & m_token[:, None], other=float("-inf"))
    b_c = tl.load(list_chunk + offset + o_e, mask=m_e, other=first_chunk) - first_chunk
    return m_e, b_c, i_log + o_log, b_log, (b_log > float("-inf")).to(tl.int32)


@triton.jit
def _rank_of_token(b_selected):
    """How many tokens before each one selected an entry, of zeros and ones [T, BLOCK]: summed in the bytes of a number, four entries at once."""
    T: tl.constexpr = b_selected.shape[0]
    BLOCK: tl.constexpr = b_selected.shape[1]
    b_byte = 8 * tl.arange(0, 4)[None, :, None]
    b_four = tl.sum(tl.reshape(b_selected, (T, 4, BLOCK // 4)) << b_byte, 1)
    b_before = tl.cumsum(b_four, 0) - b_four
    return tl.reshape((b_before[:, None, :] >> b_byte) & 255, (T, BLOCK))


# Where log priors are aligned is not told: a thread that loads four tokens at once would have to share out what it found.
@triton.jit(
    do_not_specialize=["slab", "num_slabs", "first_chunk"], do_not_specialize_on_alignment=["list_log_prior"]
)
def _count_kernel(
    taken, counts, token_count, first_tile, slab, num_slabs, first_chunk, list_chunk, list_log_prior, list_offset, list_count,
    chunk_start, chunk_end, num_chunks, tiles_per_head, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count how many tokens of a tile selected each chunk, and how many chunks each token selected, unless pairs are not taken.

    With `first_tile` only tiles of `num_slabs` slabs are counted, the first of them in the first row. One of the counts may be None.
    """
    if tl.load(taken) == 0:
        return
    i_row = tl.program_id(0).to(tl.int64)
    i_tile = i_row
    if first_tile is not None:
        i_tile += tl.load(first_tile + slab)
        if i_tile >= tl.load(first_tile + slab + num_slabs):
            return
    if counts is not None:
        counts += i_row * num_chunks
        for i_c in range(0, num_chunks, T * BLOCK):
            o_c = i_c + tl.arange(0, T * BLOCK)
            tl.store(counts + o_c, tl.zeros([T * BLOCK], tl.int32), mask=o_c < num_chunks)
        # other lanes may have written what this tile reads
        tl.debug_barrier()
    o_t = tl.arange(0, T)
    count, offset = tl.load(list_count + i_tile), tl.load(list_offset + i_tile)
    _, start, end = tile_place(i_tile % tiles_per_head, chunk_start, chunk_end, C // T, T)
    b_count = tl.zeros([T, BLOCK], tl.int32)
    for i_e in range(0, count, BLOCK):
        m_e, b_c, _o_log, _b_log, b_selected = _selected(
            i_e, count, offset, first_chunk, list_chunk, list_log_prior, start + o_t < end, T, BLOCK
        )
        if counts is not None:
            # a tile lists a chunk once, so that no two lanes meet
            tl.store(counts + b_c, tl.sum(b_selected, 0), mask=m_e)
        b_count += b_selected
    if token_count is not None:
        tl.store(token_count + i_tile * T + o_t, tl.sum(b_count, 1))


@triton.jit
def _place_kernel(counts, row_pairs, first_tile, num_chunks, TILES: tl.constexpr, CHUNKS: tl.constexpr):
    """Turn counts of a slab's tiles into the number of a chunk's pairs before each tile, and add up those of the slab."""
    i_slab, o_r = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    o_c = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    before = tl.load(first_tile)
    stop = tl.load(first_tile + i_slab + 1) - before
    b_before = tl.zeros([CHUNKS], tl.int32)
    for i_row in range(tl.load(first_tile + i_slab) - before, stop, TILES):
        m_count = (i_row + o_r < stop)[:, None] & (o_c < num_chunks)[None, :]
        p_count = counts + (i_row + o_r)[:, None] * num_chunks + o_c[None, :]
        b_count = tl.load(p_count, mask=m_count, other=0)
        tl.store(p_count, b_before[None, :] + tl.cumsum(b_count, 0) - b_count, mask=m_count)
        b_before += tl.sum(b_count, 0)
    tl.store(row_pairs + i_slab * num_chunks + o_c, b_before.to(tl.int64), mask=o_c < num_chunks)


@triton.jit(
    do_not_specialize=["before", "slab", "num_slabs", "room", "first_chunk"],
    do_not_specialize_on_alignment=["list_log_prior"],
)
def _fill_kernel(
    places, row_place, first_tile, slab_of_tile, slot, before, slab, num_slabs, room, pair_out, slot_out, entry_out,
    first_chunk, list_chunk, list_log_prior, list_offset, list_count, mean_log, chunk_start, chunk_end, inv_sigma,
    num_chunks, tiles_per_head, HKV: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the pairs of `num_slabs` slabs, each into a room of its own; `before` slabs lie before the first one placed."""
    o_t = tl.arange(0, T)
    first_placed = tl.load(first_tile)
    first, stop = tl.load(first_tile + slab), tl.load(first_tile + slab + num_slabs)
    for i_tile in range(first + tl.program_id(0), stop, tl.num_programs(0)):
        i_slab = tl.load(slab_of_tile + i_tile) - before
        begin, here = tl.load(slot + tl.load(first_tile + i_slab) * T), (i_slab - slab) * room
        p_tile, p_row = places + (i_tile - first_placed) * num_chunks, row_place + i_slab * (num_chunks + 1)
        count, offset = tl.load(list_count + i_tile), tl.load(list_offset + i_tile)
        i_h = i_tile // tiles_per_head
        _, start, end = tile_place(i_tile % tiles_per_head, chunk_start, chunk_end, C // T, T)
        o_n = start.to(tl.int64) + o_t
        b_slot = (tl.load(slot + i_tile * T + o_t) - begin).to(tl.int32)
        b_mean = tl.load(mean_log + o_n * HKV + i_h, mask=o_n < end, other=0.0)
        for i_e in range(0, count, BLOCK):
            m_e, b_c, o_log, b_log, b_selected = _selected(
                i_e, count, offset, first_chunk, list_chunk, list_log_prior, o_n < end, T, BLOCK
            )
            # places in a slab fit 32 bits
            b_place = tl.load(p_row + b_c, mask=m_e, other=0).to(tl.int32)
            b_place += tl.load(p_tile + b_c, mask=m_e, other=0)
            o_out = b_place[None, :] + _rank_of_token(b_selected)
            b_shift = (b_log - b_mean[:, None]) * inv_sigma
            b_pair = (b_shift.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_n[:, None]
            tl.store(pair_out + here + o_out, b_pair, mask=b_selected > 0)
            b_rank = b_slot[:, None] + tl.cumsum(b_selected, 1) - b_selected
            tl.store(slot_out + here + o_out, b_rank, mask=b_selected > 0)
            if entry_out is not None:
                tl.store(entry_out + here + o_out, o_log, mask=b_selected > 0)
            b_slot += tl.sum(b_selected, 1)


def _block_constants(sizes: Sizes) -> dict[str, int]:
    """What kernels over blocks of entries know when they are compiled."""
    block = min(MOST_BLOCK, BLOCK_ELEMENTS // sizes.tile_tokens)
    return {"T": sizes.tile_tokens, "C": sizes.chunk_size, "BLOCK": block, "num_warps": 1}


def plan_slabs(
    lists: Lists,
    chunks: Tensor,
    sizes: Sizes,
    pair_bytes: int,
    by_pair: ByPair | None,
    num_pairs: Tensor | None,
    entries: bool,
    keys: KeyPlaces | None = None,
) -> PairSlabs | None:
    """Decide whether pairs are taken, and cut them into slabs; None where they never are, or where even a tile's would not fit.

    Args:
        lists, chunks, sizes: of the queries.
        pair_bytes: of what is kept for a pair.
        by_pair: how the stage goes over pairs.
        num_pairs: int64 [], how many pairs were selected; None: those of all log priors, each of which is in a list then.
        entries: whether `SlabPairs.entry` will be asked for.
        keys: where keys lie, if not with the queries.
    """
    if by_pair is None or by_pair.above == float("inf"):
        return None
    T, device = sizes.tile_tokens, lists.chunk.device
    key_start, first_chunk, counts = own_places(None, chunks, sizes)[0], 0, lists.counts
    if keys is not None:
        key_start, first_chunk, counts = keys.start, keys.window[0], keys.counts
    nc = key_start.shape[1]
    room, most_of_tile = WORKSPACE_BYTES // pair_bytes // 16 * 16, T * nc
    if 2 * most_of_tile > room:
        return None
    if num_pairs is None:
        num_pairs = (lists.log_prior > float("-inf")).sum()
    taken = counts.sum() * T > by_pair.above * num_pairs
    if by_pair.above <= 0:
        taken = torch.ones_like(taken)
    # taken pairs are few beside those listed
    most_taken = min(int(lists.log_prior.numel() / max(1.0, by_pair.above)), sizes.num_tiles * most_of_tile)
    share, room = room - most_of_tile, triton.cdiv(max(1, min(room, most_taken)), 16) * 16
    at_once = max(1, PLACES_BYTES // (room * _place_bytes(entries)))
    count_tiles = slab_tiles = sizes.num_tiles
    at_a_time = count_tiles * nc > MAX_COUNTS
    if at_a_time:
        at_once = min(at_once, COUNTED_SLABS)
        slab_tiles = max(1, MAX_COUNTS // nc // at_once)
        count_tiles = slab_tiles * at_once

    # not set where pairs are not taken, and then without effect
    token_count = torch.empty(sizes.num_tiles * T, dtype=torch.int32, device=device)
    table = None if at_a_time else torch.empty(count_tiles, nc, dtype=torch.int32, device=device)
    _launch_count(taken, table, token_count, None, first_chunk, nc, lists, chunks, sizes)
    slot = _exclusive_sum(token_count)

    # A slab ends with the first tile that reaches its share or is the last it may have, or with its head.
    before_Ht = slot[:-1:T].view(sizes.num_kv_heads, -1)
    tile_t = torch.arange(sizes.tiles_per_head, device=device)
    slab_Ht = (before_Ht - before_Ht[:, :1]) // share + tile_t // slab_tiles
    num_slabs = most_taken // share + sizes.num_kv_heads * triton.cdiv(sizes.tiles_per_head, slab_tiles)
    slab_of_tile = slab_Ht + _exclusive_sum(slab_Ht[:, -1] + 1)[:-1, None]
    slab_of_tile = slab_of_tile.flatten().masked_fill(~taken, num_slabs)
    first_tile = torch.searchsorted(slab_of_tile, torch.arange(num_slabs + 1, device=device))
    slabs = PairSlabs(
        by_pair, num_slabs, room, min(at_once, num_slabs), taken, key_start, first_chunk, slab_of_tile, first_tile, slot,
        count_tiles, None,
    )  # fmt: skip
    return slabs if table is None else slabs._replace(placed=_place(slabs, table, first_tile, sizes))


def _exclusive_sum(x: Tensor) -> Tensor:
    """Sums over the last dimension of all entries before each one [..., n + 1]; the last is the sum of all n."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _launch_count(
    taken: Tensor, counts: Tensor | None, token_count: Tensor | None, first_tile: Tensor | None, first_chunk: int,
    num_chunks: int, lists: Lists, chunks: Tensor, sizes: Sizes,
) -> None:  # fmt: skip
    """Count pairs of all tiles or, with `first_tile` [n + 1], those of n slabs."""
    tiles = sizes.num_tiles if counts is None else len(counts)
    num_slabs = 0 if first_tile is None else len(first_tile) - 1
    _count_kernel[(tiles,)](
        taken.view(torch.uint8), counts, token_count, first_tile, 0, num_slabs, first_chunk, *lists, chunks[0], chunks[1],
        num_chunks, sizes.tiles_per_head, **_block_constants(sizes),
    )  # fmt: skip


def _place(slabs: PairSlabs, counts: Tensor, first_tile: Tensor, sizes: Sizes) -> Placed:
    """Find the places of the slabs that begin with the tiles `first_tile`, from the counts of these tiles, which become places."""
    num_slabs, nc, by_pair = len(first_tile) - 1, counts.shape[1], slabs.by_pair
    row_pairs_Sc = torch.empty(num_slabs, nc, dtype=torch.int64, device=counts.device)
    _place_kernel[(num_slabs, triton.cdiv(nc, PLACE_CHUNKS))](
        counts, row_pairs_Sc, first_tile, nc, TILES=PLACE_TILES, CHUNKS=PLACE_CHUNKS, num_warps=4
    )
    step = by_pair.config.block // sizes.padded_group
    row_work = _exclusive_sum((row_pairs_Sc + step - 1) // step)
    share = (row_work[:, -1:] + by_pair.parts - 1) // by_pair.parts
    part = torch.arange(by_pair.parts + 1, device=counts.device)
    part_bound = torch.minimum(part * share, row_work[:, -1:])
    part_row = torch.searchsorted(row_work, part_bound[:, :-1].contiguous(), right=True) - 1
    return Placed(first_tile, counts, _exclusive_sum(row_pairs_Sc), row_work, part_bound, part_row)


def _place_bytes(entries: bool) -> int:
    """Bytes that one pair takes in `SlabPairs`."""
    return 20 if entries else 12


def new_pairs(slabs: PairSlabs, entries: bool) -> SlabPairs:
    """The workspace for the pairs of as many slabs as are filled at once, with their `entry` only if asked for."""
    token_shift = torch.empty(slabs.at_once, slabs.room, dtype=torch.int64, device=slabs.slot.device)
    entry = torch.empty_like(token_shift) if entries else None
    return SlabPairs(token_shift, torch.empty_like(token_shift, dtype=torch.int32), entry)


def filled_slabs(
    slabs: PairSlabs,
    lists: Lists,
    mean_log: Tensor,
    chunks: Tensor,
    sizes: Sizes,
    inv_sigma: float,
    entries: bool,
) -> Iterator[tuple[int, Placed, SlabPairs]]:
    """The pairs of each slab in turn, before them where slabs were placed, and the slab's number there.

    The pairs, with their `entry` only if asked for, are there until the next ones.
    """
    pairs, nc = new_pairs(slabs, entries), slabs.key_start.shape[1]
    count_tiles = slabs.count_tiles if slabs.placed is None else 0
    counts = torch.empty(count_tiles, nc, dtype=torch.int32, device=slabs.slot.device)
    for slab in range(0, slabs.num_slabs, slabs.at_once):
        num_slabs, before, placed = min(slabs.at_once, slabs.num_slabs - slab), 0, slabs.placed
        if placed is None:
            # a tensor of its own: kernels are compiled for how addresses are aligned
            before, first_tile = slab, slabs.first_tile[slab : slab + num_slabs + 1].clone()
            _launch_count(slabs.taken, counts, None, first_tile, slabs.first_chunk, nc, lists, chunks, sizes)
            placed = _place(slabs, counts, first_tile, sizes)
        _fill_kernel[(slabs.by_pair.parts * FILL_PROGRAMS_PER_PART,)](
            placed.tile_place, placed.row_place, placed.first_tile, slabs.slab_of_tile, slabs.slot, before, slab - before,
            num_slabs, slabs.room, *pairs, slabs.first_chunk, *lists, mean_log, chunks[0], chunks[1], inv_sigma, nc,
            sizes.tiles_per_head, HKV=sizes.num_kv_heads, maxnreg=FILL_REGISTERS, **_block_constants(sizes),
        )  # fmt: skip
        for here in range(num_slabs):
            entry = None if pairs.entry is None else pairs.entry[here]
            yield (
                slab - before + here,
                placed,
                SlabPairs(pairs.token_shift[here], pairs.slot[here], entry),
            )
