"""Where chunks and query tiles lie, and how much room the routing lists need; plain torch, never waits for the device.

All kernels see one row of tokens: a batch is treated as packed documents of equal length. Chunks are numbered through
all documents. A query tile is T consecutive tokens of one chunk times the heads of one group.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.tensor_cache import cached

# Lists up to this many bytes are allocated for every chunk being selected, which needs no look at the device; above,
# the selected chunks are counted first and the host waits for their number.
MAX_BOUNDED_BYTES = 2 * 2**30
# The last dimension of the Triton grid that tiles use holds fewer programs than this.
MAX_PROGRAMS = 2**31 - 1


class Sizes(NamedTuple):
    """Everything about shapes that launches need, as host integers."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int
    group: int
    """Query heads per key/value head, G."""
    padded_group: int
    """G rounded up to a power of two: heads of one token in a tile's rows, absent heads masked."""
    tile_tokens: int
    """T, a power of two that divides the chunk size."""
    num_chunks: int
    """At least the number of chunks; those beyond it are empty."""
    list_bound: int
    """At least the number of list entries if every past chunk were selected."""

    @property
    def tile_rows(self) -> int:
        """Rows of a query tile, absent heads included."""
        return self.tile_tokens * self.padded_group

    @property
    def tiles_per_chunk(self) -> int:
        """Query tiles of one chunk and key/value head."""
        return self.chunk_size // self.tile_tokens

    @property
    def tiles_per_head(self) -> int:
        """Query tiles of one key/value head, those of empty chunks included."""
        return self.num_chunks * self.tiles_per_chunk

    @property
    def num_tiles(self) -> int:
        """Query tiles of all key/value heads, head by head."""
        return self.tiles_per_head * self.num_kv_heads

    @property
    def block_d(self) -> int:
        """Columns that a tile is loaded with: D rounded up to a power of two."""
        return next_power_of_two(self.head_dim)

    def of_router(self, pool_heads: bool) -> "Sizes":
        """The same tiles as the router sees them: with `pool_heads` a token has one row for each key/value head."""
        if not pool_heads:
            return self
        # as few rows as a product takes
        padded_group = max(1, 16 // self.tile_tokens)
        return self._replace(num_heads=self.num_kv_heads, group=1, padded_group=padded_group)

    @property
    def constants(self) -> dict[str, int]:
        """What kernels over query tiles know when they are compiled."""
        return {
            "HKV": self.num_kv_heads,
            "G": self.group,
            "GP": self.padded_group,
            "D": self.head_dim,
            "BLOCK_D": self.block_d,
            "T": self.tile_tokens,
            "C": self.chunk_size,
        }

    @property
    def lists_are_bounded(self) -> bool:
        """Whether lists have room for every chunk, so that nothing is counted and the host never waits."""
        return self.list_bound * 4 * (1 + self.tile_tokens) <= MAX_BOUNDED_BYTES


class Lists(NamedTuple):
    """The chunks each query tile attends to besides its own, ascending, so that local ones are last: tile i's from offset[i], counts[i] of them."""

    chunk: Tensor
    """int32 [room]: global chunk number."""
    log_prior: Tensor
    """float32 [room, T]: log2 of the group's mean probability, -inf where that token did not select the chunk. That of local
    chunks is the token's mean, so that the centred prior is 0."""
    offset: Tensor
    """int64 [tiles]."""
    counts: Tensor
    """int32 [tiles]."""


class KeyPlaces(NamedTuple):
    """Where keys lie that are not with the queries: in a buffer, with chunks of a window first <= c < last of all chunks."""

    own: Tensor
    """int32 [2, Hkv, chunks of the queries]: first row and one past the last of each chunk's own keys, equal where these are absent."""
    start: Tensor
    """int32 [Hkv, last - first]: the first row of the keys of each of the window's chunks."""
    row: Tensor
    """int32 [room]: the first row of the chunk of each entry of the lists, which have those of the window alone."""
    window: tuple[int, int]
    counts: Tensor
    """int32 [tiles]: how many entries each list has with the chunks outside of the window."""
    whole: bool
    """As in `KeyBuffer`."""


def result_dtype(q: Tensor, keys: KeyPlaces | None) -> torch.dtype:
    """Of what is computed for q: float32 where results of other buffers are added to it."""
    return q.dtype if keys is None or keys.whole else torch.float32


def next_power_of_two(x: int) -> int:
    """The least power of two that is at least x, which is 1 or more."""
    return 1 << (x - 1).bit_length()


def check_supported(q: Tensor, num_kv_heads: int) -> None:
    """Refuse queries [..., Hq, D] that the kernels cannot take."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"q.dtype={q.dtype} must be torch.float16, torch.bfloat16 or torch.float32 for the Triton backend; "
            "cast q, k and v, or pass backend='reference'"
        )
    if q.shape[-1] > 256 or q.shape[-2] // num_kv_heads > 32:
        raise ValueError(
            f"q.shape={list(q.shape)} with {num_kv_heads} key/value heads must have at most 256 dimensions and 32 heads "
            "a group for the Triton backend; pass backend='reference'"
        )


def measure(
    q: Tensor, k: Tensor, chunk_size: int, num_documents: int | None, tile_rows: int, max_seqlen: int | None = None
) -> Sizes:  # fmt: skip
    """Derive all sizes from the shapes of q [B, N, Hq, D] and k [B, N, Hkv, D].

    `num_documents` is None if unpacked; else no document is longer than `max_seqlen` tokens, None: than all of them.
    """
    B, N, _, _ = q.shape
    chunks_of_row = -(-N // chunk_size)
    if num_documents is None:
        num_chunks, pairs = B * chunks_of_row, B * chunks_of_row * (chunks_of_row - 1) // 2
    else:
        # Documents that end inside a chunk open at most one chunk more each. One of n tokens has fewer than n / C + 1 chunks,
        # so at most n / C * (n / C + 1) / 2 pairs. A power of two keeps room the same while batches differ.
        longest = N if max_seqlen is None else min(N, next_power_of_two(max_seqlen))
        pairs = -(-N * (longest + chunk_size) // (2 * chunk_size**2))
        num_chunks = N // chunk_size + num_documents
    return size_tiles(B * N, q.shape[2:], k.shape[2], chunk_size, num_chunks, pairs, tile_rows)


def size_tiles(
    num_tokens: int, heads: Sequence[int], num_kv_heads: int, chunk_size: int, num_chunks: int, pairs: int, tile_rows: int
) -> Sizes:  # fmt: skip
    """Derive all sizes from the tokens of q, its heads [Hq, D], and its chunks with at most `pairs` past chunks in all."""
    (Hq, D), Hkv = heads, num_kv_heads
    padded_group = next_power_of_two(Hq // Hkv)
    tile_tokens = max(1, min(chunk_size, tile_rows // padded_group))
    # a product of at least 16 rows is what the tensor cores take; a chunk has at least 16 tokens
    tile_tokens = max(tile_tokens, 16 // padded_group)
    sizes = Sizes(
        num_tokens=num_tokens,
        num_heads=Hq,
        num_kv_heads=Hkv,
        head_dim=D,
        chunk_size=chunk_size,
        group=Hq // Hkv,
        padded_group=padded_group,
        tile_tokens=tile_tokens,
        num_chunks=num_chunks,
        list_bound=max(1, pairs * Hkv * (chunk_size // tile_tokens)),
    )
    if sizes.num_tiles > MAX_PROGRAMS:
        raise ValueError(
            f"q with {num_tokens} tokens and heads {[Hq, D]} makes {sizes.num_tiles} query tiles, which must be at most "
            f"{MAX_PROGRAMS}; split the batch"
        )
    return sizes


def chunk_table(sizes: Sizes, batch: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """First token, one past the last token, and first chunk of the document, of every chunk: int32 [3, chunks].

    Chunks beyond the last are empty: they start and end at the number of tokens.
    """
    C = sizes.chunk_size
    chunk = torch.arange(sizes.num_chunks, device=device)
    if cu_seqlens is None:
        N = sizes.num_tokens // batch
        per_row = -(-N // C)
        row = chunk // per_row
        first, start, stop = row * per_row, row * N + (chunk - row * per_row) * C, (row + 1) * N
        return torch.stack([start, torch.minimum(start + C, stop), first]).int()
    bounds = cu_seqlens.to(torch.int64)
    end_chunk = ((bounds.diff() + C - 1) // C).cumsum(0)
    document = torch.searchsorted(end_chunk, chunk, right=True)
    exists = document < len(end_chunk)
    document = document.clamp_max(len(end_chunk) - 1)
    first = torch.where(document > 0, end_chunk[document - 1], 0)
    start = bounds[document] + (chunk - first) * C
    end = torch.minimum(start + C, bounds[document + 1])
    start, end = (torch.where(exists, x, sizes.num_tokens) for x in (start, end))
    return torch.stack([start, end, torch.where(exists, first, chunk)]).int()


def _make_chunk_layout(
    sizes: Sizes, batch: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    chunks = chunk_table(sizes, batch, cu_seqlens, device)
    offsets = bounded_offsets(sizes, chunks)
    if cu_seqlens is not None and sizes.lists_are_bounded:
        # the last tile is of the last chunk; without this, kernels would write beyond the lists
        fits = offsets[-1] + (len(chunks[2]) - 1 - chunks[2, -1]) <= sizes.list_bound
        torch._assert_async(fits, "a document of cu_seqlens is longer than max_seqlen")
    return chunks, offsets


@lru_cache(maxsize=32)
def _unpacked_chunk_layout(sizes: Sizes, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _make_chunk_layout(sizes, batch, None, device)


def chunk_layout(
    sizes: Sizes, batch: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`chunk_table` and `bounded_offsets`, remembered by shapes or by `cu_seqlens`; the caller's own to keep."""
    if cu_seqlens is not None:
        key = "chunk layout", sizes, batch
        chunks, offsets = cached(
            cu_seqlens, key, lambda: _make_chunk_layout(sizes, batch, cu_seqlens, device)
        )
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # what a CUDA graph allocates dies with the graph
        return _make_chunk_layout(sizes, batch, None, device)
    else:
        chunks, offsets = _unpacked_chunk_layout(sizes, batch, device)
    return chunks.clone(), offsets.clone()


def bounded_offsets(sizes: Sizes, chunks: Tensor) -> Tensor:
    """Where every tile's list starts if each has room for all its past chunks: int64 [tiles]."""
    return list_offsets(sizes, torch.arange(sizes.num_chunks, device=chunks.device) - chunks[2])


def list_offsets(sizes: Sizes, past: Tensor) -> Tensor:
    """Where every tile's list starts, int64 [tiles], from the number of past chunks of each chunk, [chunks]."""
    room = past.repeat_interleave(sizes.tiles_per_chunk).repeat(sizes.num_kv_heads)
    return room.cumsum(0) - room


def own_places(keys: KeyPlaces | None, chunks: Tensor, sizes: Sizes) -> Tensor:
    """Where each chunk's own keys lie for every head, [2, Hkv, chunks]: with the queries unless `keys` says otherwise."""
    return chunks[:2, None].expand(-1, sizes.num_kv_heads, -1) if keys is None else keys.own
