"""What kernels over slabs of pairs share: a program's part of a slab, and rows gathered by token or found by slot."""

import triton
import triton.language as tl

from dash_megatron.ops.kernels.tiles import tile_place


@triton.jit
def load_numbers(p_x, NUMBERS: tl.constexpr, COPIES: tl.constexpr):
    """The numbers at each of the pointers [ROWS], and again if COPIES is 2: [ROWS, COPIES * NUMBERS].

    Where there are fewer numbers than threads, Triton lets every thread that needs a number load it, once more for each layout that
    it is needed in. Copies make up for that.
    """
    return tl.load(p_x[:, None] + tl.arange(0, COPIES * NUMBERS)[None, :] % NUMBERS)


@triton.jit
def load_pairs(p_pair, o_e):
    """Packed pairs `o_e`, [ROWS, 2] int32: tokens, and shifts of the scores, which `load_shifts` gives.

    Loaded as int64 [ROWS], each thread loaded the pairs of all rows whose queries it loads: 8 instead of 1 a step with 64 rows.
    """
    return load_numbers(p_pair.to(tl.pointer_type(tl.int32)) + 2 * o_e, 2, 1)


@triton.jit
def load_shifts(p_pair, o_e):
    """Shifts of the scores of packed pairs `o_e`.

    They have a load of their own, which is copied ahead with the queries. Taken from `load_pairs` of the same step, they were loaded
    and waited for in the middle of the step.
    """
    return tl.load(p_pair.to(tl.pointer_type(tl.float32)) + 1 + 2 * o_e)


@triton.jit
def load_slots(p_slot, o_e):
    """Slots of pairs `o_e`.

    Loaded as [ROWS], each thread copied the slots of all rows that it writes, and once more for log-sum-exps: 9 instead of 1 a step
    with 64 rows. With that, and with shifts taken from `load_pairs`, attend took 6% longer on an H200.
    """
    b_slot, _ = tl.split(load_numbers(p_slot + o_e, 1, 2))
    return b_slot


@triton.jit
def store_rows(partial, b_out, o_slot, m_row, o_d, D: tl.constexpr):
    """Write rows [ROWS, BLOCK_D] at places `o_slot` of partial [places, D]."""
    p_out = partial + (o_slot * D)[:, None] + o_d[None, :]
    tl.store(p_out, b_out, mask=m_row[:, None] & (o_d < D)[None, :], cache_modifier=".cs")


@triton.jit
def load_gathered(x, o_n, o_head, o_d, stride_n, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [ROWS, BLOCK_D] of x at tokens `o_n` and heads `o_head`, all of which exist; zero beyond D."""
    p_x = x + (o_n * stride_n + o_head * stride_h)[:, None] + o_d[None, :]
    return tl.load(p_x) if BLOCK_D == D else tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def part_of_slab(row_place, row_work, part_bound, part_row, first_tile, slab, num_chunks, tiles_per_head):
    """This program's part of a slab: its first step and the one behind its last, the chunk it begins in, the slab's head, and where
    the slab's places and steps by chunk stand."""
    i_p = slab * (tl.num_programs(0) + 1) + tl.program_id(0)
    here, stop = tl.load(part_bound + i_p), tl.load(part_bound + i_p + 1)
    i_c = tl.load(part_row + i_p - slab)
    i_h = tl.load(first_tile + slab) // tiles_per_head
    return here, stop, i_c, i_h, row_place + slab * (num_chunks + 1), row_work + slab * (num_chunks + 1)


@triton.jit
def chunk_of_slab(p_place, p_work, i_c, here):
    """The chunk, from `i_c` on, that step `here` of a slab is of; its first step and the one behind its last, the place of its first
    pair, and the number of its last one."""
    end = tl.load(p_work + i_c + 1)
    # keys of chunks without pairs may be absent
    while end <= here:
        i_c += 1
        end = tl.load(p_work + i_c + 1)
    p_pair = tl.load(p_place + i_c)
    return i_c, tl.load(p_work + i_c), end, p_pair, (tl.load(p_place + i_c + 1) - p_pair).to(tl.int32) - 1


@triton.jit
def rows_of_slab(slot, first_tile, slab, T: tl.constexpr, BLOCKS: tl.constexpr):
    """A slab's first row, one past its last row, and its first slot. A token has BLOCKS rows, each of some of its heads."""
    first, stop = tl.load(first_tile + slab) * T, tl.load(first_tile + slab + 1) * T
    return first * BLOCKS, stop * BLOCKS, tl.load(slot + first)


@triton.jit
def slots_of_row(slot, i_row, stop, BLOCKS: tl.constexpr):
    """Where the slots of a row's token begin and end; for rows from `stop` on, those of the last row before it."""
    i_lane = tl.minimum(i_row, tl.maximum(stop, 1) - 1) // BLOCKS
    return tl.load(slot + i_lane), tl.load(slot + i_lane + 1)


@triton.jit
def parts_of_row(partial, i_part, o_s, o_g, o_d, G: tl.constexpr, D: tl.constexpr):
    """Pointers to parts `i_part` and on of a row's heads, slot by slot: [SLOTS, HEADS, BLOCK_D]."""
    p_part = partial + i_part * D + (o_g * D)[None, :, None] + o_d[None, None, :]
    return p_part + (o_s * (G * D))[:, None, None]


@triton.jit
def lane_place(i_lane, chunk_start, chunk_end, tiles_per_head, T: tl.constexpr, C: tl.constexpr):
    """Head and token of a row of all tiles, and whether it exists."""
    i_tile = i_lane // T
    _, start, end = tile_place(i_tile % tiles_per_head, chunk_start, chunk_end, C // T, T)
    i_n = start + i_lane % T
    return i_tile // tiles_per_head, i_n.to(tl.int64), i_n < end
