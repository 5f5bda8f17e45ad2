"""What kernels over query tiles and over chunks of keys share: where rows lie, loads of them, and sums of their gradients."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
# Fewer keys would leave rows of the tensor cores empty, where keys are the rows of a product.
KEYS_AS_ROWS = 64


@triton.jit
def tile_place(i_tile, chunk_start, chunk_end, TILES_PER_CHUNK: tl.constexpr, T: tl.constexpr):
    """Chunk, first token and one past the last token of a tile (number within its head)."""
    i_c = i_tile // TILES_PER_CHUNK
    start = tl.load(chunk_start + i_c) + (i_tile % TILES_PER_CHUNK) * T
    return i_c, start, tl.minimum(start + T, tl.load(chunk_end + i_c))


@triton.jit
def tile_number(tiles_per_head):
    """Head and number within it of this program's query tile; late tiles come first: they have the most chunks before them."""
    return tl.program_id(0) // tiles_per_head, tiles_per_head - 1 - tl.program_id(0) % tiles_per_head


@triton.jit
def query_tile(chunk_start, chunk_end, num_chunks, T: tl.constexpr, C: tl.constexpr):
    """Head of this program's query tile and number within it; its chunk, and its first token and one past the last."""
    i_h, i_tile = tile_number(num_chunks * (C // T))
    own, start, end = tile_place(i_tile, chunk_start, chunk_end, C // T, T)
    return i_h, i_tile, own, start, end


@triton.jit
def tile_list(list_offset, list_count, i_h, i_tile, tiles_per_head):
    """Number of a tile among those of all heads, where its list begins, and how many entries it has."""
    p_tile = i_h.to(tl.int64) * tiles_per_head + i_tile
    return p_tile, tl.load(list_offset + p_tile), tl.load(list_count + p_tile)


@triton.jit
def tile_rows(start, end, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a tile's rows [T * GP] and of their dimensions [BLOCK_D]; token, head within its group, and existence of a row."""
    o_r, o_d = tl.arange(0, T * GP), tl.arange(0, BLOCK_D)
    o_n, o_g = (start + o_r // GP).to(tl.int64), o_r % GP
    return o_r, o_d, o_n, o_g, (o_n < end) & (o_g < G)


@triton.jit
def load_tile(q, i_h, o_n, o_g, o_d, m_row, stride_qn, stride_qh, G: tl.constexpr, D: tl.constexpr):
    """Queries [rows, BLOCK_D] at the offsets that `tile_rows` gives; zero where `m_row` is false and beyond D."""
    p_q = q + o_n[:, None] * stride_qn + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
    return tl.load(p_q, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_rows(x, o_n, stride_n, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [n, BLOCK_D] of one head `x` at tokens `o_n`; zero where `m_n` is false and beyond D."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    return tl.load(p_x, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_keys(
    x, start, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, RUN: tl.constexpr
):
    """Rows [KEYS, BLOCK_D], all of which exist, of one head `x`: from token `start` on, or, with `start` [KEYS, 1], in runs of
    RUN rows that each begin at theirs."""
    o_n, o_d = tl.arange(0, KEYS) % RUN, tl.arange(0, BLOCK_D)
    # offsets that stay the same in every iteration apart from the one that does not
    p_x = (x + start.to(tl.int64) * stride_n) + (o_n[:, None] * stride_n + o_d[None, :])
    return tl.load(p_x) if BLOCK_D == D else tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def load_entries(p_chunk, i_e, count, KEYS: tl.constexpr, C: tl.constexpr):
    """What entry `i_e` of a list of `count` entries holds; or, where a step has more than a chunk's keys, for each of the KEYS keys
    what its entry from `i_e` on holds [KEYS, 1], beyond the list what its last entry does."""
    if KEYS <= C:
        i_chunk = tl.load(p_chunk + i_e, mask=i_e < count, other=0)
    else:
        o_e = i_e + (tl.arange(0, KEYS) // C)[:, None]
        i_chunk = tl.load(p_chunk + tl.minimum(o_e, count - 1), mask=count > 0, other=0)
    return i_chunk


@triton.jit
def load_priors(p_prior, i_e, count, T: tl.constexpr, ENTRIES: tl.constexpr):
    """Log priors [rows, ENTRIES] of list entries from `i_e` on, at `p_prior` [rows]; -inf beyond the list."""
    o_e = i_e + tl.arange(0, ENTRIES)[None, :]
    return tl.load(p_prior[:, None] + o_e * T, mask=o_e < count, other=float("-inf"))


@triton.jit
def split_keys(b_x, ENTRIES: tl.constexpr):
    """[rows, keys] as [rows, ENTRIES, keys of an entry]."""
    return tl.reshape(b_x, (b_x.shape[0], ENTRIES, b_x.shape[1] // ENTRIES))


@triton.jit
def spread(b_x, KEYS: tl.constexpr):
    """[rows, KEYS] from [rows, entries]: the same for all keys of an entry."""
    ROWS: tl.constexpr = b_x.shape[0]
    ENTRIES: tl.constexpr = b_x.shape[1]
    return tl.reshape(tl.broadcast_to(b_x[:, :, None], (ROWS, ENTRIES, KEYS // ENTRIES)), (ROWS, KEYS))


@triton.jit
def own_key_rows(key_start, key_end, stride_key, i_h, own):
    """First row and one past the last of the keys of a query tile's own chunk."""
    p_key = i_h.to(tl.int64) * stride_key + own
    return tl.load(key_start + p_key), tl.load(key_end + p_key)


@triton.jit
def own_scores(
    b_q, k, v, i_own, own_start, own_end, o_slot, stride_kn, stride_vn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A step over a query tile's own chunk: keys and values `i_own` and on [KEYS, BLOCK_D], zero from row `own_end` on, and the
    products of queries and keys [rows, KEYS], -inf for keys beyond `o_slot[r]`, the place of row r's token in the chunk."""
    o_c = i_own + tl.arange(0, KEYS)
    o_t = own_start + o_c
    b_k = load_rows(k, o_t, stride_kn, o_t < own_end, D, BLOCK_D)
    b_v = load_rows(v, o_t, stride_vn, o_t < own_end, D, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    return b_k, b_v, tl.where(o_c[None, :] <= o_slot[:, None], b_s, float("-inf"))


@triton.jit
def place_sums(
    i_p,
    num_parts,
    i_row,
    i_h,
    begins,
    ends,
    o_c,
    o_k,
    m_k,
    HKV: tl.constexpr,
    C: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Slot of a part's sums for a row that begins or ends in it; for each key the place in units of D, and whether to store."""
    # slot 0 of a part: a row that began in an earlier part; slot 1: one that began here
    i_slot = i_p * 2 + begins.to(tl.int64)
    p_row, m_row = i_slot * C + o_c, o_c < C
    if begins & ends:
        # behind the slots of the parts lie slots for whole rows, or the gradients themselves
        i_slot = num_parts * 2 + i_row
        if DIRECT:
            p_row = num_parts.to(tl.int64) * (2 * C) + o_k.to(tl.int64) * HKV + i_h
            m_row = m_k
        else:
            p_row = i_slot * C + o_c
    return i_slot, p_row, m_row


@triton.jit
def step_products(
    b_k, b_v, b_q, b_do, b_dk, b_dv, b_shift, b_delta, o_c, o_slot, scale, KEYS_AS_ROWS: tl.constexpr
):
    """Add a step's rows to dk and dv [KEYS, BLOCK_D], or turned. There, products that do not wait for each other
    come first; else they would need more registers than there are. `b_shift` has the scores' dimensions, or one key for all."""
    if KEYS_AS_ROWS:
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_s = tl.where(o_c[:, None] <= o_slot[None, :], b_s * scale + b_shift, float("-inf"))
        b_p = tl.exp2(b_s)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    else:
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_s = tl.where(o_c[None, :] <= o_slot[:, None], b_s * scale + b_shift, float("-inf"))
        b_p = tl.exp2(b_s)
        b_dv = tl.dot(tl.trans(b_do), b_p.to(b_do.dtype), b_dv, input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dk = tl.dot(tl.trans(b_q), b_ds.to(b_q.dtype), b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def store_sums(
    dk_sum, dv_sum, b_dk, b_dv, p_row, m_row, o_d, m_d, D: tl.constexpr, KEYS_AS_ROWS: tl.constexpr
):
    """Store what `step_products` summed at the places of the keys, `p_row` in units of D."""
    if KEYS_AS_ROWS:
        p_out, m_out = p_row[:, None] * D + o_d[None, :], m_row[:, None] & m_d[None, :]
    else:
        p_out, m_out = p_row[None, :] * D + o_d[:, None], m_row[None, :] & m_d[:, None]
    tl.store(dk_sum + p_out, b_dk, mask=m_out)
    tl.store(dv_sum + p_out, b_dv, mask=m_out)
