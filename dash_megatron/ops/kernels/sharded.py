"""The stages of DashAttention as plain functions, for queries and keys in different buffers; see `ops/sharded.py`.

The kernels are those of `dash.py`. A call of `attend` takes the part of every query tile's list whose chunks lie in the
buffer's window, and turns chunk numbers into rows of the buffer once, so that the kernels find keys by row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels import attend as attention
from dash_megatron.ops.kernels import route as routing
from dash_megatron.ops.kernels import summarize as summaries
from dash_megatron.ops.kernels.backward_kv import backward_kv_alone, sum_d_summary, token_factors
from dash_megatron.ops.kernels.backward_q import backward_q, backward_router
from dash_megatron.ops.kernels.configs import Plan, plan
from dash_megatron.ops.kernels.geometry import Lists, Sizes, check_supported, list_offsets, size_tiles
from dash_megatron.ops.kernels.transpose import divide, transpose
from dash_megatron.ops.sharded import KeyBuffer, QueryChunks
from dash_megatron.ops.types import Router

__all__ = [
    "Routed",
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


class Routed(NamedTuple):
    """What the router chose for every query tile and row of q; tensors only, so that autograd can save it."""

    list_chunk: Tensor
    """The `Lists` of the query tiles, of all past chunks."""
    list_log_prior: Tensor
    list_offset: Tensor
    list_count: Tensor
    tau: Tensor
    """float32 [n, Hq]: threshold of the entmax."""
    mean_log: Tensor
    """float32 [n, Hkv]: mean log2 probability of the past chunks selected; zero if the prior is not centred."""
    selected: Tensor
    """int32 [n, Hkv]: chunks selected, the own one included."""

    @property
    def lists(self) -> Lists:
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


def _prepare(q: Tensor, num_kv_heads: int, queries: QueryChunks, chunk_size: int) -> tuple[Plan, Sizes]:
    check_supported(q, num_kv_heads)
    launches = plan(q.device, q.dtype, q.shape[2], chunk_size, q.shape[1] // num_kv_heads, hopper=False)
    num_local = len(queries.start)
    return launches, size_tiles(
        len(q), q.shape[1:], num_kv_heads, chunk_size, num_local, queries.list_bound, launches.tile_rows
    )


def _key_sizes(k: Tensor, start: Tensor, chunk_size: int) -> Sizes:
    """What summaries need of sizes: no query tiles."""
    return size_tiles(len(k), k.shape[1:], k.shape[1], chunk_size, len(start), 0, chunk_size)


def _chunks(queries: QueryChunks) -> Tensor:
    return torch.stack([queries.start, queries.end, queries.first])


def _past(queries: QueryChunks) -> Tensor:
    """How many chunks of its document lie before each local chunk; 0 for an empty one."""
    return torch.where(queries.end > queries.start, queries.number - queries.first, 0)


def _in_window(queries: QueryChunks, keys: KeyBuffer) -> Tensor:
    """Bool [local chunks]: whether the window has the chunk itself."""
    return (queries.number >= keys.first) & (queries.number < keys.last) & (queries.end > queries.start)


def _own_keys(queries: QueryChunks, keys: KeyBuffer) -> Tensor:
    """First row and one past the last in the buffer of each local chunk's own keys: int32 [2, Hkv, local chunks]."""
    here = _in_window(queries, keys)
    number = torch.where(here, queries.number, 0)
    start, length = (x.index_select(1, number) for x in (keys.row, keys.length))
    return torch.stack([start, start + length * here])


def _keys_and_queries(queries: QueryChunks, keys: KeyBuffer) -> tuple[Tensor, Tensor]:
    """First and one past the last row of the keys, and of this rank's queries, of the window's chunks.

    Both int32 [2, Hkv, window]. A chunk has no queries where the buffer does not hold its keys.
    """
    row, length = (x[:, keys.first : keys.last] for x in (keys.row, keys.length))
    width = keys.last - keys.first
    # what lies elsewhere meets in one more column
    place = torch.where(_in_window(queries, keys), queries.number - keys.first, width).long()
    spans = torch.zeros(2, width + 1, dtype=torch.int32, device=row.device)
    spans[:, place] = torch.stack([queries.start, queries.end])
    start, end = (x[:width].expand_as(row) for x in spans)
    return torch.stack([row, row + length]), torch.stack([start, torch.where(length > 0, end, start)])


def _window(routed: Routed, keys: KeyBuffer, sizes: Sizes) -> tuple[Lists, Lists]:
    """The parts of the lists in the window: with chunk numbers, and with rows of the buffer in their place."""
    row = torch.empty_like(routed.list_chunk)
    offset, count = torch.empty_like(routed.list_offset), torch.empty_like(routed.list_count)
    _window_kernel[(sizes.num_tiles,)](
        routed.list_chunk, routed.list_offset, routed.list_count, keys.row.contiguous(), row, offset, count,
        keys.first, keys.last, keys.row.shape[1], sizes.tiles_per_head, BLOCK=BLOCK_ENTRIES, num_warps=1,
    )  # fmt: skip
    lists = Lists(routed.list_chunk, routed.list_log_prior, offset, count)
    return lists, lists._replace(chunk=row)


def summarize(k: Tensor, w: Tensor, start: Tensor, end: Tensor, chunk_size: int) -> Tensor:
    """Softmax-weighted mean key of every chunk.

    Args:
        k: keys [m, Hkv, D]; float16, bfloat16 or float32.
        w: summary queries [Hkv, D].
        start, end: first row and one past the last of every chunk, int32 [chunks]; equal for an empty one.
        chunk_size: the most rows a chunk has.

    Returns:
        [Hkv, chunks, D], float32 beside float32 keys and otherwise float16; zero for empty chunks.
    """
    sizes = _key_sizes(k, start, chunk_size)
    return summaries.summarize(_rows(k), _rows(w), torch.stack([start, end]), sizes)


def summarize_backward(
    d_summary: Tensor, k: Tensor, w: Tensor, start: Tensor, end: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Float32 gradients of k [m, Hkv, D], zero in rows of no chunk, and of w [Hkv, D].

    `d_summary` is float32 [Hkv, chunks, D]; the other arguments are those of `summarize`.
    """
    sizes = _key_sizes(k, start, chunk_size)
    return summaries.summarize_backward(
        d_summary.float().contiguous(), _rows(k), _rows(w), torch.stack([start, end]), sizes
    )


def route(
    q: Tensor, summary: Tensor, queries: QueryChunks, router: Router, chunk_size: int, head_scaling: Tensor | None = None
) -> Routed:  # fmt: skip
    """Solve the entmax of every row and list the chunks that each query tile selected.

    Waits for the device only where lists are too long to be allocated for every chunk being selected.

    Args:
        q: [n, Hq, D], all rows in chunks; float16, bfloat16 or float32.
        summary: of all chunks of the whole sequence [Hkv, num_chunks, D], as `summarize` gives them.
        queries: where the chunks of q lie.
        router: its scaling factor is a number.
        chunk_size: 16, 32, 64 or 128.
        head_scaling: multiplies the router's scaling factor, for each key/value head [Hkv].
    """
    launches, sizes = _prepare(q, len(summary), queries, chunk_size)
    past = _past(queries)
    lists, *rest = routing.route(
        _rows(q), summary.contiguous(), _chunks(queries), list_offsets(sizes, past), sizes, router,
        launches.route, queries.number.contiguous(), routing.factors(router, past, len(summary), head_scaling),
    )  # fmt: skip
    return Routed(*lists, *rest)


def listed(routed: Routed, num_chunks: int) -> Tensor:
    """Bool [Hkv, num_chunks]: past chunks that at least one row selected."""
    Hkv, tiles = routed.selected.shape[1], len(routed.list_count)
    marks = torch.zeros(Hkv, num_chunks, dtype=torch.uint8, device=routed.selected.device)
    _listed_kernel[(tiles,)](
        routed.list_chunk, routed.list_offset, routed.list_count, marks, num_chunks, tiles // Hkv,
        BLOCK=BLOCK_ENTRIES, num_warps=1,
    )  # fmt: skip
    return marks.view(torch.bool)


def route_backward(
    routed: Routed, d_prior: Tensor, q: Tensor, summary: Tensor, queries: QueryChunks, router: Router, chunk_size: int,
    head_scaling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients through the router, from that of the log priors.

    Under `torch.use_deterministic_algorithms` the gradient of the summaries is summed in order, at some cost in time,
    and otherwise with atomics.

    Args:
        d_prior: of `new_d_prior`, filled by calls of `attend_backward` for all chunks.
        routed, q, summary, queries, router, chunk_size, head_scaling: of `route`.

    Returns:
        Float32 gradients of q through the router alone [n, Hq, D] and, from these rows, of the summaries
        [Hkv, num_chunks, D] and of `head_scaling`, if there is one.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    launches, sizes = _prepare(q, len(summary), queries, chunk_size)
    q, summary, chunks = _rows(q), summary.contiguous(), _chunks(queries)
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    factor = routing.factors(router, _past(queries), len(summary), head_scaling)
    d_summary, mean_dp, d_log_factor = backward_router(
        q, summary, routed.tau, dq, d_prior, routed.lists, chunks, sizes, router, launches.router, deterministic,
        factor, head_scaling is not None,
    )  # fmt: skip
    if deterministic:
        transposed = transpose(routed.lists, chunks, sizes, (0, summary.shape[1]))
        d_summary = sum_d_summary(
            q, routed.tau, mean_dp, summary, routed.list_log_prior, d_prior, transposed, sizes, router,
            token_factors(factor, queries.start, len(q)),
        )  # fmt: skip
    if head_scaling is None or d_log_factor is None:
        return dq, d_summary, None
    return dq, d_summary, d_log_factor / head_scaling


def attend(
    q: Tensor, k: Tensor, v: Tensor, routed: Routed, queries: QueryChunks, keys: KeyBuffer, router: Router, chunk_size: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to what of each row's own and listed chunks the window has.

    Args:
        q: [n, Hq, D].
        k, v: the buffer [m, Hkv, D], in q's dtype. Within the window it holds every chunk that a list names.
        routed: of `route` for the same q and queries.
        queries, keys: where the chunks lie.
        router, chunk_size: as in `route`.

    Returns:
        Output [n, Hq, D] and base-2 log-sum-exp of the scores [n, Hq], both float32; 0 and -inf for a row that sees no
        key here. Calls whose windows share no chunk are merged by weights 2 ** lse.
    """
    launches, sizes = _prepare(q, k.shape[1], queries, chunk_size)
    _, lists = _window(routed, keys, sizes)
    return attention.attend(
        _rows(q), _rows(k), _rows(v), lists, routed.mean_log, _chunks(queries), sizes, router, launches.attend,
        _own_keys(queries, keys),
    )  # fmt: skip


def new_d_prior(routed: Routed) -> Tensor:
    """What calls of `attend_backward` fill, each for the chunks in its window: the gradient of the log priors."""
    return torch.empty_like(routed.list_log_prior)


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, routed: Routed, queries: QueryChunks,
    keys: KeyBuffer, router: Router, chunk_size: int, d_prior: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients through attention to one buffer.

    Args:
        d_out: [n, Hq, D], of the merged output.
        out, lse: merged over all buffers, [n, Hq, D] and float32 [n, Hq].
        d_prior: of `new_d_prior`; written for the chunks in the window.
        q, k, v, routed, queries, keys, router, chunk_size: of `attend`.

    Returns:
        Float32 gradients of q [n, Hq, D], k and v [m, Hkv, D]; those of k and v are zero in rows that nothing attends to.
    """
    launches, sizes = _prepare(q, k.shape[1], queries, chunk_size)
    q, k, v, chunks = _rows(q), _rows(k), _rows(v), _chunks(queries)
    d_out, out, lse = d_out.to(q.dtype).contiguous(), out.contiguous(), lse.contiguous()
    lists, row_lists = _window(routed, keys, sizes)
    dq, _, delta, centred_lse = backward_q(
        q, k, v, out, d_out, lse, row_lists, routed.mean_log, chunks, sizes, router, launches.queries,
        _own_keys(queries, keys), d_prior,
    )  # fmt: skip
    places, own_queries = _keys_and_queries(queries, keys)
    transposed = transpose(lists, chunks, sizes, (keys.first, keys.last))
    division = divide(transposed, chunks, sizes, launches.parts, own_queries)
    dk, dv = backward_kv_alone(
        q, k, v, d_out, centred_lse, delta, routed.mean_log, lists, transposed, division, places, own_queries,
        sizes, router, launches.keys,
    )  # fmt: skip
    return dq, dk, dv
