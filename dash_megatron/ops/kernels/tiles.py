"""What kernels over query tiles share: where a tile and its keys lie, and loads of their rows."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def tile_place(i_tile, chunk_start, chunk_end, TILES_PER_CHUNK: tl.constexpr, T: tl.constexpr):
    """Chunk, first token and one past the last token of a tile (number within its head)."""
    i_c = i_tile // TILES_PER_CHUNK
    start = tl.load(chunk_start + i_c) + (i_tile % TILES_PER_CHUNK) * T
    return i_c, start, tl.minimum(start + T, tl.load(chunk_end + i_c))


@triton.jit
def load_rows(x, o_n, stride_n, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [n, BLOCK_D] of one head `x` at tokens `o_n`; zero where `m_n` is false and beyond D."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    return tl.load(p_x, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_keys(x, start, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr):
    """Rows [KEYS, BLOCK_D] from token `start` on, all of which exist, of one head `x`."""
    o_n, o_d = tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    # offsets that stay the same in every iteration apart from the one that does not
    p_x = (x + start.to(tl.int64) * stride_n) + (o_n[:, None] * stride_n + o_d[None, :])
    return tl.load(p_x) if BLOCK_D == D else tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def own_keys(key_start, key_end, stride_key, i_h, own):
    """First row and one past the last of the keys of a query tile's own chunk."""
    p_key = i_h.to(tl.int64) * stride_key + own
    return tl.load(key_start + p_key), tl.load(key_end + p_key)
