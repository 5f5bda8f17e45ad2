"""Heads of one projection are read once, turned and written to where queries, keys and values are wanted, or back."""

import triton
import triton.language as tl
from torch import Tensor

# Tokens of a program, which takes one head of each.
BLOCK_TOKENS = 64
NUM_WARPS = 4


@triton.jit
def _rope_kernel(
    heads, q, k, v, cos, sin, num_tokens, groups, queries, keys, per_group, HALF: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    i_g, i_h = tl.program_id(1) // per_group, tl.program_id(1) % per_group
    # int64: 1M tokens x 64 heads x 128 channels is beyond 2**31
    o_n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_HALF)[None, :]
    m_x = (o_n < num_tokens) & (o_d < HALF)
    b_c = tl.full([BLOCK, BLOCK_HALF], 1.0, tl.float32)
    b_s = tl.zeros([BLOCK, BLOCK_HALF], tl.float32)
    if i_h < queries + keys:
        b_c = tl.load(cos + o_n * HALF + o_d, mask=m_x, other=0.0)
        b_s = tl.load(sin + o_n * HALF + o_d, mask=m_x, other=0.0)
    p_from = heads + ((o_n * groups + i_g) * per_group + i_h) * 2 * HALF + o_d
    p_to = v + (o_n * groups + i_g) * 2 * HALF + o_d
    if i_h < queries + keys:
        p_to = k + ((o_n * groups + i_g) * keys + i_h - queries) * 2 * HALF + o_d
    if i_h < queries:
        p_to = q + ((o_n * groups + i_g) * queries + i_h) * 2 * HALF + o_d
    if BACK:
        p_from, p_to, b_s = p_to, p_from, -b_s
    b_a = tl.load(p_from, mask=m_x, other=0.0).to(tl.float32)
    b_b = tl.load(p_from + HALF, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_to, (b_a * b_c - b_b * b_s).to(p_to.dtype.element_ty), mask=m_x)
    tl.store(p_to + HALF, (b_b * b_c + b_a * b_s).to(p_to.dtype.element_ty), mask=m_x)


def turn(heads: Tensor, parts: tuple[Tensor, ...], turns: Tensor, sizes: list[int], back: bool) -> None:
    """Write queries, keys and values from heads, or heads from them, turned back; every bit is the same for any number of tokens.

    Args:
        heads: [N, B, groups, queries + keys + values, D], contiguous.
        parts: queries, keys and values, [N, B, groups * size, D] each, contiguous.
        turns: cosines and sines, float32 [2, N, B, D / 2], contiguous.
        sizes: queries, keys and values of a group; any but queries may be 0.
        back: whether heads are written.
    """
    tokens, batch, groups, per_group, head_dim = heads.shape
    assert all(x.is_contiguous() for x in (heads, *parts, turns))
    grid = triton.cdiv(tokens * batch, BLOCK_TOKENS), groups * per_group
    _rope_kernel[grid](
        heads, *parts, *turns, tokens * batch, groups, sizes[0], sizes[1], per_group, HALF=head_dim // 2,
        BLOCK=BLOCK_TOKENS, BLOCK_HALF=triton.next_power_of_2(head_dim // 2), BACK=back, num_warps=NUM_WARPS,
    )  # fmt: skip
