"""The main kernel of `backward_kv.py` for Hopper, in Gluon: a loader warp fetches query rows ahead of one warpgroup.

Which rows come next is read from the transposed lists, so that their addresses wait for memory twice. A warp of its own
does that waiting, and two programs share a multiprocessor.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dash_megatron.ops.kernels.configs import Config
from dash_megatron.ops.kernels.geometry import Sizes
from dash_megatron.ops.kernels.hopper import ELEMENTS, HOPPER_ROWS
from dash_megatron.ops.kernels.tiles import LOG2_E
from dash_megatron.ops.kernels.transpose import Transposed, WorkPartition


@gluon.jit
def _step_place(
    i_place, i_step, own_start, own_end, STEPS: gl.constexpr, TILES: gl.constexpr, T: gl.constexpr
):
    """First token of the tile of a step and one past its last, from what its list entry says if it has one."""
    i_e = i_step // STEPS
    start = gl.where(i_e >= TILES, (i_place & 0x7FFFFFFF).to(gl.int32), own_start + i_e * T)
    listed_end = start + (i_place >> 32).to(gl.int32)
    return start, gl.where(i_e >= TILES, listed_end, gl.minimum(start + T, own_end))


@gluon.jit
def _load_rows(
    q_desc, do_desc, k_desc, v_desc, q_bufs, do_bufs, k_buf, v_buf, full, empty, kv_full, kv_empty,
    row_place, row_offset, row_work, chunk_start, chunk_end, here, stop, i_row, num_chunks,
    G: gl.constexpr, D: gl.constexpr, T: gl.constexpr, TILES: gl.constexpr, STEPS: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch keys and values of every chunk, and for each the query rows of its tiles."""
    done, rows = 0, 0
    while here < stop:
        begin, end = gl.load(row_work + i_row), gl.load(row_work + i_row + 1)
        i_h, i_c = (i_row // num_chunks).to(gl.int32), i_row % num_chunks
        own_start, own_end = gl.load(chunk_start + i_c), gl.load(chunk_end + i_c)
        mbarrier.wait(kv_empty, (rows & 1) ^ 1)
        mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [own_start, i_h * D], kv_full, k_buf)
        tma.async_copy_global_to_shared(v_desc, [own_start, i_h * D], kv_full, v_buf)
        p_place = row_place + gl.load(row_offset + i_row) - TILES
        first_step = (here - begin).to(gl.int32) * STEPS
        last_step = (gl.minimum(stop, end) - begin).to(gl.int32) * STEPS
        i_place = gl.load(p_place + first_step // STEPS, mask=first_step // STEPS >= TILES, other=0)
        for i_step in range(first_step, last_step):
            start, _ = _step_place(i_place, i_step, own_start, own_end, STEPS, TILES, T)
            i_next = (i_step + 1) // STEPS
            i_place = gl.load(p_place + i_next, mask=(i_next >= TILES) & (i_step + 1 < last_step), other=0)
            i_buf = done % STAGES
            mbarrier.wait(empty.index(i_buf), ((done // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(i_buf), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            token = start + i_step % STEPS * TOKENS
            tma.async_copy_global_to_shared(
                q_desc, [token, i_h * G, 0], full.index(i_buf), q_bufs.index(i_buf)
            )
            tma.async_copy_global_to_shared(
                do_desc, [token, i_h * G, 0], full.index(i_buf), do_bufs.index(i_buf)
            )
            done += 1
        rows += 1
        here = end
        i_row += 1


@gluon.jit
def _row_numbers(
    centred_lse, delta, mean_log, list_log_prior, i_place, i_entry, i_step, last_step, own_start, own_end, i_h,
    inv_sigma,
    HKV: gl.constexpr, G: gl.constexpr, T: gl.constexpr, TILES: gl.constexpr, STEPS: gl.constexpr,
    TOKENS: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """First token of a step, and of its rows the shift of the scores (-inf for absent rows) and delta."""
    start, end = _step_place(i_place, i_step, own_start, own_end, STEPS, TILES, T)
    token = start + i_step % STEPS * TOKENS
    o_r = gl.arange(0, TOKENS * G, ROW)
    o_n = o_r // G
    m_n = (token + o_n < end) & (i_step < last_step)
    p_head = token.to(gl.int64) * (HKV * G) + i_h * G
    b_lse = gl.load(centred_lse + p_head + o_n * (HKV * G) + o_r % G, mask=m_n, other=float("inf"))
    b_delta = gl.load(delta + p_head + o_n * (HKV * G) + o_r % G, mask=m_n, other=0.0)
    # a token's own chunk has no prior: as if at the mean, which the log-sum-exp contains
    listed = i_step // STEPS >= TILES
    p_own = mean_log + token.to(gl.int64) * HKV + i_h
    b_own = gl.load(p_own + o_n * HKV, mask=m_n & (o_r * 0 + i_step // STEPS < TILES), other=0.0)
    p_log = list_log_prior + i_entry * T + i_step % STEPS * TOKENS
    b_log = gl.load(p_log + o_n, mask=m_n & (o_r * 0 + i_step // STEPS >= TILES), other=0.0)
    return token, gl.where(listed, b_log, b_own) * inv_sigma - b_lse, b_delta


@gluon.jit
def _sum_rows(
    centred_lse, delta, mean_log, list_log_prior, q_bufs, do_bufs, k_buf, v_buf, full, empty, kv_full, kv_empty,
    row_place, row_entry, row_offset, row_work, dk_sum, dv_sum, chunk_start, chunk_end, here, stop, i_row, num_chunks,
    scale, inv_sqrt_d, inv_sigma,
    HKV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, T: gl.constexpr, C: gl.constexpr, TILES: gl.constexpr,
    STEPS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sum the gradients of keys and values of every chunk over the query rows of its tiles."""
    ROWS: gl.constexpr = TOKENS * G
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    b_none = gl.zeros([C, ROWS], gl.float32, S_LAYOUT)
    i_p = gl.program_id(0).to(gl.int64)
    done, rows = 0, 0
    while here < stop:
        begin, end = gl.load(row_work + i_row), gl.load(row_work + i_row + 1)
        i_h, i_c = (i_row // num_chunks).to(gl.int32), i_row % num_chunks
        own_start, own_end = gl.load(chunk_start + i_c), gl.load(chunk_end + i_c)
        o_k = own_start + gl.arange(0, C, gl.SliceLayout(1, S_LAYOUT))
        p_list = gl.load(row_offset + i_row) - TILES
        first_step = (here - begin).to(gl.int32) * STEPS
        last_step = (gl.minimum(stop, end) - begin).to(gl.int32) * STEPS
        m_first = first_step // STEPS >= TILES
        i_place = gl.load(row_place + p_list + first_step // STEPS, mask=m_first, other=0)
        i_entry = gl.load(row_entry + p_list + first_step // STEPS, mask=m_first, other=0)
        token, b_shift, b_delta = _row_numbers(
            centred_lse, delta, mean_log, list_log_prior, i_place, i_entry, first_step, last_step, own_start, own_end,
            i_h, inv_sigma, HKV, G, T, TILES, STEPS, TOKENS, ROW,
        )  # fmt: skip
        i_next = (first_step + 1) // STEPS
        m_next = (i_next >= TILES) & (first_step + 1 < last_step)
        i_place = gl.load(row_place + p_list + i_next, mask=m_next, other=0)
        i_entry = gl.load(row_entry + p_list + i_next, mask=m_next, other=0)
        b_dk, b_dv = gl.zeros([C, D], gl.float32, O_LAYOUT), gl.zeros([C, D], gl.float32, O_LAYOUT)
        mbarrier.wait(kv_full, rows & 1)
        for i_step in range(first_step, last_step):
            i_buf = done % STAGES
            mbarrier.wait(full.index(i_buf), (done // STAGES) & 1)
            q_buf, do_buf = q_bufs.index(i_buf).reshape((ROWS, D)), do_bufs.index(i_buf).reshape((ROWS, D))
            # transposed scores [C, ROWS]
            b_s = warpgroup_mma(k_buf, q_buf.permute((1, 0)), b_none, use_acc=False, is_async=True)
            b_dp = warpgroup_mma(v_buf, do_buf.permute((1, 0)), b_none, use_acc=False, is_async=True)
            b_shift_now, b_delta_now = gl.convert_layout(b_shift, COLUMN), gl.convert_layout(b_delta, COLUMN)
            m_s = gl.expand_dims(o_k, 1) <= gl.expand_dims(token + gl.arange(0, ROWS, COLUMN) // G, 0)
            # numbers of the next step, and the list entry of the step after it, arrive during this one
            token, b_shift, b_delta = _row_numbers(
                centred_lse, delta, mean_log, list_log_prior, i_place, i_entry, i_step + 1, last_step, own_start,
                own_end, i_h, inv_sigma, HKV, G, T, TILES, STEPS, TOKENS, ROW,
            )  # fmt: skip
            i_next = (i_step + 2) // STEPS
            m_next = (i_next >= TILES) & (i_step + 2 < last_step)
            i_place = gl.load(row_place + p_list + i_next, mask=m_next, other=0)
            i_entry = gl.load(row_entry + p_list + i_next, mask=m_next, other=0)
            b_s = warpgroup_mma_wait(1, deps=[b_s])
            b_p = gl.where(m_s, b_s * scale + gl.expand_dims(b_shift_now, 0), float("-inf"))
            b_p = gl.exp2(b_p)
            b_p16 = gl.convert_layout(b_p.to(q_bufs.dtype), P_LAYOUT)
            b_dp = warpgroup_mma_wait(0, deps=[b_dp])
            b_dv = warpgroup_mma(b_p16, do_buf, b_dv, is_async=True)
            b_ds = gl.convert_layout(
                (b_p * (b_dp - gl.expand_dims(b_delta_now, 0))).to(q_bufs.dtype), P_LAYOUT
            )
            b_dk = warpgroup_mma(b_ds, q_buf, b_dk, is_async=True)
            b_dv, b_dk = warpgroup_mma_wait(0, deps=[b_dv, b_dk])
            # all warps are done with the buffers
            gl.thread_barrier()
            mbarrier.arrive(empty.index(i_buf), count=1)
            done += 1
        gl.thread_barrier()
        mbarrier.arrive(kv_empty, count=1)
        # slots as in the plain kernel: 0 for a row that began in an earlier part, 1 for one that began here
        i_slot = i_p * 2 + (here == begin).to(gl.int64)
        i_slot = gl.where((here == begin) & (stop >= end), gl.num_programs(0) * 2 + i_row, i_slot)
        o_c, o_d = gl.arange(0, C, gl.SliceLayout(1, O_LAYOUT)), gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        o_out = gl.expand_dims(o_c * D, 1) + gl.expand_dims(o_d, 0)
        gl.store(dk_sum + i_slot * C * D + o_out, b_dk * inv_sqrt_d)
        gl.store(dv_sum + i_slot * C * D + o_out, b_dv)
        rows += 1
        here = end
        i_row += 1


@gluon.jit
def _dkv_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, centred_lse, delta, mean_log, list_log_prior,
    row_place, row_entry, row_offset, row_work, part_bound, part_row, dk_sum, dv_sum, chunk_start, chunk_end,
    num_chunks, scale, inv_sqrt_d, inv_sigma,
    HKV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, T: gl.constexpr, C: gl.constexpr, TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = C // T
    STEPS: gl.constexpr = T // TOKENS
    i_p = gl.program_id(0)
    here, stop = gl.load(part_bound + i_p), gl.load(part_bound + i_p + 1)
    i_row = gl.load(part_row + i_p)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [C, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(k_desc.dtype, [C, D], v_desc.layout)
    q_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TOKENS, G, D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TOKENS, G, D], do_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(kv_bars.index(i), count=1)
    gl.warp_specialize(
        [
            (_sum_rows, (
                centred_lse, delta, mean_log, list_log_prior, q_bufs, do_bufs, k_buf, v_buf, full, empty,
                kv_bars.index(0), kv_bars.index(1), row_place, row_entry, row_offset, row_work, dk_sum, dv_sum,
                chunk_start, chunk_end, here, stop, i_row, num_chunks, scale, inv_sqrt_d, inv_sigma,
                HKV, G, D, T, C, TILES, STEPS, TOKENS, STAGES,
            )),
            (_load_rows, (
                q_desc, do_desc, k_desc, v_desc, q_bufs, do_bufs, k_buf, v_buf, full, empty,
                kv_bars.index(0), kv_bars.index(1), row_place, row_offset, row_work, chunk_start, chunk_end, here,
                stop, i_row, num_chunks, G, D, T, TILES, STEPS, TOKENS, STAGES,
            )),
        ],
        [1], [24],
    )  # fmt: skip


def sum_hopper(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, centred_lse: Tensor, delta: Tensor, mean_log: Tensor,
    log_prior: Tensor, transposed: Transposed, partition: WorkPartition, sums: Tensor, chunks: Tensor, sizes: Sizes,
    inv_sigma: float, config: Config,
) -> None:  # fmt: skip
    """Fill the partial `sums` of dk and dv [2, slots, C, D] as the plain kernel does, for chunks of 64 and tensors that `fits_hopper` accepts."""
    C, D, G = sizes.chunk_size, sizes.head_dim, sizes.group
    tokens = HOPPER_ROWS // G
    element = ELEMENTS[q.dtype]
    kv_layout = gl.NVMMASharedLayout.get_default_for([C, D], element)
    k_desc, v_desc = (TensorDescriptor.from_tensor(x.flatten(1), [C, D], kv_layout) for x in (k, v))
    layout = gl.NVMMASharedLayout.get_default_for([tokens, G, D], element)
    q_desc, do_desc = (TensorDescriptor.from_tensor(x, [tokens, G, D], layout) for x in (q, d_out))
    _dkv_hopper_kernel[(len(partition.row),)](
        q_desc, do_desc, k_desc, v_desc, centred_lse, delta, mean_log, log_prior, *transposed, *partition,
        *sums, chunks[0], chunks[1], sizes.num_chunks, D**-0.5 * LOG2_E, D**-0.5, inv_sigma,
        HKV=sizes.num_kv_heads, G=G, D=D, T=sizes.tile_tokens, C=C, TOKENS=tokens, STAGES=config.num_stages,
        num_warps=4, maxnreg=128,
    )  # fmt: skip
