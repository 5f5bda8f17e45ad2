"""Selected pairs in slabs of whole tokens: gathered by chunk, while what they give is kept by token.

A slab holds all pairs of consecutive query tiles of one key/value head, own chunks left out. In it every pair has two
places: one by chunk, in which tokens that selected the same chunk lie side by side and are multiplied together, and one by
token, its slot, in which a token's chunks lie side by side in the order of its list and are summed in that order.
Where slabs begin is found on the device, so that the host never waits; those beyond the last are empty.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.configs import ByPair
from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.tiles import tile_place

# Bytes of the partial results of a slab.
WORKSPACE_BYTES = 2**31
# Of the places of pairs: those of so many slabs are written at once, and of one slab anyway.
PLACES_BYTES = 2**28
# Of the table of counts, 4 bytes each: runs are so short that there are nearly so many, and never more than the latter.
USUAL_COUNTS, MAX_COUNTS = 2**25, 2**26
# Elements of a block of list entries times tokens of a tile, that a program of so many warps takes at a time.
BLOCK_ELEMENTS, BLOCK_WARPS = 2048, 8
# Registers of a thread that writes places, with which two programs fit a multiprocessor, and such programs for each part.
FILL_REGISTERS = 128
FILL_PROGRAMS_PER_PART = 4
# Rows and columns of a block of the table of counts.
PLACE_RUNS, PLACE_CHUNKS = 64, 32
# Elements of the partial results that a program, one warp, adds up at a time, and such programs for each part: twice as many as
# run at a time, since a launch that finds no work takes as long as its programs take to start.
SUM_ELEMENTS = 2048
SUM_PROGRAMS_PER_PART = 8


class PairSlabs(NamedTuple):
    """Where the pairs of each slab go; S slabs, of which the last may be empty, nc chunks, R runs of tiles of all heads."""

    by_pair: ByPair
    room: int
    """At least the pairs of a slab, a multiple of 16."""
    run: int
    """Tiles of a run."""
    taken: Tensor
    """bool []: whether pairs are the cheaper way. If not, all slabs are empty."""
    slab_of_run: Tensor
    """int64 [R], ascending."""
    first_run: Tensor
    """int64 [S + 1]: the first run of each slab."""
    run_place: Tensor
    """int32 [R, nc]: how many tokens of earlier runs of its slab selected each chunk. Filling counts on in runs of several tiles."""
    row_place: Tensor
    """int64 [S, nc + 1]: where the pairs of each chunk begin in the slab."""
    row_work: Tensor
    """int64 [S, nc + 1]: where its work begins, in steps."""
    part_bound: Tensor
    """int64 [S, parts + 1]: part p of a slab does the work from p up to p + 1."""
    part_row: Tensor
    """int64 [S, parts]: the chunk in which each part begins."""
    lane: Tensor
    """int64 [S + 1]: the first of a slab's tokens, counted through the rows of all tiles, [Hkv, tiles, T]."""
    slot: Tensor
    """int64 [Hkv * tiles * T + 1]: where the slots of each token begin, counted through all slabs."""

    @property
    def num_slabs(self) -> int:
        return len(self.part_row)

    @property
    def sum_programs(self) -> int:
        return self.by_pair.parts * SUM_PROGRAMS_PER_PART

    def rest(self, lists: Lists) -> Lists:
        """The lists that are left to tiles: as they are, or empty where pairs are taken."""
        return lists._replace(counts=lists.counts.masked_fill(self.taken, 0))


class SlabPairs(NamedTuple):
    """The pairs of one slab or, with one more dimension, of several, by chunk, in a workspace that is used again."""

    token_shift: Tensor
    """int64 [room]: a token, and 2 ** 32 times the bits of a float32: its centred log prior over sigma, which shifts scores."""
    slot: Tensor
    """int32 [room]: its place by token."""
    entry: Tensor | None
    """int64 [room]: its place in the lists' log priors."""


@triton.jit
def split_pair(b_pair):
    """Token, int64, and shift of the scores of packed pairs."""
    return b_pair & 0x7FFFFFFF, (b_pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_gathered(x, o_n, o_head, o_d, stride_n, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [ROWS, BLOCK_D] of x at tokens `o_n` and heads `o_head`, all of which exist; zero beyond D."""
    p_x = x + (o_n * stride_n + o_head * stride_h)[:, None] + o_d[None, :]
    return tl.load(p_x) if BLOCK_D == D else tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def part_of_slab(row_place, row_work, part_bound, part_row, lane, slab, num_chunks, lanes_per_head):
    """This program's part of a slab: its first step and the one behind its last, the chunk it begins in, the slab's head, and where
    the slab's places and steps by chunk stand."""
    i_p = slab * (tl.num_programs(0) + 1) + tl.program_id(0)
    here, stop = tl.load(part_bound + i_p), tl.load(part_bound + i_p + 1)
    i_c = tl.load(part_row + i_p - slab)
    i_h = tl.load(lane + slab) // lanes_per_head
    return here, stop, i_c, i_h, row_place + slab * (num_chunks + 1), row_work + slab * (num_chunks + 1)


@triton.jit
def chunk_of_slab(p_place, p_work, i_c):
    """Of a chunk's pairs in a slab: the first step and the one behind the last, the place of the first pair, the number of the last."""
    begin, end = tl.load(p_work + i_c), tl.load(p_work + i_c + 1)
    p_pair = tl.load(p_place + i_c)
    return begin, end, p_pair, (tl.load(p_place + i_c + 1) - p_pair).to(tl.int32) - 1


@triton.jit
def lane_place(i_lane, chunk_start, chunk_end, tiles_per_head, T: tl.constexpr, C: tl.constexpr):
    """Head and token of a row of all tiles, and whether it exists."""
    i_tile = i_lane // T
    _, start, end = tile_place(i_tile % tiles_per_head, chunk_start, chunk_end, C // T, T)
    i_n = start + i_lane % T
    return i_tile // tiles_per_head, i_n.to(tl.int64), i_n < end


@triton.jit
def _selected(i_e, count, offset, list_chunk, list_log_prior, m_token, T: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of a tile's entries: existence and chunk [BLOCK]; places of the log priors, these, and whether selected [BLOCK, T]."""
    o_e = i_e + tl.arange(0, BLOCK)
    m_e = o_e < count
    o_log = (offset + o_e)[:, None] * T + tl.arange(0, T)[None, :]
    b_log = tl.load(list_log_prior + o_log, mask=m_e[:, None] & m_token[None, :], other=float("-inf"))
    b_c = tl.load(list_chunk + offset + o_e, mask=m_e, other=0)
    return m_e, b_c, o_log, b_log, (b_log > float("-inf")).to(tl.int32)


@triton.jit
def _count_kernel(
    taken, counts, token_count, list_chunk, list_log_prior, list_offset, list_count, chunk_start, chunk_end,
    num_chunks, tiles_per_head, runs_per_head,
    T: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count how many tokens of a run selected each chunk, and how many chunks each token selected, unless pairs are not taken."""
    if tl.load(taken) == 0:
        return
    i_run = tl.program_id(0)
    i_h, i_first = i_run // runs_per_head, i_run % runs_per_head * RUN
    counts += i_run.to(tl.int64) * num_chunks
    for i_c in range(0, num_chunks, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        tl.store(counts + o_c, tl.zeros([BLOCK], tl.int32), mask=o_c < num_chunks)
    o_t = tl.arange(0, T)
    for i_tile in range(i_first, tl.minimum(i_first + RUN, tiles_per_head)):
        # other lanes may have written what this tile reads
        tl.debug_barrier()
        p_tile = i_h.to(tl.int64) * tiles_per_head + i_tile
        count, offset = tl.load(list_count + p_tile), tl.load(list_offset + p_tile)
        _, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
        b_count = tl.zeros([T], tl.int32)
        for i_e in range(0, count, BLOCK):
            m_e, b_c, _o_log, _b_log, b_selected = _selected(
                i_e, count, offset, list_chunk, list_log_prior, start + o_t < end, T, BLOCK
            )
            # a tile lists a chunk once, so that no two lanes meet
            b_before = tl.load(counts + b_c, mask=m_e, other=0)
            tl.store(counts + b_c, b_before + tl.sum(b_selected, 1), mask=m_e)
            b_count += tl.sum(b_selected, 0)
        tl.store(token_count + p_tile * T + o_t, b_count)


@triton.jit
def _place_kernel(counts, row_pairs, first_run, num_chunks, RUNS: tl.constexpr, CHUNKS: tl.constexpr):
    """Turn counts of a slab's runs into the number of a chunk's pairs before each run, and add up those of the slab."""
    i_slab, o_r = tl.program_id(0), tl.arange(0, RUNS)
    o_c = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    stop = tl.load(first_run + i_slab + 1)
    b_before = tl.zeros([CHUNKS], tl.int32)
    for i_run in range(tl.load(first_run + i_slab), stop, RUNS):
        m_count = (i_run + o_r < stop)[:, None] & (o_c < num_chunks)[None, :]
        p_count = counts + (i_run + o_r)[:, None] * num_chunks + o_c[None, :]
        b_count = tl.load(p_count, mask=m_count, other=0)
        tl.store(p_count, b_before[None, :] + tl.cumsum(b_count, 0) - b_count, mask=m_count)
        b_before += tl.sum(b_count, 0)
    tl.store(row_pairs + i_slab * num_chunks + o_c, b_before.to(tl.int64), mask=o_c < num_chunks)


@triton.jit(do_not_specialize=["slab", "num_slabs", "room"])
def _fill_kernel(
    run_place, row_place, first_run, slab_of_run, lane, slot, slab, num_slabs, room, pair_out, slot_out, entry_out,
    list_chunk, list_log_prior, list_offset, list_count, mean_log, chunk_start, chunk_end, inv_sigma,
    num_chunks, tiles_per_head, runs_per_head,
    HKV: tl.constexpr, T: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the pairs of `num_slabs` slabs, each into a room of its own."""
    o_t = tl.arange(0, T)
    first, stop = tl.load(first_run + slab), tl.load(first_run + slab + num_slabs)
    for i_run in range(first + tl.program_id(0), stop, tl.num_programs(0)):
        i_slab = tl.load(slab_of_run + i_run)
        begin, here = tl.load(slot + tl.load(lane + i_slab)), (i_slab - slab) * room
        i_h, i_first = i_run // runs_per_head, i_run % runs_per_head * RUN
        p_run, p_row = run_place + i_run * num_chunks, row_place + i_slab * (num_chunks + 1)
        for i_tile in range(i_first, tl.minimum(i_first + RUN, tiles_per_head)):
            p_tile = i_h * tiles_per_head + i_tile
            count, offset = tl.load(list_count + p_tile), tl.load(list_offset + p_tile)
            _, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
            o_n = start.to(tl.int64) + o_t
            b_slot = (tl.load(slot + p_tile * T + o_t) - begin).to(tl.int32)
            b_mean = tl.load(mean_log + o_n * HKV + i_h, mask=o_n < end, other=0.0)
            for i_e in range(0, count, BLOCK):
                m_e, b_c, o_log, b_log, b_selected = _selected(
                    i_e, count, offset, list_chunk, list_log_prior, o_n < end, T, BLOCK
                )
                b_before = tl.load(p_run + b_c, mask=m_e, other=0)
                b_place = here + tl.load(p_row + b_c, mask=m_e, other=0) + b_before
                o_out = b_place[:, None] + (tl.cumsum(b_selected, 1) - b_selected)
                b_shift = (b_log - b_mean[None, :]) * inv_sigma
                b_pair = (b_shift.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_n[None, :]
                tl.store(pair_out + o_out, b_pair, mask=b_selected > 0)
                b_rank = b_slot[None, :] + tl.cumsum(b_selected, 0) - b_selected
                tl.store(slot_out + o_out, b_rank, mask=b_selected > 0)
                if entry_out is not None:
                    tl.store(entry_out + o_out, o_log, mask=b_selected > 0)
                b_slot += tl.sum(b_selected, 0)
                if RUN > 1:
                    # a tile lists a chunk once, so that no two lanes meet
                    tl.store(p_run + b_c, b_before + tl.sum(b_selected, 1), mask=m_e)
            if RUN > 1:
                # the next tile may read what other lanes wrote
                tl.debug_barrier()


def _run_tiles(sizes: Sizes, room: int) -> int | None:
    """Tiles of a run, of which even the fullest is a small part of a slab; None if there would be too many runs."""
    run, most = 1, sizes.tile_tokens * sizes.num_chunks

    def counts() -> int:
        return triton.cdiv(sizes.tiles_per_head, run) * sizes.num_kv_heads * sizes.num_chunks

    while counts() > USUAL_COUNTS and 16 * run * most <= room:
        run *= 2
    return run if 2 * run * most <= room and counts() <= MAX_COUNTS else None


def _exclusive_sum(x: Tensor) -> Tensor:
    """Of the last dimension, with the sum of all at the end."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _run_constants(sizes: Sizes, run: int) -> dict[str, int]:
    """What kernels over runs know when they are compiled."""
    block = max(16, BLOCK_ELEMENTS // sizes.tile_tokens)
    return {"T": sizes.tile_tokens, "C": sizes.chunk_size, "RUN": run, "BLOCK": block}


def plan_slabs(
    lists: Lists,
    chunks: Tensor,
    sizes: Sizes,
    pair_bytes: int,
    by_pair: ByPair | None,
    num_pairs: Tensor | None,
) -> PairSlabs | None:
    """Decide whether pairs are taken, and cut them into slabs; None where they never are, or would be too many to count.

    Args:
        lists, chunks, sizes: of the queries; keys lie with them.
        pair_bytes: of what is kept for a pair.
        by_pair: how the stage goes over pairs.
        num_pairs: int64 [], how many pairs were selected; None: those of all log priors, each of which is in a list then.
    """
    if by_pair is None or by_pair.above == float("inf"):
        return None
    Hkv, nc, T, device = sizes.num_kv_heads, sizes.num_chunks, sizes.tile_tokens, lists.chunk.device
    room = WORKSPACE_BYTES // pair_bytes // 16 * 16
    run = _run_tiles(sizes, room)
    if run is None:
        return None
    if num_pairs is None:
        num_pairs = (lists.log_prior > float("-inf")).sum()
    taken = lists.counts.sum() * T > by_pair.above * num_pairs
    if by_pair.above <= 0:
        taken = torch.ones_like(taken)
    # not set where pairs are not taken, and then without effect
    runs = triton.cdiv(sizes.tiles_per_head, run)
    counts = torch.empty(Hkv * runs, nc, dtype=torch.int32, device=device)
    token_count = torch.empty(sizes.num_tiles * T, dtype=torch.int32, device=device)
    _count_kernel[(len(counts),)](
        taken.view(torch.uint8), counts, token_count, lists.chunk, lists.log_prior, lists.offset, lists.counts,
        chunks[0], chunks[1], nc, sizes.tiles_per_head, runs, **_run_constants(sizes, run), num_warps=BLOCK_WARPS,
    )  # fmt: skip
    slot = _exclusive_sum(token_count)

    # A slab ends with the first run that reaches its share, or with its head. Taken pairs are few beside those listed.
    share, most_taken = room - run * T * nc, int(lists.log_prior.numel() / max(1.0, by_pair.above))
    num_slabs = most_taken // share + Hkv
    tile = (
        torch.arange(runs, device=device) * run
        + torch.arange(Hkv, device=device)[:, None] * sizes.tiles_per_head
    )
    lane = torch.nn.functional.pad(tile.flatten() * T, (0, 1), value=sizes.num_tiles * T)
    before_Hr = slot[lane[:-1]].view(Hkv, runs)
    slab_Hr = (before_Hr - before_Hr[:, :1]) // share
    slab_of_run = slab_Hr + _exclusive_sum(slab_Hr[:, -1] + 1)[:-1, None]
    slab_of_run = slab_of_run.flatten().masked_fill(~taken, num_slabs)
    first_run = torch.searchsorted(slab_of_run, torch.arange(num_slabs + 1, device=device))

    row_pairs_Sc = torch.empty(num_slabs, nc, dtype=torch.int64, device=device)
    _place_kernel[(num_slabs, triton.cdiv(nc, PLACE_CHUNKS))](
        counts, row_pairs_Sc, first_run, nc, RUNS=PLACE_RUNS, CHUNKS=PLACE_CHUNKS, num_warps=4
    )
    step = by_pair.config.block // sizes.padded_group
    row_work = _exclusive_sum((row_pairs_Sc + step - 1) // step)
    parts_share = (row_work[:, -1:] + by_pair.parts - 1) // by_pair.parts
    part_bound = torch.minimum(torch.arange(by_pair.parts + 1, device=device) * parts_share, row_work[:, -1:])
    part_row = torch.searchsorted(row_work, part_bound[:, :-1].contiguous(), right=True) - 1
    room = triton.cdiv(max(1, min(room, most_taken)), 16) * 16
    return PairSlabs(
        by_pair, room, run, taken, slab_of_run, first_run, counts, _exclusive_sum(row_pairs_Sc), row_work, part_bound,
        part_row, lane[first_run], slot,
    )  # fmt: skip


def new_pairs(slabs: PairSlabs, entries: bool) -> SlabPairs:
    """The workspace for the pairs of as many slabs as are filled at once, with their `entry` only if asked for."""
    bytes_each = 20 if entries else 12
    at_once = max(1, min(slabs.num_slabs, PLACES_BYTES // (slabs.room * bytes_each)))
    token_shift = torch.empty(at_once, slabs.room, dtype=torch.int64, device=slabs.slot.device)
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
) -> Iterator[tuple[int, SlabPairs]]:
    """The number and the pairs of each slab in turn; the pairs, with their `entry` only if asked for, are there until the next."""
    pairs = new_pairs(slabs, entries)
    at_once = len(pairs.slot)
    for slab in range(slabs.num_slabs):
        if slab % at_once == 0:
            _fill_kernel[(slabs.by_pair.parts * FILL_PROGRAMS_PER_PART,)](
                slabs.run_place, slabs.row_place, slabs.first_run, slabs.slab_of_run, slabs.lane, slabs.slot, slab,
                min(at_once, slabs.num_slabs - slab), slabs.room, *pairs, *lists, mean_log, chunks[0], chunks[1],
                inv_sigma, sizes.num_chunks, sizes.tiles_per_head, len(slabs.slab_of_run) // sizes.num_kv_heads,
                HKV=sizes.num_kv_heads, **_run_constants(sizes, slabs.run), num_warps=BLOCK_WARPS,
                maxnreg=FILL_REGISTERS,
            )  # fmt: skip
        here, entry = slab % at_once, pairs.entry
        yield (
            slab,
            SlabPairs(pairs.token_shift[here], pairs.slot[here], None if entry is None else entry[here]),
        )
