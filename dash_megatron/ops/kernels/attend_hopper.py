"""The forward of `attend.py` for Hopper, in Gluon: one loader warp and two warpgroups of 64 rows that share keys and values.

Sixty-four rows a program would wait for the L2 cache, since every program fetches its own copy of the chunks; one
program of 128 rows in step would leave the tensor cores idle during the softmax. Here each warpgroup runs at its own
pace, so that one's softmax falls into the other's products. Chunks of 32 come two a step, the own one with the first of
the list.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dash_megatron.ops.kernels.configs import HOPPER_OVERLAP, Config
from dash_megatron.ops.kernels.geometry import KeyPlaces, Lists, Sizes, result_dtype
from dash_megatron.ops.kernels.hopper import ELEMENTS, HOPPER_ROWS
from dash_megatron.ops.kernels.tiles import LOG2_E

# Keys of a step where chunks are smaller: two chunks of 32.
STEP_KEYS = 64


@gluon.jit
def _fetch(
    k_desc, v_desc, k_boxes, v_boxes, arrived, i_start, column, i_buf, i_entry,
    D: gl.constexpr, BOX: gl.constexpr, ENTRIES: gl.constexpr,
):  # fmt: skip
    """Fetch keys and values from row `i_start` on as entry `i_entry` of a step's buffers, in boxes of BOX columns."""
    for i in gl.static_range(D // BOX):
        i_box = (i_buf * (D // BOX) + i) * ENTRIES + i_entry
        place = [i_start, column + i * BOX]
        tma.async_copy_global_to_shared(k_desc, place, arrived, k_boxes.index(i_box))
        tma.async_copy_global_to_shared(v_desc, place, arrived, v_boxes.index(i_box))


@gluon.jit
def _first_row(i_chunk, document, first, C: gl.constexpr, SHARDED: gl.constexpr):
    """Where the keys of a list entry begin: past chunks of a document are whole, so that their number tells; lists of SHARDED hold it."""
    return i_chunk if SHARDED else document + (i_chunk - first) * C


@gluon.jit
def _load_chunks(
    k_desc, v_desc, k_boxes, v_boxes, full, empty, p_chunk, count, document, first, own_start, column,
    D: gl.constexpr, C: gl.constexpr, BOX: gl.constexpr, ENTRIES: gl.constexpr, STAGES: gl.constexpr,
    SHARDED: gl.constexpr,
):  # fmt: skip
    """Fetch keys and values of the own chunk, then of the listed ones, as far ahead as there are buffers.

    Where the last step has too few chunks, the own one again fills it; SHARDED, where rows behind that may be NaN, zeros."""
    STEP_BYTES: gl.constexpr = (k_desc.block_type.nbytes + v_desc.block_type.nbytes) * (D // BOX) * ENTRIES
    # zeros are what arrives from beyond the buffer
    i_start, i_second, filler = own_start, own_start, k_desc.shape[0] if SHARDED else own_start
    if ENTRIES == 2:
        i_next = gl.load(p_chunk, mask=count > 0, other=0)
        i_second = gl.where(count > 0, _first_row(i_next, document, first, C, SHARDED), filler)
    for i_s in range(gl.cdiv(count + 1, ENTRIES)):
        # the numbers of the next chunks are on their way while these wait for a buffer
        i_e = (i_s + 1) * ENTRIES - 1
        i_next = gl.load(p_chunk + i_e, mask=i_e < count, other=0)
        if ENTRIES == 2:
            i_next_second = gl.load(p_chunk + i_e + 1, mask=i_e + 1 < count, other=0)
        i_buf = i_s % STAGES
        mbarrier.wait(empty.index(i_buf), ((i_s // STAGES) & 1) ^ 1)
        arrived = full.index(i_buf)
        mbarrier.expect(arrived, STEP_BYTES)
        _fetch(k_desc, v_desc, k_boxes, v_boxes, arrived, i_start, column, i_buf, 0, D, BOX, ENTRIES)
        i_start = _first_row(i_next, document, first, C, SHARDED)
        if ENTRIES == 2:
            _fetch(k_desc, v_desc, k_boxes, v_boxes, arrived, i_second, column, i_buf, 1, D, BOX, ENTRIES)
            i_second = _first_row(i_next_second, document, first, C, SHARDED)
            i_second = gl.where(i_e + 1 < count, i_second, filler)


@gluon.jit
def _softmax(b_acc, b_sum, b_max, b_s, b_shift, b_second, scale, C: gl.constexpr, ENTRIES: gl.constexpr):
    """Online softmax with scores `scale * b_s` in base 2, plus `b_shift` for a step's first C keys, `b_second` for the others.

    Returns weights, and what was summed so far, rescaled."""
    if ENTRIES == 1:
        b_next = gl.maximum(b_max, gl.max(b_s, 1) * scale + b_shift)
        b_offset = gl.expand_dims(b_shift - b_next, 1)
    else:
        b_most, b_most_second = gl.max(b_s.reshape([b_s.shape[0], 2, C]), 2).split()
        b_most = gl.convert_layout(b_most, b_max.type.layout) * scale + b_shift
        b_most_second = gl.convert_layout(b_most_second, b_max.type.layout) * scale + b_second
        b_next = gl.maximum(b_max, gl.maximum(b_most, b_most_second))
        m_first = gl.expand_dims(gl.arange(0, 2 * C, gl.SliceLayout(0, b_s.type.layout)) < C, 0)
        b_offset = gl.where(
            m_first, gl.expand_dims(b_shift - b_next, 1), gl.expand_dims(b_second - b_next, 1)
        )
    b_p = gl.exp2(b_s * scale + b_offset)
    b_alpha = gl.exp2(b_max - b_next)
    b_sum = b_sum * b_alpha + gl.sum(b_p, 1)
    b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout)), 1)
    return b_p, b_acc, b_sum, b_next


@gluon.jit
def _attend_rows(
    q, out, lse, p_prior, mean_log, q_buf, k_bufs, v_bufs, full, empty, i_row, count, start, end, own_start, own_keys, i_h,
    stride_qn, stride_qh, scale, inv_sigma,
    HKV: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, ENTRIES: gl.constexpr, SHARDED: gl.constexpr,
):  # fmt: skip
    """Attend with rows i_row up to i_row + ROWS of the tile, whose own chunk has `own_keys` keys, or, unless SHARDED, C rows."""
    KEYS: gl.constexpr = C * ENTRIES
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    # float32 fills whole sectors of memory as it comes, and would need much shared memory to change places
    OUT: gl.constexpr = O_LAYOUT if out.dtype.element_ty == gl.float32 else LOAD

    o_r = i_row + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))
    o_d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    o_n, o_g = (start + o_r // GP).to(gl.int64), o_r % GP
    p_q = q + gl.expand_dims(o_n * stride_qn + (i_h * G + o_g) * stride_qh, 1) + gl.expand_dims(o_d, 0)
    m_q = gl.expand_dims((o_n < end) & (o_g < G), 1)
    q_buf.store(gl.load(p_q, mask=m_q, other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    o_r = i_row + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    o_n, o_g = (start + o_r // GP).to(gl.int64), o_r % GP
    m_row = (o_n < end) & (o_g < G)
    b_mean = gl.load(mean_log + o_n * HKV + i_h, mask=o_n < end, other=0.0)
    p_prior += o_r // GP
    b_shift = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    b_acc, b_sum = gl.zeros([ROWS, D], gl.float32, O_LAYOUT), b_shift
    # of a token that sees nothing of a shard, -inf would make NaN
    b_max = b_shift - (1e30 if SHARDED else float("inf"))
    b_none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    b_second, b_log_second = b_shift, b_shift

    # own chunk first: every token sees itself, unless SHARDED, so the running maximum is finite ever after
    mbarrier.wait(full.index(0), 0)
    b_s = warpgroup_mma(q_buf, k_bufs.index(0).permute((1, 0)), b_none, use_acc=False, is_async=True)
    # the list entry that comes first in step 1
    b_log = gl.load(p_prior + (ENTRIES - 1) * T, mask=m_row & (count > ENTRIES - 1), other=0.0)
    if ENTRIES == 2:
        b_log_second = gl.load(p_prior, mask=m_row & (count > 0), other=float("-inf"))
        b_second = (b_log_second - b_mean) * inv_sigma
        b_log_second = gl.load(p_prior + 2 * T, mask=m_row & (count > 2), other=float("-inf"))
    if own_keys < C:
        # What lies behind them may be NaN, which no weight of zero takes away. Both warpgroups write the same.
        o_v = gl.expand_dims(gl.arange(0, KEYS, gl.SliceLayout(1, LOAD)), 1)
        v_buf = v_bufs.index(0)
        v_buf.store(gl.where((o_v < own_keys) | (o_v >= C), v_buf.load(LOAD), 0.0))
        fence_async_shared()
        gl.thread_barrier()
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    o_k = gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
    m_own = gl.expand_dims(own_start + o_k, 0) <= gl.expand_dims(o_n, 1)
    if SHARDED:
        m_own &= gl.expand_dims(o_k < own_keys, 0)
    if ENTRIES == 2:
        m_own |= gl.expand_dims(o_k >= C, 0)
    b_s = gl.where(m_own, b_s, float("-inf"))
    if ENTRIES == 2:
        # Scores that nothing changed would stay in the product's registers, and all later products would wait one by one.
        b_s += 0.0

    num_steps = gl.cdiv(count + 1, ENTRIES)
    for i_s in range(1, num_steps):
        i_buf, i_last = i_s % STAGES, (i_s - 1) % STAGES
        mbarrier.wait(full.index(i_buf), (i_s // STAGES) & 1)
        b_s_next = warpgroup_mma(
            q_buf, k_bufs.index(i_buf).permute((1, 0)), b_none, use_acc=False, is_async=True
        )
        b_shift_next = (b_log - b_mean) * inv_sigma
        b_second_next = (b_log_second - b_mean) * inv_sigma
        # the priors after the next arrive during this softmax
        i_e = (i_s + 1) * ENTRIES - 1
        b_log = gl.load(p_prior + i_e * T, mask=m_row & (i_e < count), other=0.0)
        if ENTRIES == 2:
            b_log_second = gl.load(
                p_prior + (i_e + 1) * T, mask=m_row & (i_e + 1 < count), other=float("-inf")
            )
        if not OVERLAP:
            b_s_next = warpgroup_mma_wait(0, deps=[b_s_next])
        b_p, b_acc, b_sum, b_max = _softmax(b_acc, b_sum, b_max, b_s, b_shift, b_second, scale, C, ENTRIES)
        b_p = gl.convert_layout(b_p.to(q.dtype.element_ty), P_LAYOUT)
        b_acc = warpgroup_mma(b_p, v_bufs.index(i_last), b_acc, is_async=True)
        if OVERLAP:
            b_s, b_acc = warpgroup_mma_wait(0, deps=[b_s_next, b_acc])
        else:
            b_acc = warpgroup_mma_wait(0, deps=[b_acc])
            b_s = b_s_next
        b_shift, b_second = b_shift_next, b_second_next
        # all warps are done with the buffers
        gl.thread_barrier()
        mbarrier.arrive(empty.index(i_last), count=1)

    b_p, b_acc, b_sum, b_max = _softmax(b_acc, b_sum, b_max, b_s, b_shift, b_second, scale, C, ENTRIES)
    b_p = gl.convert_layout(b_p.to(q.dtype.element_ty), P_LAYOUT)
    b_acc = warpgroup_mma(b_p, v_bufs.index((num_steps - 1) % STAGES), b_acc, is_async=True)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    if SHARDED:
        # a token that sees nothing here: output 0, log-sum-exp -inf
        b_max = gl.where(b_sum > 0, b_max, float("-inf"))
        b_sum = gl.where(b_sum > 0, b_sum, 1.0)
    gl.store(lse + o_n * (HKV * G) + i_h * G + o_g, b_max + gl.log2(b_sum), mask=m_row)
    b_out = b_acc * gl.expand_dims(gl.convert_layout(1 / b_sum, gl.SliceLayout(1, O_LAYOUT)), 1)
    b_out = gl.convert_layout(b_out.to(out.dtype.element_ty), OUT)
    o_r, o_d = i_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUT)), gl.arange(0, D, gl.SliceLayout(0, OUT))
    o_n, o_g = (start + o_r // GP).to(gl.int64), o_r % GP
    p_out = out + gl.expand_dims((o_n * (HKV * G) + i_h * G + o_g) * D, 1) + gl.expand_dims(o_d, 0)
    gl.store(p_out, b_out, mask=gl.expand_dims((o_n < end) & (o_g < G), 1))


@gluon.jit
def _attend_hopper_kernel(
    q, k_desc, v_desc, out, lse, list_chunk, list_log_prior, list_offset, list_count, mean_log,
    chunk_start, chunk_end, chunk_first, key_start, key_end, stride_qn, stride_qh, scale, inv_sigma, num_chunks,
    HKV: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, ENTRIES: gl.constexpr, BOX: gl.constexpr,
    Q_LAYOUT: gl.constexpr, KEY_LAYOUT: gl.constexpr, SHARDED: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = C * ENTRIES
    TILES_PER_CHUNK: gl.constexpr = C // T
    tiles_per_head = num_chunks * TILES_PER_CHUNK
    i_h = gl.program_id(0) // tiles_per_head
    # late tiles have the longest lists: start them first
    i_tile = tiles_per_head - 1 - gl.program_id(0) % tiles_per_head
    own = i_tile // TILES_PER_CHUNK
    own_start = gl.load(chunk_start + own)
    start = own_start + (i_tile % TILES_PER_CHUNK) * T
    end = gl.minimum(start + T, gl.load(chunk_end + own))
    if start < end:
        first, document, own_row, own_keys = own, own_start, own_start, C
        if SHARDED:
            p_key = i_h.to(gl.int64) * num_chunks + own
            own_row = gl.load(key_start + p_key)
            own_keys = gl.load(key_end + p_key) - own_row
        else:
            first = gl.load(chunk_first + own)
            document = gl.load(chunk_start + first)
        p_tile = i_h.to(gl.int64) * tiles_per_head + i_tile
        offset, count = gl.load(list_offset + p_tile), gl.load(list_count + p_tile)
        # Boxes of rows of 128 bytes lie one after the other, as those of a step's keys do.
        k_boxes = gl.allocate_shared_memory(
            k_desc.dtype, [STAGES * (D // BOX) * ENTRIES, C, BOX], k_desc.layout
        )
        v_boxes = gl.allocate_shared_memory(
            v_desc.dtype, [STAGES * (D // BOX) * ENTRIES, C, BOX], v_desc.layout
        )
        k_bufs = k_boxes._reinterpret(k_desc.dtype, [STAGES, KEYS, D], KEY_LAYOUT)
        v_bufs = v_boxes._reinterpret(v_desc.dtype, [STAGES, KEYS, D], KEY_LAYOUT)
        q_bufs = gl.allocate_shared_memory(k_desc.dtype, [2, ROWS, D], Q_LAYOUT)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            # both warpgroups have to be done
            mbarrier.init(empty.index(i), count=2)
        p_prior = list_log_prior + offset * T
        gl.warp_specialize(
            [
                (_attend_rows, (
                    q, out, lse, p_prior, mean_log, q_bufs.index(0), k_bufs, v_bufs, full, empty, 0, count, start, end,
                    own_start, own_keys, i_h, stride_qn, stride_qh, scale, inv_sigma, HKV, G, GP, D, T, C, ROWS, STAGES,
                    OVERLAP, ENTRIES, SHARDED,
                )),
                (_attend_rows, (
                    q, out, lse, p_prior, mean_log, q_bufs.index(1), k_bufs, v_bufs, full, empty, ROWS, count, start,
                    end, own_start, own_keys, i_h, stride_qn, stride_qh, scale, inv_sigma, HKV, G, GP, D, T, C, ROWS, STAGES,
                    OVERLAP, ENTRIES, SHARDED,
                )),
                (_load_chunks, (
                    k_desc, v_desc, k_boxes, v_boxes, full, empty, list_chunk + offset, count, document, first, own_row,
                    i_h * D, D, C, BOX, ENTRIES, STAGES, SHARDED,
                )),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip


def attend_forward_hopper(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, mean_log: Tensor, chunks: Tensor,
    sizes: Sizes, inv_sigma: float, config: Config, keys: KeyPlaces | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attend_forward`, for tensors that `fits_hopper` accepts; with `keys` the lists hold rows in place of chunks."""
    C, D = sizes.chunk_size, sizes.head_dim
    entries = max(1, STEP_KEYS // C)
    # Boxes of several chunks would lie apart within rows of more than 128 bytes, which a box of its own cannot know.
    box = D if entries == 1 else 64
    layout, key_layout, q_layout = (
        gl.NVMMASharedLayout.get_default_for(shape, ELEMENTS[q.dtype])
        for shape in ([C, box], [C * entries, D], [HOPPER_ROWS, D])
    )
    k_desc, v_desc = (TensorDescriptor.from_tensor(x.flatten(1), [C, box], layout) for x in (k, v))
    sharded, own = keys is not None, (None, None) if keys is None else keys.own
    out = torch.empty(q.shape, dtype=result_dtype(q, keys), device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _attend_hopper_kernel[(sizes.num_tiles,)](
        q, k_desc, v_desc, out, lse, *lists, mean_log, *chunks, *own, *q.stride()[:2],
        sizes.head_dim**-0.5 * LOG2_E, inv_sigma, sizes.num_chunks,
        HKV=sizes.num_kv_heads, G=sizes.group, GP=sizes.padded_group, D=D, T=sizes.tile_tokens, C=C, ROWS=HOPPER_ROWS,
        STAGES=config.num_stages, OVERLAP=config.kernel == HOPPER_OVERLAP,
        ENTRIES=entries, BOX=box, Q_LAYOUT=q_layout, KEY_LAYOUT=key_layout, SHARDED=sharded, num_warps=4,
    )  # fmt: skip
    return out, lse
