"""Selected pairs by chunk, or by group of neighbouring chunks: the tokens that selected any of them and their log priors.

They are made from the routing lists by a counting sort that gives the same order every time, and the host never waits:
tiles are cut into runs, one program counts (then places) what the tokens of a run selected, tile by tile, and the places
where runs begin are prefix sums. Entries of many groups pass through a workspace of bounded size, slab by slab.

Chunks shorter than the 64 rows of a product of the tensor cores are taken side by side: `width` of them are a group, the
first `width` of a window, then the next ones, whatever documents they are of. An entry is a token with a log prior for every
chunk of the group, -inf where the token did not select it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import Lists, Sizes
from dash_megatron.ops.kernels.tiles import tile_place
from dash_megatron.ops.kernels.transpose import WorkPartition, rows_of_bounds, run_tiles

# Log priors of a slab, 8 bytes each with their token.
MAX_PAIRS = 2**26
# Steps of a part: the sums that it leaves to be added up cost about as much as four.
LEAST_STEPS = 16
# Log priors of a block: entries of a list, times chunks of a group, times tokens of a tile. Tiles of a run, which one program goes
# through in turn. On an H200 with choices of trained routers (heads of 64, chunks of 32) the whole pass to keys and values takes 6 to
# 13% less time than with 4096 and 32, with runs of 4 as much, of 2 more.
BLOCK_ELEMENTS, MIN_RUN_TILES = 1024, 8


class PairPlan(NamedTuple):
    """Where the entries of each group of chunks go.

    Row r = head * groups + group, with groups counted from the first chunk of a window, has the places offset[r] up to
    offset[r + 1]. Those of the tokens of its own chunks come first, `chunk_size` places for each, unless none of them has any.
    """

    partition: WorkPartition
    """How the work is shared out, in steps: a row has as many as hold its entries, the last one perhaps not full. The last parts may
    be empty."""
    offset: Tensor
    """int64 [rows + 1]."""
    base: Tensor
    """int64 [slabs + 1]: the place of each slab's first entry."""
    slab_part: Tensor
    """int64 [slabs + 1]: the first part of each slab."""
    room: int
    """At least the entries of a slab."""
    run_place: Tensor
    """int64 [Hkv, runs, groups]: where the tokens of a run of tiles begin in a row."""
    window: tuple[int, int]
    """The first chunk of the window, and one past its last."""
    width: int
    """Chunks of a group, of which the last may have fewer."""
    taken: Tensor | None
    """bool []: whether pairs are the cheaper way; if not, there are no places and no steps. None: they are taken anyway."""

    @property
    def slabs(self) -> int:
        """How many slabs the entries are cut into."""
        return len(self.base) - 1


class Pairs(NamedTuple):
    """The entries of one slab."""

    token_prior: Tensor
    """int32 [room, width, 2]: for every chunk of the group the token, and the bits of a float32, which is its log prior as in
    the lists, -inf where it did not select the chunk. Own tokens have the mean of their log priors for their own chunk and -inf for
    others of the group, which they may select in another entry; places of own tokens that do not exist have -inf and token 0."""
    d_prior: Tensor | None
    """float32 [room, width]: the gradient of the log prior, if it is asked for; only set where a token selected the chunk."""


@triton.jit
def _pack(token, log_prior):
    """Both in 64 bits."""
    return (log_prior.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token.to(tl.int64)


@triton.jit
def _load_log_priors(list_chunk, list_log_prior, o_list, stop, chunk, m_list, o_t, m_t, T: tl.constexpr):
    """Log priors [BLOCK, T] of the list entries at `o_list` where they are of `chunk`, else -inf; where they lie; the next entries."""
    m_chunk = tl.load(list_chunk + o_list, mask=m_list & (o_list < stop), other=-1) == chunk
    o_log = o_list[:, None] * T + o_t
    b_log = tl.load(list_log_prior + o_log, mask=m_chunk[:, None] & m_t, other=float("-inf"))
    return b_log, o_log, o_list + m_chunk.to(tl.int64)


@triton.jit(do_not_specialize=["first", "slab"])
def _run_kernel(
    places, selected, base, slab, room, pair_out, d_prior_out, list_chunk, list_log_prior, d_prior, list_offset, list_count,
    chunk_start, chunk_end, first, num_groups, tiles_per_head, runs_per_head,
    T: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Count how many tokens of a run of tiles selected each group, and pairs, or, if FILL, write those of a slab to the places counted."""
    i_h, i_run = tl.program_id(0) // runs_per_head, tl.program_id(0) % runs_per_head
    places += tl.program_id(0).to(tl.int64) * num_groups
    o_t = tl.arange(0, T)[None, :]
    begin = tl.load(base + slab) if FILL else 0
    tiles = tl.minimum(i_run * RUN + RUN, tiles_per_head)
    if FILL:
        # nothing in this slab
        tiles = tl.where(begin < tl.load(base + slab + 1), tiles, 0)
    num_selected = tl.zeros([], tl.int64)
    for i_tile in range(i_run * RUN, tiles):
        p_tile = i_h.to(tl.int64) * tiles_per_head + i_tile
        count = tl.load(list_count + p_tile)
        if count > 0:
            offset = tl.load(list_offset + p_tile)
            _, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
            m_t, stop = start + o_t < end, offset + count
            for i_e in range(0, count, BLOCK):
                o_e = i_e + tl.arange(0, BLOCK)
                m_e = o_e < count
                p_chunk = list_chunk + offset + o_e
                b_g = (tl.load(p_chunk, mask=m_e, other=first) - first) // WIDTH
                # A lane takes all that the tile lists of a group if the group begins there, so that no two lanes meet.
                before = tl.load(p_chunk - 1, mask=m_e & (o_e > 0), other=first - WIDTH)
                m_g = m_e & ((before - first) // WIDTH != b_g)
                b_selected = tl.zeros([BLOCK, T], tl.int32)
                o_list = offset + o_e
                for i in tl.static_range(WIDTH):
                    b_log, o_log, o_list = _load_log_priors(
                        list_chunk, list_log_prior, o_list, stop, first + b_g * WIDTH + i, m_g, o_t, m_t, T
                    )  # fmt: skip
                    b_chunk_selected = (b_log > float("-inf")).to(tl.int32)
                    b_selected |= b_chunk_selected
                    if not FILL:
                        num_selected += tl.sum(b_chunk_selected)
                b_place = tl.load(places + b_g, mask=m_g, other=0)
                if FILL:
                    o_out = b_place[:, None] + (tl.cumsum(b_selected, 1) - b_selected) - begin
                    m_out = (b_selected > 0) & (o_out >= 0) & (o_out < room)
                    o_list = offset + o_e
                    for i in tl.static_range(WIDTH):
                        b_log, o_log, o_list = _load_log_priors(
                            list_chunk, list_log_prior, o_list, stop, first + b_g * WIDTH + i, m_g, o_t, m_t, T
                        )  # fmt: skip
                        tl.store(pair_out + o_out * WIDTH + i, _pack(start + o_t, b_log), mask=m_out)
                        if d_prior is not None:
                            m_d = m_out & (b_log > float("-inf"))
                            b_d = tl.load(d_prior + o_log, mask=m_d, other=0.0)
                            tl.store(d_prior_out + o_out * WIDTH + i, b_d, mask=m_d)
                tl.store(places + b_g, b_place + tl.sum(b_selected, 1), mask=m_g)
            # the next tile may read what other lanes wrote
            tl.debug_barrier()
    if not FILL:
        tl.store(selected + tl.program_id(0), num_selected)


@triton.jit(do_not_specialize=["slab"])
def _own_kernel(
    base, slab, room, pair_out, mean_log, row_offset, query_start, query_end, stride_table, num_chunks, num_groups,
    HKV: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Begin the rows of a slab with the tokens of the group's own chunks."""
    i_row = tl.program_id(0)
    i_h, i_g = i_row // num_groups, i_row % num_groups
    o_s = tl.arange(0, WIDTH * C)
    i_c = i_g * WIDTH + o_s // C
    p_table = i_h * stride_table + i_c
    o_n = tl.load(query_start + p_table, mask=i_c < num_chunks, other=0) + o_s % C
    m_n = o_n < tl.load(query_end + p_table, mask=i_c < num_chunks, other=0)
    begin, offset = tl.load(base + slab), tl.load(row_offset + i_row)
    # rows have no places where pairs are not taken
    room = tl.minimum(room, tl.load(row_offset + i_row + 1) - begin)
    o_out = offset + o_s - begin
    m_out = (tl.max(m_n.to(tl.int32)) > 0) & (o_out >= 0) & (o_out < room)
    b_mean = tl.load(mean_log + o_n.to(tl.int64) * HKV + i_h, mask=m_n & m_out, other=float("-inf"))
    o_n = tl.where(m_n, o_n, 0)
    for i in tl.static_range(WIDTH):
        b_log = tl.where(o_s // C == i, b_mean, float("-inf"))
        tl.store(pair_out + o_out * WIDTH + i, _pack(o_n, b_log), mask=m_out)


def _launch_runs(
    places: Tensor, lists: Lists, chunks: Tensor, sizes: Sizes, first: int, width: int, selected: Tensor | None = None,
    base: Tensor | None = None, slab: int = 0, room: int = 0, pairs: Tensor | None = None, d_prior: Tensor | None = None,
    d_prior_out: Tensor | None = None,
) -> None:  # fmt: skip
    Hkv, runs, groups = places.shape
    _run_kernel[(Hkv * runs,)](
        places, selected, base, slab, room, pairs, d_prior_out, lists.chunk, lists.log_prior, d_prior, lists.offset,
        lists.counts, chunks[0], chunks[1], first, groups, sizes.tiles_per_head, runs,
        T=sizes.tile_tokens, C=sizes.chunk_size, WIDTH=width, RUN=run_tiles(sizes, groups, MIN_RUN_TILES),
        BLOCK=max(16, BLOCK_ELEMENTS // (width * sizes.tile_tokens)), FILL=pairs is not None, num_warps=4,
    )  # fmt: skip


def plan_pairs(
    lists: Lists, chunks: Tensor, queries: Tensor, sizes: Sizes, window: tuple[int, int], width: int, parts: int, step: int,
    above: float,
) -> PairPlan:  # fmt: skip
    """Count the tokens that selected each group of chunks, and cut them into slabs and parts.

    Args:
        lists, chunks, sizes: of the queries.
        queries: int32 [2, Hkv, window], first and one past the last row of the queries of each chunk of the window.
        window: first chunk, and one past the last, of those among which all chunks of the lists lie.
        width: neighbouring chunks of a group.
        parts: programs that share the work of all slabs evenly, wherever that cuts a row; fewer where each would have few steps.
        step: entries that a program takes at a time.
        above: pairs are taken where tiles list more than this many times those that were selected; 0: anyway.

    Returns:
        The plan, whose tensors are on the device of the lists.
    """
    Hkv, nc = sizes.num_kv_heads, window[1] - window[0]
    groups, own = triton.cdiv(nc, width), width * sizes.chunk_size
    runs = triton.cdiv(sizes.tiles_per_head, run_tiles(sizes, groups, MIN_RUN_TILES))
    counts = torch.zeros(Hkv, runs, groups, dtype=torch.int64, device=lists.chunk.device)
    selected = torch.empty(Hkv * runs, dtype=torch.int64, device=counts.device)
    _launch_runs(counts, lists, chunks, sizes, window[0], width, selected)
    has_own_Hc = torch.nn.functional.pad(queries[1] > queries[0], (0, groups * width - nc))
    own_Hg, taken = has_own_Hc.view(Hkv, groups, width).any(-1) * own, None
    entries_Hg = counts.sum(1) + own_Hg
    if above > 0:
        taken = lists.counts.sum() * sizes.tile_tokens > above * selected.sum()
        entries_Hg = entries_Hg * taken
    offset = torch.cat([counts.new_zeros(1), entries_Hg.flatten().cumsum(0)])
    run_place = counts.cumsum(1) - counts + (offset[:-1].view(Hkv, groups) + own_Hg)[:, None]

    steps = (offset.diff() + step - 1) // step
    work = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    # each row may leave one step short
    most_entries = lists.log_prior.numel() + Hkv * groups * own
    most_steps = most_entries // step + Hkv * groups
    slab_steps = max(1, MAX_PAIRS // (width * step))
    least = min(LEAST_STEPS, slab_steps)
    parts = max(1, min(parts, most_steps // least), triton.cdiv(most_steps, slab_steps))
    most_share = max(triton.cdiv(most_steps, parts), least)
    share = ((work[-1] + parts - 1) // parts).clamp(least)
    # the less work there is, the more parts has a slab, so that all are in the first if it fits
    slabs = triton.cdiv(parts, slab_steps // most_share)
    slab_part = (torch.arange(slabs + 1, device=work.device) * (slab_steps // share)).clamp(max=parts)
    bound = torch.minimum(torch.arange(parts + 1, device=work.device) * share, work[-1])
    row = rows_of_bounds(work, bound)
    place = torch.minimum(offset[row] + (bound - work[row]) * step, offset[-1])
    room = min(most_entries, slab_steps * step)
    partition = WorkPartition(work, bound, row[:-1])
    return PairPlan(partition, offset, place[slab_part], slab_part, room, run_place, window, width, taken)


def fill_pairs(
    plan: PairPlan, slab: int, lists: Lists, mean_log: Tensor, chunks: Tensor, queries: Tensor, sizes: Sizes,
    d_prior: Tensor | None = None,
) -> Pairs:  # fmt: skip
    """Write the entries of a slab, with `d_prior` [room, T] of the lists also those of the gradient of the log priors."""
    device, (first, last), width = lists.chunk.device, plan.window, plan.width
    pairs = torch.empty(plan.room, width, dtype=torch.int64, device=device)
    d_prior_out = None
    if d_prior is not None:
        d_prior_out = torch.empty(plan.room, width, dtype=torch.float32, device=device)
    # counted on from where a run begins
    places = plan.run_place.clone()
    _launch_runs(
        places, lists, chunks, sizes, first, width, None, plan.base, slab, plan.room, pairs, d_prior, d_prior_out
    )  # fmt: skip
    groups = places.shape[2]
    _own_kernel[(sizes.num_kv_heads * groups,)](
        plan.base, slab, plan.room, pairs, mean_log, plan.offset, *queries, queries.stride(1), last - first, groups,
        HKV=sizes.num_kv_heads, C=sizes.chunk_size, WIDTH=width, num_warps=1,
    )  # fmt: skip
    return Pairs(pairs.view(torch.int32).view(-1, width, 2), d_prior_out)
