"""Decoding on the GPU: the torch.library op around its kernels, and how they are launched.

Long caches take four kernels (scores, thresholds, attention, sum of the splits), short ones two (attention that routes for
itself, sum), or one where the batch alone fills the GPU. Grids follow from shapes only, so that a CUDA graph can be
replayed while sequences grow; programs beyond a sequence's length return at once. On Hopper and later each kernel is
launched while the one before it ends (programmatic dependent launch), the first one while whatever ran before does.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dash_megatron.ops.kernels.configs import device_limits, stages_that_fit
from dash_megatron.ops.kernels.decode_attend import decode_attend_kernel, decode_sum_kernel
from dash_megatron.ops.kernels.decode_route import decode_score_kernel, decode_threshold_kernel
from dash_megatron.ops.kernels.geometry import check_supported, next_power_of_two
from dash_megatron.ops.kernels.route import score_scale
from dash_megatron.ops.kernels.tiles import LOG2_E
from dash_megatron.ops.types import Router

# Up to this many bytes of summaries, the programs of the attention route for themselves.
SHORT_BYTES = 32 * 1024
# At most this many programs of the attention a multiprocessor, and so many of a sequence and head: with more, what a program
# does before its first key outweighs its keys, and the sum of the splits takes longer.
PROGRAMS, MOST_PARTS = 2, 32
# So many where each has a multiprocessor to itself and the sequence this many chunks for each: then shorter shares gain more
# than programs and their sum cost.
MORE_PARTS, LEAST_CHUNKS = 48, 32
# A long cache has at least this many: sequences of a batch may differ in length.
LEAST_LONG_PARTS = 8
# At most so many scores a program holds in registers to find their threshold: 8 a thread.
MOST_SCORES = 8192
# Columns of the output that a program sums over the splits.
SUM_COLUMNS = 32
# With more sequences and heads than this, kernels fill the GPU, and the next one only gets in the way when launched early.
MOST_DEPENDENT_ROWS = 16


class Launch(NamedTuple):
    """How the kernels of one shape are launched."""

    short: bool
    """Whether attention routes for itself."""
    splits: int
    """Programs that share the past chunks of a sequence and head; with 1 of a short cache, it also has the own chunk."""
    block_chunks: int
    """Chunks a program scores."""
    block_scores: int
    """Scores a program takes at a time to find a threshold; the first so many stay in its registers."""
    keys: int
    """Keys of a chunk a step."""
    stages: int
    dependent: bool
    """Programmatic dependent launch."""

    @property
    def whole(self) -> bool:
        """Whether one kernel does all: a program has all chunks of a sequence and head."""
        return self.short and self.splits == 1


def find_launch(q: Tensor, num_kv_heads: int, max_chunks: int, chunk_size: int) -> Launch:
    """The launch of q [B, Hq, D] and sequences of up to `max_chunks` chunks, by rule."""
    B, _, D = q.shape
    _, shared_bytes, multiprocessors = device_limits(q.device)
    row_bytes = next_power_of_two(D) * q.element_size()
    rows = B * num_kv_heads
    short = max(16, next_power_of_two(max_chunks)) * row_bytes <= SHORT_BYTES
    # a power of two, one of them for the own chunk
    parts = 1 << (max(1, PROGRAMS * multiprocessors // rows).bit_length() - 1)
    parts = max(1 if short else LEAST_LONG_PARTS, min(parts, MOST_PARTS))
    if rows * MORE_PARTS <= multiprocessors and max_chunks >= LEAST_CHUNKS * MORE_PARTS:
        parts = MORE_PARTS
    splits = max(1, min(max_chunks, parts - 1))
    block = 128
    while block > 32 and (
        rows * triton.cdiv(max_chunks, block) < multiprocessors or block * row_bytes > 32768
    ):
        block //= 2
    keys = max(16, min(chunk_size, 16384 // row_bytes))
    return Launch(
        short=short,
        splits=splits,
        block_chunks=block,
        block_scores=max(64, min(MOST_SCORES, next_power_of_two(max_chunks))),
        keys=keys,
        # two programs share a multiprocessor
        stages=stages_that_fit(3, 16 * row_bytes, 2 * keys * row_bytes, shared_bytes // 2 - 8 * 1024),
        dependent=rows <= MOST_DEPENDENT_ROWS
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] >= 9,
    )


class _Shapes(NamedTuple):
    """Constants that several kernels share."""

    HKV: int
    G: int
    ROWS: int
    D: int
    BLOCK_D: int
    C: int


def _follow(launch: Launch) -> dict[str, bool]:
    """Options of every kernel: whether it is launched before the one ahead of it has ended."""
    return {"DEPENDENT": True, "launch_pdl": True} if launch.dependent else {"DEPENDENT": False}


def _route_long(
    routing_q: Tensor, summary: Tensor, lengths: Tensor, page_table: Tensor | None, stride_table: int, max_chunks: int,
    head_scaling: Tensor | None, router: Router, launch: Launch, shapes: _Shapes,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores and thresholds, float32 [B, Hq, max_chunks] and [B, Hq], and bits of what is selected, int32 [B, Hq, words]."""
    B, Hq, D = routing_q.shape
    device = routing_q.device
    x = torch.empty(B, Hq, max_chunks, dtype=torch.float32, device=device)
    tau = torch.empty(B, Hq, dtype=torch.float32, device=device)
    bits = torch.empty(B, Hq, triton.cdiv(max_chunks, 32), dtype=torch.int32, device=device)
    blocks = triton.cdiv(max_chunks, launch.block_chunks)
    decode_score_kernel[(blocks * B * shapes.HKV,)](
        routing_q, summary, lengths, page_table, head_scaling, x, *routing_q.stride()[:2],
        *summary.stride()[:3], stride_table,
        summary.shape[1], max_chunks, blocks, score_scale(router, D),
        **shapes._asdict(), BLOCK_S=launch.block_chunks, PAGED=page_table is not None,
        LOCAL=router.local_chunks,
        num_warps=8 if shapes.BLOCK_D * routing_q.element_size() > 512 else 4, **_follow(launch),
    )  # fmt: skip
    # third-order convergence: a move this small leaves an error below float32's own
    tolerance = 1e-3 if router.alpha == 1.5 else 1e-6
    decode_threshold_kernel[(B * Hq,)](
        x, lengths, tau, bits, router.exponent, tolerance, 1 / shapes.G, max_chunks, bits.shape[2],
        HQ=Hq, C=shapes.C, BLOCK=launch.block_scores, ALPHA_15=router.alpha == 1.5, LOCAL=router.local_chunks,
        num_warps=max(1, launch.block_scores // 256), **_follow(launch),
    )  # fmt: skip
    return x, tau, bits


def _attend(
    q: Tensor, routing_q: Tensor | None, k: Tensor, v: Tensor, summary: Tensor, lengths: Tensor,
    page_table: Tensor | None, stride_table: int, max_chunks: int, head_scaling: Tensor | None, routed: tuple[Tensor | None, ...], router: Router, launch: Launch, shapes: _Shapes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, Hq, D] and number of chunks selected, int32 [B, Hkv], given what `_route_long` returns, if anything."""
    (B, Hq, D), Hkv, S = q.shape, shapes.HKV, launch.splits

    def floats(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=q.device)

    chunk, place = torch.empty(2, B, Hkv, max_chunks, dtype=torch.int32, device=q.device)
    log_prior = floats(B, Hkv, max_chunks)
    part = lse = stats = None
    if not launch.whole:
        part, lse, stats = floats(B, Hkv, S + 1, shapes.G, D), floats(B, Hq, S + 1), floats(B, Hkv, S + 1, 2)
    out = torch.empty(B, Hq, D, dtype=q.dtype, device=q.device)
    selected = torch.empty(B, Hkv, dtype=torch.int32, device=q.device)
    words = triton.cdiv(max_chunks, 32)
    alpha_15 = router.alpha == 1.5
    decode_attend_kernel[(B * Hkv * (1 if launch.whole else S + 1),)](
        q, routing_q, k, v, summary, lengths, page_table, head_scaling, *routed, chunk, place, log_prior, part, lse, stats, out, selected,
        *q.stride()[:2], *k.stride()[:3],
        *summary.stride()[:3], stride_table,
        summary.shape[1], max_chunks, words, S, D**-0.5 * LOG2_E, score_scale(router, D), router.exponent,
        1e-3 if alpha_15 else 1e-6, router.inv_sigma,
        **shapes._asdict(), KEYS=launch.keys, BLOCK_E=16, CHUNKS=max(16, next_power_of_two(max_chunks)),
        WORDS=next_power_of_two(words), PAGED=page_table is not None, ALPHA_15=alpha_15,
        CENTRE=router.estimate_diagonal, SHORT=launch.short, WHOLE=launch.whole, STAGES=launch.stages,
        LOCAL=router.local_chunks, num_warps=4, **_follow(launch),
    )  # fmt: skip
    if not launch.whole:
        decode_sum_kernel[(B * Hq, triton.cdiv(D, SUM_COLUMNS))](
            part, lse, stats, out, selected, S, router.inv_sigma,
            G=shapes.G, D=D, BLOCK_D=SUM_COLUMNS, PARTS=next_power_of_two(S + 1),
            BLOCK_P=min(64, next_power_of_two(S + 1)), CENTRE=router.estimate_diagonal,
            num_warps=4, **_follow(launch),
        )  # fmt: skip
    return out, selected


@torch.library.custom_op("dash_megatron::dash_decode", mutates_args=())
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    routing_q: Tensor | None,
    head_scaling: Tensor | None,
    chunk_size: int,
    scaling_factor: float,
    sigma: float,
    estimate_diagonal: bool,
    alpha: float,
    local_chunks: int,
    query_pool: int,
    pool_heads: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of one token a sequence; arguments are those of `decode_and_count` and the tensors of its `DashCache`.

    `head_scaling` [Hkv], if given, multiplies `scaling_factor`.

    Returns:
        Output [B, Hq, D] in q's dtype, and the number of chunks selected, the own one included, int32 [B, Hkv].
    """
    Hkv, D = k.shape[2:]
    check_supported(q, Hkv)
    q = q if q.stride(-1) == 1 else q.contiguous()
    routing_q = None if routing_q is None else routing_q.contiguous()
    G = q.shape[1] // Hkv
    max_chunks = summary.shape[1] * (1 if page_table is None else page_table.shape[1])
    stride_table = 0 if page_table is None else page_table.stride(0)
    shapes = _Shapes(Hkv, G, max(16, next_power_of_two(G)), D, next_power_of_two(D), chunk_size)
    router = Router(
        chunk_size=chunk_size, scaling_factor=scaling_factor, sigma=sigma, estimate_diagonal=estimate_diagonal, alpha=alpha,
        local_chunks=local_chunks, query_pool=query_pool, pool_heads=pool_heads,
    )  # fmt: skip
    if pool_heads:
        means = router.group_means(q if routing_q is None else routing_q, Hkv)
        # the kernels score every query head
        routing_q = means.repeat_interleave(G, dim=1)
    launch = find_launch(q, Hkv, max_chunks, chunk_size)
    routed: tuple[Tensor | None, ...] = (None, None, None)
    if not launch.short:
        routed = _route_long(
            q if routing_q is None else routing_q,
            summary,
            lengths,
            page_table,
            stride_table,
            max_chunks,
            head_scaling,
            router,
            launch,
            shapes,
        )
    return _attend(
        q, routing_q, k, v, summary, lengths, page_table, stride_table, max_chunks, head_scaling, routed, router, launch,
        shapes,
    )  # fmt: skip


@decode.register_fake
def _decode_fake(q, k, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], k.shape[2], dtype=torch.int32)
