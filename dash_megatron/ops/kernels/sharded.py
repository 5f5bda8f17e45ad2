"""The stages of DashAttention as plain functions, for queries and keys in different buffers; see `ops/shards.py`.

The kernels are those of `dash.py`. A call of `attend` takes the part of every query tile's list whose chunks lie in the
buffer's window, and turns chunk numbers into rows of the buffer once, so that the kernels find keys by row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels import route as routing
from dash_megatron.ops.kernels import summarize as summaries
from dash_megatron.ops.kernels.attend import attend_forward
from dash_megatron.ops.kernels.backward_kv import backward_kv_buffer
from dash_megatron.ops.kernels.backward_pairs import backward_pairs
from dash_megatron.ops.kernels.backward_q import backward_q, backward_router
from dash_megatron.ops.kernels.backward_summary import sum_d_summary
from dash_megatron.ops.kernels.configs import Launches, find_launches
from dash_megatron.ops.kernels.geometry import (
    KeyPlaces,
    Lists,
    Sizes,
    check_supported,
    list_offsets,
    size_tiles,
)
from dash_megatron.ops.kernels.transpose import transpose
from dash_megatron.ops.shards import (
    Attended,
    AttentionGradients,
    KeyBuffer,
    OutputGradient,
    QueryChunks,
    Routed,
    RoutedQueries,
    RouterGradients,
)
from dash_megatron.ops.types import Router

__all__ = [
    "attend",
    "attend_backward",
    "listed",
    "new_d_prior",
    "route",
    "route_backward",
    "summarize",
    "summarize_backward",
]

BLOCK_ENTRIES = 128


class State(NamedTuple):
    """`Routed.state`: what the router selected for every query tile and row of q."""

    list_chunk: Tensor
    """The `Lists` of the query tiles, of all past chunks."""
    list_log_prior: Tensor
    list_offset: Tensor
    list_count: Tensor
    tau: Tensor
    """float32 [n, Hq], or [n, Hkv] with `pool_heads`: threshold of the entmax."""
    mean_log: Tensor
    """float32 [n, Hkv]: mean log2 probability of the past chunks selected; zero if the prior is not centred."""

    @property
    def lists(self) -> Lists:
        """The first four fields as one value."""
        return Lists(*self[:4])


@triton.jit
def _count_below(p_chunk, count, bound):
    """How many of the first `count` entries of an ascending list are below `bound`."""
    low, high = count * 0, count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(p_chunk + middle) < bound
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["first", "last"])
def _window_kernel(
    list_chunk, list_offset, list_count, chunk_row, window_row, window_offset, window_count,
    first, last, num_chunks, tiles_per_head, BLOCK: tl.constexpr,
):  # fmt: skip
    """The part of a tile's list that lies in the window, and where its chunks lie in the buffer."""
    i_tile = tl.program_id(0).to(tl.int64)
    offset, count = tl.load(list_offset + i_tile), tl.load(list_count + i_tile)
    before = _count_below(list_chunk + offset, count, first)
    inside = _count_below(list_chunk + offset, count, last) - before
    offset += before
    tl.store(window_offset + i_tile, offset)
    tl.store(window_count + i_tile, inside)
    chunk_row += i_tile // tiles_per_head * num_chunks
    for i_e in range(0, inside, BLOCK):
        o_e = i_e + tl.arange(0, BLOCK)
        m_e = o_e < inside
        o_c = tl.load(list_chunk + offset + o_e, mask=m_e, other=0)
        tl.store(window_row + offset + o_e, tl.load(chunk_row + o_c, mask=m_e, other=0), mask=m_e)


@triton.jit
def _listed_kernel(
    list_chunk, list_offset, list_count, listed, num_chunks, tiles_per_head, BLOCK: tl.constexpr
):
    """Mark the chunks that a tile lists."""
    i_tile = tl.program_id(0).to(tl.int64)
    offset, count = tl.load(list_offset + i_tile), tl.load(list_count + i_tile)
    listed += i_tile // tiles_per_head * num_chunks
    for i_e in range(0, count, BLOCK):
        o_e = i_e + tl.arange(0, BLOCK)
        o_c = tl.load(list_chunk + offset + o_e, mask=o_e < count, other=0)
        tl.store(listed + o_c, tl.full([BLOCK], 1, tl.uint8), mask=o_e < count)


def _rows(x: Tensor) -> Tensor:
    """Any strides but that of the last dimension, which is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _prepare(q: Tensor, num_kv_heads: int, chunks: QueryChunks, router: Router) -> tuple[Launches, Sizes]:
    check_supported(q, num_kv_heads)
    chunk_size, groups = router.chunk_size, q.shape[1] // num_kv_heads
    launches = find_launches(q.device, q.dtype, q.shape[2], chunk_size, groups)
    num_local, bound = len(chunks.start), chunks.list_bound
    return launches, size_tiles(
        len(q), q.shape[1:], num_kv_heads, chunk_size, num_local, bound, launches.tile_rows
    )


def _key_sizes(k: Tensor, start: Tensor, chunk_size: int) -> Sizes:
    """What summaries need of sizes: no query tiles."""
    return size_tiles(len(k), k.shape[1:], k.shape[1], chunk_size, len(start), 0, chunk_size)


def _spans(chunks: QueryChunks) -> Tensor:
    """First row, one past the last, and first chunk of the document: int32 [3, local chunks]."""
    return torch.stack([chunks.start, chunks.end, chunks.first])


def _past(chunks: QueryChunks) -> Tensor:
    """How many chunks of its document lie before each local chunk; 0 for an empty one."""
    return torch.where(chunks.end > chunks.start, chunks.number - chunks.first, 0)


def _in_window(chunks: QueryChunks, keys: KeyBuffer) -> Tensor:
    """Bool [local chunks]: whether the window has the chunk itself."""
    return (chunks.number >= keys.first) & (chunks.number < keys.last) & (chunks.end > chunks.start)


def _own_keys(chunks: QueryChunks, keys: KeyBuffer) -> Tensor:
    """First row and one past the last in the buffer of each local chunk's own keys: int32 [2, Hkv, local chunks]."""
    here = _in_window(chunks, keys)
    number = torch.where(here, chunks.number, 0)
    start, length = (x.index_select(1, number) for x in (keys.row, keys.length))
    return torch.stack([start, start + length * here])


def _keys_and_queries(chunks: QueryChunks, keys: KeyBuffer) -> tuple[Tensor, Tensor]:
    """First and one past the last row of the keys, and of this rank's queries, of the window's chunks.

    Both int32 [2, Hkv, window]. A chunk has no queries where the buffer does not hold its keys.
    """
    row, length = (x[:, keys.first : keys.last] for x in (keys.row, keys.length))
    width = keys.last - keys.first
    # what lies elsewhere meets in one more column
    place = torch.where(_in_window(chunks, keys), chunks.number - keys.first, width).long()
    spans = torch.zeros(2, width + 1, dtype=torch.int32, device=row.device)
    spans[:, place] = torch.stack([chunks.start, chunks.end])
    start, end = (x[:width].expand_as(row) for x in spans)
    return torch.stack([row, row + length]), torch.stack([start, torch.where(length > 0, end, start)])


def _window(state: State, chunks: QueryChunks, keys: KeyBuffer, sizes: Sizes) -> tuple[Lists, KeyPlaces]:
    """The parts of the lists in the window, and where keys lie in the buffer."""
    row = torch.empty_like(state.list_chunk)
    offset, count = torch.empty_like(state.list_offset), torch.empty_like(state.list_count)
    _window_kernel[(sizes.num_tiles,)](
        state.list_chunk, state.list_offset, state.list_count, keys.row.contiguous(), row, offset, count,
        keys.first, keys.last, keys.row.shape[1], sizes.tiles_per_head, BLOCK=BLOCK_ENTRIES, num_warps=1,
    )  # fmt: skip
    window, lists = (keys.first, keys.last), Lists(state.list_chunk, state.list_log_prior, offset, count)
    # a tensor of its own: kernels are compiled for how addresses are aligned
    start = keys.row[:, slice(*window)].contiguous()
    return lists, KeyPlaces(_own_keys(chunks, keys), start, row, window, state.list_count, keys.whole)


def _num_pairs(routed: Routed) -> Tensor:
    """int64 []: pairs of a token and a chunk in all lists; own chunks are not listed."""
    return routed.selected.sum() - routed.selected.numel()


def summarize(k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int) -> Tensor:
    """As `Stages.summarize`, for float16, bfloat16 or float32.

    Summaries are float32 beside float32 keys and otherwise float16.
    """
    sizes = _key_sizes(k, chunks.start, chunk_size)
    return summaries.summarize(_rows(k), _rows(w), torch.stack([chunks.start, chunks.end]), sizes)


def summarize_backward(
    d_summary: Tensor, k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `Stages.summarize_backward`; the gradient of w is float32."""
    sizes = _key_sizes(k, chunks.start, chunk_size)
    return summaries.summarize_backward(
        d_summary.float().contiguous(), _rows(k), _rows(w), torch.stack([chunks.start, chunks.end]), sizes, more
    )  # fmt: skip


def route(
    q: Tensor, summary: Tensor, chunks: QueryChunks, router: Router, pooled_q: Tensor | None = None
) -> Routed:
    """As `Stages.route`: solve the entmax of every row and list the chunks that each query tile selected.

    Waits for the device only where lists are too long to be allocated for every chunk being selected.
    """
    launches, sizes = _prepare(q, len(summary), chunks, router)
    past, sizes = _past(chunks), sizes.of_router(router.pool_heads)
    q = router.group_means(q if pooled_q is None else pooled_q, len(summary))
    head_scaling, router = router.split()
    lists, tau, mean_log, selected = routing.route(
        _rows(q), summary.contiguous(), _spans(chunks), list_offsets(sizes, past), sizes, router,
        launches.route, chunks.number.contiguous(), head_scaling,
    )  # fmt: skip
    return Routed(selected, State(*lists, tau, mean_log))


def listed(routed: Routed, num_chunks: int) -> Tensor:
    """As `Stages.listed`."""
    state = State(*routed.state)
    Hkv, tiles = routed.selected.shape[1], len(state.list_count)
    marks = torch.zeros(Hkv, num_chunks, dtype=torch.uint8, device=routed.selected.device)
    _listed_kernel[(tiles,)](
        state.list_chunk, state.list_offset, state.list_count, marks, num_chunks, tiles // Hkv,
        BLOCK=BLOCK_ENTRIES, num_warps=1,
    )  # fmt: skip
    return marks.view(torch.bool)


def route_backward(d_prior: Tensor, queries: RoutedQueries, summary: Tensor) -> RouterGradients:
    """As `Stages.route_backward`; gradients are float32, but that of `pooled_q`.

    Under `torch.use_deterministic_algorithms` the gradient of the summaries is summed in order, at some cost in time,
    and otherwise with atomics.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    chunks, state = queries.chunks, State(*queries.routed.state)
    head_scaling, router = queries.router.split()
    launches, sizes = _prepare(queries.q, len(summary), chunks, router)
    q, summary, spans = _rows(queries.routing_q), summary.contiguous(), _spans(chunks)
    q, sizes = router.group_means(q, len(summary)), sizes.of_router(router.pool_heads)
    # one that is added to attention's is not rounded yet
    dq = torch.zeros(q.shape, dtype=torch.float32 if queries.pooled_q is None else q.dtype, device=q.device)
    number = chunks.number.contiguous()
    d_summary, mean_dp, d_log_factor = backward_router(
        q, summary, state.tau, dq, d_prior, state.lists, spans, sizes, router, launches.router, deterministic,
        head_scaling, number,
    )  # fmt: skip
    if deterministic:
        transposed = transpose(state.lists, spans, sizes, (0, summary.shape[1]))
        d_summary = sum_d_summary(
            q, state.tau, mean_dp, summary, state.list_log_prior, d_prior, transposed, chunks.start, number, sizes, router,
            head_scaling,
        )  # fmt: skip
    dq = router.group_means_backward(dq, queries.routing_q.shape[1])
    if head_scaling is None or d_log_factor is None:
        return RouterGradients(dq, d_summary, None)
    return RouterGradients(dq, d_summary, d_log_factor / head_scaling)


def attend(queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer) -> Attended:
    """As `Stages.attend`; the log-sum-exp is float32, as the output is of a buffer that is not whole."""
    q, chunks, router, state = queries.q, queries.chunks, queries.router, State(*queries.routed.state)
    launches, sizes = _prepare(q, k.shape[1], chunks, router)
    lists, places = _window(state, chunks, keys, sizes)
    out, lse = attend_forward(
        _rows(q), _rows(k), _rows(v), lists, state.mean_log, _spans(chunks), sizes, router.inv_sigma, launches.attend,
        places, launches.attend_by_pair, _num_pairs(queries.routed),
    )  # fmt: skip
    return Attended(out, lse)


def new_d_prior(routed: Routed) -> Tensor:
    """As `Stages.new_d_prior`; each call of `attend_backward` writes it for the chunks in its window."""
    return torch.empty_like(State(*routed.state).list_log_prior)


def attend_backward(
    gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer
) -> AttentionGradients:
    """As `Stages.attend_backward`; gradients are float32, but that of q of a whole buffer."""
    chunks, router, state = queries.chunks, queries.router, State(*queries.routed.state)
    launches, sizes = _prepare(queries.q, k.shape[1], chunks, router)
    q, k, v, spans = _rows(queries.q), _rows(k), _rows(v), _spans(chunks)
    d_out, out, lse = gradient.d_out.to(q.dtype).contiguous(), *(x.contiguous() for x in gradient.merged)
    lists, places = _window(state, chunks, keys, sizes)
    dq, delta, centred_lse, left, slabs = backward_q(
        q, k, v, out, d_out, lse, lists, state.mean_log, gradient.d_prior, spans, sizes, router.inv_sigma,
        launches.queries, places, launches.backward_by_pair, _num_pairs(queries.routed),
    )  # fmt: skip
    d_keys = backward_kv_buffer(
        q, k, v, d_out, centred_lse, delta, state.mean_log, left, places.window, spans, *_keys_and_queries(chunks, keys),
        sizes, router.inv_sigma, launches, keys.whole,
    )  # fmt: skip
    backward_pairs(
        q, k, v, d_out, lse, delta, dq, gradient.d_prior, lists, slabs, state.mean_log, spans, sizes, router.inv_sigma,
        d_keys,
    )  # fmt: skip
    return AttentionGradients(dq, *d_keys)
