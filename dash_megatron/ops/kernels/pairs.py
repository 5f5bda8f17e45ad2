"""Selected pairs by chunk: for every chunk the tokens that selected it and their log priors, its own tokens first.

They are made from the routing lists by a counting sort that gives the same order every time, and the host never waits:
tiles are cut into runs, one program counts (then places) what the tokens of a run selected, tile by tile, and the places
where runs begin are prefix sums. Pairs of many chunks pass through a workspace of bounded size, slab by slab.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.tiles import tile_place
from dash_megatron.ops.kernels.transpose import WorkPartition, rows_of_bounds, run_tiles

# Pairs of a slab, 8 bytes each.
MAX_PAIRS = 2**26
# Elements of a block of list entries times tokens of a tile.
BLOCK_ELEMENTS = 4096


class PairPlan(NamedTuple):
    """Where the pairs of each chunk go.

    Row r = head * chunks + chunk, with chunks counted from the first of a window, has the places offset[r] up to offset[r + 1].
    """

    partition: WorkPartition
    """Of steps: a row has as many as its pairs fill, the last one perhaps not wholly. The last parts may be empty."""
    offset: Tensor
    """int64 [rows + 1]."""
    base: Tensor
    """int64 [slabs + 1]: the place of each slab's first pair. A slab has the same number of parts as any other."""
    room: int
    """At least the pairs of a slab."""
    run_place: Tensor
    """int64 [Hkv, runs, chunks]: where the tokens of a run of tiles begin in a row."""
    window: tuple[int, int]
    """The first chunk of the window, and one past its last."""
    taken: Tensor | None
    """bool []: whether pairs are the cheaper way; if not, there are no places and no steps. None: they are taken anyway."""

    @property
    def slabs(self) -> int:
        return len(self.base) - 1


class Pairs(NamedTuple):
    """The pairs of one slab."""

    token_prior: Tensor
    """int32 [room, 2]: a token, and the bits of a float32, which is its log prior as in the lists. Own tokens have the mean of
    their log priors instead, so that centring leaves nothing."""
    d_prior: Tensor | None
    """float32 [room]: the gradient of the log prior, if it is asked for; not set for own tokens."""


@triton.jit
def _pack(token, log_prior):
    """Both in 64 bits."""
    return (log_prior.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token.to(tl.int64)


@triton.jit(do_not_specialize=["first", "slab"])
def _run_kernel(
    places, base, slab, room, pair_out, d_prior_out, list_chunk, list_log_prior, d_prior, list_offset, list_count,
    chunk_start, chunk_end, first, num_chunks, tiles_per_head, runs_per_head,
    T: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Count how many tokens of a run of tiles selected each chunk or, if FILL, write those of a slab to the places counted."""
    i_h, i_run = tl.program_id(0) // runs_per_head, tl.program_id(0) % runs_per_head
    places += tl.program_id(0).to(tl.int64) * num_chunks - first
    o_t = tl.arange(0, T)[None, :]
    begin = tl.load(base + slab) if FILL else 0
    tiles = tl.minimum(i_run * RUN + RUN, tiles_per_head)
    if FILL:
        # nothing in this slab
        tiles = tl.where(begin < tl.load(base + slab + 1), tiles, 0)
    for i_tile in range(i_run * RUN, tiles):
        p_tile = i_h.to(tl.int64) * tiles_per_head + i_tile
        count = tl.load(list_count + p_tile)
        if count > 0:
            offset = tl.load(list_offset + p_tile)
            _, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
            for i_e in range(0, count, BLOCK):
                o_e = i_e + tl.arange(0, BLOCK)
                m_e = o_e < count
                o_log = (offset + o_e)[:, None] * T + o_t
                m_log = m_e[:, None] & (start + o_t < end)
                b_log = tl.load(list_log_prior + o_log, mask=m_log, other=float("-inf"))
                b_selected = (b_log > float("-inf")).to(tl.int32)
                # a tile lists a chunk once, so that no two lanes meet
                b_c = tl.load(list_chunk + offset + o_e, mask=m_e, other=0)
                b_place = tl.load(places + b_c, mask=m_e, other=0)
                if FILL:
                    o_out = b_place[:, None] + (tl.cumsum(b_selected, 1) - b_selected) - begin
                    m_out = (b_selected > 0) & (o_out >= 0) & (o_out < room)
                    tl.store(pair_out + o_out, _pack(start + o_t, b_log), mask=m_out)
                    if d_prior is not None:
                        b_d = tl.load(d_prior + o_log, mask=m_out, other=0.0)
                        tl.store(d_prior_out + o_out, b_d, mask=m_out)
                tl.store(places + b_c, b_place + tl.sum(b_selected, 1), mask=m_e)
            # the next tile may read what other lanes wrote
            tl.debug_barrier()


@triton.jit(do_not_specialize=["slab"])
def _own_kernel(
    base, slab, room, pair_out, mean_log, row_offset, query_start, query_end, stride_table, num_chunks,
    HKV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Begin the rows of a slab with the tokens of the chunk itself."""
    i_row = tl.program_id(0)
    i_h, i_c = i_row // num_chunks, i_row % num_chunks
    p_table = i_h * stride_table + i_c
    o_n = tl.load(query_start + p_table) + tl.arange(0, C)
    begin, offset = tl.load(base + slab), tl.load(row_offset + i_row)
    # rows have no places where pairs are not taken
    room = tl.minimum(room, tl.load(row_offset + i_row + 1) - begin)
    o_out = offset + tl.arange(0, C) - begin
    m_out = (o_n < tl.load(query_end + p_table)) & (o_out >= 0) & (o_out < room)
    b_mean = tl.load(mean_log + o_n.to(tl.int64) * HKV + i_h, mask=m_out, other=0.0)
    tl.store(pair_out + o_out, _pack(o_n, b_mean), mask=m_out)


def _launch_runs(
    places: Tensor, lists: Lists, chunks: Tensor, sizes: Sizes, window: tuple[int, int], base: Tensor | None = None,
    slab: int = 0, room: int = 0, pairs: Tensor | None = None, d_prior: Tensor | None = None, d_prior_out: Tensor | None = None,
) -> None:  # fmt: skip
    nc = window[1] - window[0]
    run = run_tiles(sizes, nc)
    _run_kernel[(triton.cdiv(sizes.tiles_per_head, run) * sizes.num_kv_heads,)](
        places, base, slab, room, pairs, d_prior_out, lists.chunk, lists.log_prior, d_prior, lists.offset,
        lists.counts, chunks[0], chunks[1], window[0], nc, sizes.tiles_per_head, triton.cdiv(sizes.tiles_per_head, run),
        T=sizes.tile_tokens, C=sizes.chunk_size, RUN=run, BLOCK=max(16, BLOCK_ELEMENTS // sizes.tile_tokens),
        FILL=pairs is not None, num_warps=4,
    )  # fmt: skip


def plan_pairs(
    lists: Lists, chunks: Tensor, queries: Tensor, sizes: Sizes, window: tuple[int, int], parts: int, step: int,
    above: float,
) -> PairPlan:  # fmt: skip
    """Count the selected pairs, and cut them into slabs and parts.

    Args:
        lists, chunks, sizes: of the queries.
        queries: int32 [2, Hkv, window], first and one past the last row of the queries of each chunk of the window.
        window: first chunk, and one past the last, of those among which all chunks of the lists lie.
        parts: programs that share the work of a slab evenly, wherever that cuts a row.
        step: pairs that a program takes at a time.
        above: pairs are taken where tiles list more than this many times those that were selected; 0: anyway.

    Returns:
        The plan, whose tensors are on the device of the lists.
    """
    Hkv, nc = sizes.num_kv_heads, window[1] - window[0]
    runs = triton.cdiv(sizes.tiles_per_head, run_tiles(sizes, nc))
    counts = torch.zeros(Hkv, runs, nc, dtype=torch.int64, device=lists.chunk.device)
    _launch_runs(counts, lists, chunks, sizes, window)
    own_Hc, taken = (queries[1] - queries[0]).long(), None
    pairs_Hc = counts.sum(1) + own_Hc
    if above > 0:
        taken = lists.counts.sum() * sizes.tile_tokens > above * counts.sum()
        pairs_Hc = pairs_Hc * taken
    offset = torch.cat([counts.new_zeros(1), pairs_Hc.flatten().cumsum(0)])
    run_place = counts.cumsum(1) - counts + (offset[:-1].view(Hkv, nc) + own_Hc)[:, None]

    steps = (offset.diff() + step - 1) // step
    work = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    # each row may leave one step short
    most_pairs = lists.log_prior.numel() + Hkv * sizes.num_tokens
    most_steps = most_pairs // step + Hkv * nc
    most_share = max(1, min(triton.cdiv(most_steps, parts), MAX_PAIRS // (parts * step)))
    slabs = triton.cdiv(most_steps, most_share * parts)
    # all in the first slab if it fits
    share = ((work[-1] + parts - 1) // parts).clamp(1, most_share)
    bound = torch.minimum(torch.arange(slabs * parts + 1, device=work.device) * share, work[-1])
    row = rows_of_bounds(work, bound)
    place = torch.minimum(offset[row] + (bound - work[row]) * step, offset[-1])
    room = min(most_pairs, most_share * parts * step)
    partition = WorkPartition(work, bound, row[:-1])
    return PairPlan(partition, offset, place[::parts].contiguous(), room, run_place, window, taken)


def fill_pairs(
    plan: PairPlan, slab: int, lists: Lists, mean_log: Tensor, chunks: Tensor, queries: Tensor, sizes: Sizes,
    d_prior: Tensor | None = None,
) -> Pairs:  # fmt: skip
    """Write the pairs of a slab, with `d_prior` [room, T] of the lists also those of the gradient of the log priors."""
    device, nc = lists.chunk.device, plan.window[1] - plan.window[0]
    pairs = torch.empty(plan.room, dtype=torch.int64, device=device)
    d_prior_out = None if d_prior is None else torch.empty(plan.room, dtype=torch.float32, device=device)
    # counted on from where a run begins
    places = plan.run_place.clone()
    _launch_runs(
        places, lists, chunks, sizes, plan.window, plan.base, slab, plan.room, pairs, d_prior, d_prior_out
    )
    _own_kernel[(sizes.num_kv_heads * nc,)](
        plan.base, slab, plan.room, pairs, mean_log, plan.offset, *queries, queries.stride(1), nc,
        HKV=sizes.num_kv_heads, C=sizes.chunk_size, num_warps=1,
    )  # fmt: skip
    return Pairs(pairs.view(torch.int32).view(-1, 2), d_prior_out)
