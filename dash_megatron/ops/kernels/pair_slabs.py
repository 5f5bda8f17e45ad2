"""Selected pairs in slabs of whole tokens: gathered by chunk, while what they give is kept by token.

A slab holds all pairs of consecutive query tiles of one key/value head, own chunks left out. In it every pair has two
places: one by chunk, in which tokens that selected the same chunk lie side by side and are multiplied together, and one by
token, its slot, in which a token's chunks lie side by side in the order of its list and are summed in that order.
Where slabs begin is found on the device, so that the host never waits; those beyond the last are empty.
"""

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
# Of the table of counts, 8 bytes each: runs are so short that there are nearly so many, and never more than the latter.
USUAL_COUNTS, MAX_COUNTS = 2**23, 2**25
# Elements of a block of list entries times tokens of a tile.
BLOCK_ELEMENTS = 1024
# Elements of the partial results that a program, one warp, adds up at a time, and such programs for each part.
SUM_ELEMENTS = 2048
SUM_PROGRAMS_PER_PART = 16


class PairSlabs(NamedTuple):
    """Where the pairs of each slab go; S slabs, of which the last may be empty, nc chunks, R runs of tiles of all heads."""

    by_pair: ByPair
    room: int
    """At least the pairs of a slab."""
    run: int
    """Tiles of a run."""
    taken: Tensor
    """bool []: whether pairs are the cheaper way. If not, all slabs are empty."""
    slab_of_run: Tensor
    """int64 [R], ascending."""
    run_place: Tensor
    """int64 [R, nc]: where the tokens of a run begin, in its slab by chunk."""
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
    """The pairs of one slab, by chunk, in a workspace that every slab uses again."""

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
def lane_place(i_lane, chunk_start, chunk_end, tiles_per_head, T: tl.constexpr, C: tl.constexpr):
    """Head and token of a row of all tiles, and whether it exists."""
    i_tile = i_lane // T
    _, start, end = tile_place(i_tile % tiles_per_head, chunk_start, chunk_end, C // T, T)
    i_n = start + i_lane % T
    return i_tile // tiles_per_head, i_n.to(tl.int64), i_n < end


@triton.jit(do_not_specialize=["slab"])
def _slab_kernel(
    places, token_count, slot, slab_of_run, lane, slab, pair_out, slot_out, entry_out,
    list_chunk, list_log_prior, list_offset, list_count, mean_log, chunk_start, chunk_end, inv_sigma,
    num_chunks, tiles_per_head, runs_per_head,
    HKV: tl.constexpr, T: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Count how many tokens of a run selected each chunk and how many chunks each token selected; if FILL, write a slab's pairs."""
    i_run = tl.program_id(0)
    i_h, i_first = i_run // runs_per_head, i_run % runs_per_head * RUN
    begin = tl.zeros([], tl.int64)
    if FILL:
        if tl.load(slab_of_run + i_run) != slab:
            return
        begin = tl.load(slot + tl.load(lane + slab))
    places += i_run.to(tl.int64) * num_chunks
    o_t = tl.arange(0, T)
    for i_tile in range(i_first, tl.minimum(i_first + RUN, tiles_per_head)):
        p_tile = i_h.to(tl.int64) * tiles_per_head + i_tile
        count, offset = tl.load(list_count + p_tile), tl.load(list_offset + p_tile)
        _, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
        b_slot = tl.zeros([T], tl.int32)
        if FILL:
            b_slot = (tl.load(slot + p_tile * T + o_t) - begin).to(tl.int32)
            o_n = start.to(tl.int64) + o_t
            b_mean = tl.load(mean_log + o_n * HKV + i_h, mask=o_n < end, other=0.0)
        for i_e in range(0, count, BLOCK):
            o_e = i_e + tl.arange(0, BLOCK)
            m_e = o_e < count
            o_log = (offset + o_e)[:, None] * T + o_t[None, :]
            m_log = m_e[:, None] & (start + o_t < end)[None, :]
            b_log = tl.load(list_log_prior + o_log, mask=m_log, other=float("-inf"))
            b_selected = (b_log > float("-inf")).to(tl.int32)
            # a tile lists a chunk once, so that no two lanes meet
            b_c = tl.load(list_chunk + offset + o_e, mask=m_e, other=0)
            b_place = tl.load(places + b_c, mask=m_e, other=0)
            if FILL:
                o_out = b_place[:, None] + (tl.cumsum(b_selected, 1) - b_selected)
                b_shift = (b_log - b_mean[None, :]) * inv_sigma
                b_pair = (b_shift.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_n[None, :]
                tl.store(pair_out + o_out, b_pair, mask=b_selected > 0)
                b_rank = b_slot[None, :] + tl.cumsum(b_selected, 0) - b_selected
                tl.store(slot_out + o_out, b_rank, mask=b_selected > 0)
                if entry_out is not None:
                    tl.store(entry_out + o_out, o_log, mask=b_selected > 0)
            b_slot += tl.sum(b_selected, 0)
            tl.store(places + b_c, b_place + tl.sum(b_selected, 1), mask=m_e)
        if not FILL:
            tl.store(token_count + p_tile * T + o_t, b_slot)
        # the next tile may read what other lanes wrote
        tl.debug_barrier()


def _launch(
    places: Tensor, lists: Lists, chunks: Tensor, sizes: Sizes, run: int, *outputs: Tensor | int | None,
    mean_log: Tensor | None = None, inv_sigma: float = 1.0,
) -> None:  # fmt: skip
    """Launch `_slab_kernel` with its outputs and slab from `token_count` to `entry_out`; with `mean_log` it fills the slab."""
    _slab_kernel[(len(places),)](
        places, *outputs, lists.chunk, lists.log_prior, lists.offset, lists.counts, mean_log,
        chunks[0], chunks[1], inv_sigma, sizes.num_chunks, sizes.tiles_per_head, len(places) // sizes.num_kv_heads,
        HKV=sizes.num_kv_heads, T=sizes.tile_tokens, C=sizes.chunk_size, RUN=run,
        BLOCK=max(16, BLOCK_ELEMENTS // sizes.tile_tokens), FILL=mean_log is not None, num_warps=4,
    )  # fmt: skip


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


def plan_slabs(
    lists: Lists, chunks: Tensor, sizes: Sizes, pair_bytes: int, by_pair: ByPair | None
) -> PairSlabs | None:
    """Count the pairs of the lists and cut them into slabs; None where pairs are never taken, or would be too many to count.

    Args:
        lists, chunks, sizes: of the queries; keys lie with them.
        pair_bytes: of what is kept for a pair.
        by_pair: how the stage goes over pairs.
    """
    if by_pair is None or by_pair.above == float("inf"):
        return None
    Hkv, nc, T = sizes.num_kv_heads, sizes.num_chunks, sizes.tile_tokens
    most_pairs = lists.log_prior.numel()
    room = WORKSPACE_BYTES // pair_bytes
    run = _run_tiles(sizes, room)
    if run is None:
        return None
    runs = triton.cdiv(sizes.tiles_per_head, run)
    counts = torch.zeros(Hkv * runs, nc, dtype=torch.int64, device=lists.chunk.device)
    token_count = torch.empty(sizes.num_tiles * T, dtype=torch.int32, device=counts.device)
    _launch(counts, lists, chunks, sizes, run, token_count, None, None, None, 0, None, None, None)
    slot = _exclusive_sum(token_count.long())
    taken = lists.counts.sum() * T > by_pair.above * slot[-1]
    if by_pair.above <= 0:
        taken = torch.ones_like(taken)

    # A slab ends with the first run that reaches its share, or with its head. Taken pairs are few beside those listed.
    share, most_taken = room - run * T * nc, int(most_pairs / max(1.0, by_pair.above))
    num_slabs = most_taken // share + Hkv
    pairs_Hr = counts.sum(1).view(Hkv, runs)
    slab_Hr = (pairs_Hr.cumsum(1) - pairs_Hr) // share
    slab_of_run = (
        (slab_Hr + _exclusive_sum(slab_Hr[:, -1] + 1)[:-1, None]).flatten().masked_fill(~taken, num_slabs)
    )
    first_run = torch.searchsorted(slab_of_run, torch.arange(num_slabs + 1, device=counts.device))
    tile = (torch.arange(runs, device=counts.device) * run).clamp_max(sizes.tiles_per_head)
    tile = (torch.arange(Hkv, device=counts.device)[:, None] * sizes.tiles_per_head + tile).flatten()
    lane = torch.cat([tile, tile.new_full((1,), sizes.num_tiles)])[first_run] * T

    before_Rc = _exclusive_sum(counts.t()).t()
    slab_before_Sc = before_Rc[first_run]
    row_pairs_Sc = slab_before_Sc.diff(dim=0)
    row_place = _exclusive_sum(row_pairs_Sc)
    of_run = slab_of_run.clamp_max(num_slabs - 1)
    run_place = before_Rc[:-1] - slab_before_Sc[of_run] + row_place[of_run, :-1]

    step = by_pair.config.block // sizes.padded_group
    row_work = _exclusive_sum((row_pairs_Sc + step - 1) // step)
    parts_share = (row_work[:, -1:] + by_pair.parts - 1) // by_pair.parts
    part_bound = torch.minimum(
        torch.arange(by_pair.parts + 1, device=counts.device) * parts_share, row_work[:, -1:]
    )
    part_row = torch.searchsorted(row_work, part_bound[:, :-1].contiguous(), right=True) - 1
    return PairSlabs(
        by_pair, max(1, min(room, most_taken)), run, taken, slab_of_run, run_place.contiguous(), row_place, row_work,
        part_bound, part_row, lane, slot,
    )  # fmt: skip


def new_pairs(slabs: PairSlabs, entries: bool) -> SlabPairs:
    """The workspace for one slab's pairs, with their `entry` only if asked for."""
    room, device = slabs.room, slabs.slot.device
    token_shift = torch.empty(room, dtype=torch.int64, device=device)
    entry = torch.empty(room, dtype=torch.int64, device=device) if entries else None
    return SlabPairs(token_shift, torch.empty(room, dtype=torch.int32, device=device), entry)


def fill_slab(
    slabs: PairSlabs, slab: int, lists: Lists, mean_log: Tensor, chunks: Tensor, sizes: Sizes, inv_sigma: float,
    pairs: SlabPairs,
) -> None:  # fmt: skip
    """Write the pairs of a slab. Once for each slab: places are counted on."""
    _launch(
        slabs.run_place, lists, chunks, sizes, slabs.run, None, slabs.slot, slabs.slab_of_run, slabs.lane, slab, *pairs,
        mean_log=mean_log, inv_sigma=inv_sigma,
    )  # fmt: skip
