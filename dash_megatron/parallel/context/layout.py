"""How one packed sequence is split over context-parallel ranks, and where its chunks lie; plain host arithmetic.

A sequence of N tokens is cut into 2P equal pieces; rank r holds pieces r and 2P - 1 - r (zigzag), so that causal work
is the same for all. The rows of a rank are those of its two pieces, concatenated. DashAttention needs whole chunks, and with
packed documents a chunk may straddle the border of two pieces: for the time of attention its tail moves to the rank that
holds its head, at most chunk_size - 1 tokens a border. Pieces with borders moved so, and their rows, are called aligned.
Where the router sees the mean of several queries, it also needs the last queries before each piece: the piece's halo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dash_megatron.ops.shards import QueryChunks


class Moves(NamedTuple):
    """Rows that change ranks: what this rank sends, and where what it then has comes from."""

    send: Tensor
    """int64: own rows to send, by receiving rank."""
    send_counts: tuple[int, ...]
    """Of each rank."""
    receive_counts: tuple[int, ...]
    """Of each rank."""
    gather: Tensor
    """int64: every new row's place among the old rows followed by the received ones."""


class Alignment(NamedTuple):
    """How rows move to whole chunks, and back."""

    to_chunks: Moves
    """From rows to aligned rows."""
    to_rows: Moves
    """From aligned rows to rows."""


class QueryHalo(NamedTuple):
    """The queries before a rank's two aligned pieces that belong to means of queries inside them."""

    send: Tensor
    """int64: own aligned rows whose queries other pieces need, by receiving rank."""
    send_counts: tuple[int, ...]
    """Of each rank."""
    receive_counts: tuple[int, ...]
    """Of each rank."""
    order: Tensor
    """int64: place among the received of every query before the first piece, and then before the second."""
    sizes: tuple[int, int, int, int]
    """Queries before the first piece and in it, before the second and in it."""
    position: Tensor
    """int32: of every one of these, one after the other, how many just before it are of its document."""


class ChunkPlaces(NamedTuple):
    """Where all chunks of the sequence lie; the same on every rank."""

    owner: Tensor
    """int64 [chunks]: rank that holds the chunk."""
    local: Tensor
    """int64 [chunks]: its number among that rank's chunks."""
    row: Tensor
    """int32 [chunks]: its first row among that rank's rows."""
    length: Tensor
    """int32 [chunks]: its tokens."""
    max_chunks: int
    """Most chunks of a rank."""
    max_rows: int
    """Most aligned rows of a rank."""


class ChunkLayout(NamedTuple):
    """One rank's chunks, and everybody's."""

    queries: QueryChunks
    """Chunks of the aligned rows."""
    places: ChunkPlaces
    windows: tuple[tuple[tuple[int, int], ...], ...]
    """Per rank: its runs of chunks, first and one past the last, that queries of this rank may attend to."""
    alignment: Alignment | None
    """How this rank's rows are aligned; None where every border is aligned anyway."""
    halo: QueryHalo | None
    """Queries of other pieces that the router needs; None where it sees single queries."""


@dataclass(frozen=True)
class ContextShard:
    """One rank's share of a packed sequence."""

    rank: int
    size: int
    num_tokens: int
    """Of the whole sequence."""
    cu_seqlens: Tensor
    """int32 [documents + 1]: documents of the whole sequence."""
    token: Tensor
    """int64 [N / P]: number in the whole sequence of each row."""
    chunks: ChunkLayout | None = None
    """None where no layer routes."""

    @property
    def rows(self) -> int:
        """Tokens of this rank, before they are aligned."""
        return self.num_tokens // self.size

    def map(self, function: Callable[[Tensor], Tensor]) -> ContextShard:
        """Apply a function to every tensor."""
        cu_seqlens, token = function(self.cu_seqlens), function(self.token)
        chunks = _map_tensors(self.chunks, function)
        return dataclasses.replace(self, cu_seqlens=cu_seqlens, token=token, chunks=chunks)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A tuple, named or not, with a function applied to every tensor in it, however deep; anything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, tuple):
        return value
    parts = [_map_tensors(part, function) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """The two pieces of the zigzag split that a rank holds, in the order of its rows."""
    return rank, 2 * size - 1 - rank


def piece_owner(piece: int, size: int) -> int:
    """The rank that holds a piece of the zigzag split."""
    return min(pieces_of(piece, size))


def zigzag_tokens(num_tokens: int, rank: int, size: int) -> Tensor:
    """Numbers int64 [num_tokens / size] of the tokens that a rank holds, in the order of its rows."""
    if num_tokens % (2 * size):
        raise ValueError(
            f"num_tokens={num_tokens} must be a multiple of {2 * size}, twice the context-parallel size; "
            f"try {max(1, num_tokens // (2 * size)) * 2 * size}"
        )
    pieces = torch.arange(num_tokens).view(2 * size, -1)
    return torch.cat([pieces[piece] for piece in pieces_of(rank, size)])


def shard_sequence(
    cu_seqlens: Tensor, rank: int, size: int, chunk_size: int | None, query_pool: int = 1
) -> ContextShard:
    """Work out which tokens of a packed sequence a context-parallel rank holds, and where all chunks lie.

    Args:
        cu_seqlens: int32 [documents + 1] on the host: where the documents of the sequence start, and N.
        rank: the rank's number among those that share the sequence.
        size: how many ranks share the sequence.
        chunk_size: of DashAttention; None where no layer routes.
        query_pool: of DashAttention: queries whose mean the router sees.

    Raises:
        ValueError: N is not a multiple of 2 * size * chunk_size.
    """
    bounds = cu_seqlens.numpy().astype(np.int64)
    num_tokens = int(bounds[-1])
    unit = 2 * size * (chunk_size or 1)
    if num_tokens % unit:
        raise ValueError(
            f"a sequence of {num_tokens} tokens must be a multiple of {unit} = 2 x context {size} x chunk "
            f"{chunk_size or 1}; change data.seq_length"
        )
    shard = ContextShard(
        rank=rank,
        size=size,
        num_tokens=num_tokens,
        cu_seqlens=cu_seqlens,
        token=zigzag_tokens(num_tokens, rank, size),
    )
    if chunk_size is None:
        return shard
    return dataclasses.replace(shard, chunks=_lay_out(bounds, rank, size, chunk_size, query_pool))


def _lay_out(bounds: np.ndarray, rank: int, size: int, chunk_size: int, query_pool: int) -> ChunkLayout:
    """The layout of all chunks of documents that start at `bounds`; the last bound is the number of tokens."""
    start, end, first = _chunks(bounds, chunk_size)
    borders = np.arange(2 * size + 1) * (int(bounds[-1]) // (2 * size))
    # a chunk belongs to the piece that its first token is in: number of each piece's first chunk, and its first token
    pieces = np.searchsorted(start, borders)
    aligned = np.append(start, bounds[-1])[pieces]

    places = _places(start, end, pieces, aligned, size)
    mine = np.concatenate([np.arange(pieces[p], pieces[p + 1]) for p in pieces_of(rank, size)])
    row, length = places.row[mine], places.length[mine]
    queries = QueryChunks(
        start=row,
        end=row + length,
        number=_int32(mine),
        first=_int32(first[mine]),
        num_chunks=len(start),
        list_bound=int((mine - first[mine]).sum()),
    )
    reached = [((mine >= pieces[p]) & (first[mine] < pieces[p + 1])).any() for p in range(2 * size)]
    windows = tuple(
        tuple((int(pieces[p]), int(pieces[p + 1])) for p in pieces_of(peer, size) if reached[p])
        for peer in range(size)
    )
    alignment = None
    if (aligned != borders).any():
        alignment = Alignment(_moves(borders, aligned, rank, size), _moves(aligned, borders, rank, size))
    halo = _halo(bounds, aligned, rank, size, query_pool) if query_pool > 1 else None
    return ChunkLayout(queries, places, windows, alignment, halo)


def _chunks(bounds: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token, one past the last, and number of the first chunk of the document, of every chunk."""
    chunks_of = -(-np.diff(bounds) // chunk_size)
    first = np.repeat(np.cumsum(chunks_of) - chunks_of, chunks_of)
    start = np.repeat(bounds[:-1], chunks_of) + (np.arange(len(first)) - first) * chunk_size
    return start, np.append(start[1:], bounds[-1]), first


def _places(
    start: np.ndarray, end: np.ndarray, pieces: np.ndarray, aligned: np.ndarray, size: int
) -> ChunkPlaces:
    """Where chunks lie, from their first and last tokens and from the first chunk and token of every piece."""
    owner = np.array([piece_owner(piece, size) for piece in range(2 * size)])
    num_rows, num_chunks = np.diff(aligned), np.diff(pieces)
    # a rank's second piece follows its first
    second = np.arange(2 * size) >= size
    rows_before = np.where(second, num_rows[owner], 0)
    chunks_before = np.where(second, num_chunks[owner], 0)
    piece = np.repeat(np.arange(2 * size), num_chunks)
    return ChunkPlaces(
        owner=torch.from_numpy(owner[piece]),
        local=torch.from_numpy(np.arange(len(start)) - pieces[piece] + chunks_before[piece]),
        row=_int32(start - aligned[piece] + rows_before[piece]),
        length=_int32(end - start),
        max_chunks=int(np.bincount(owner, num_chunks, size).max()),
        max_rows=int(np.bincount(owner, num_rows, size).max()),
    )


def _int32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int32))


def _moves(old: np.ndarray, new: np.ndarray, rank: int, size: int) -> Moves:
    """What a rank sends and receives when the borders of the pieces change from `old` to `new`."""

    def tokens_of(borders: np.ndarray, owner: int) -> np.ndarray:
        return np.concatenate([np.arange(borders[p], borders[p + 1]) for p in pieces_of(owner, size)])

    # tokens between an old border and the new one, by the ranks they leave and enter
    sent: dict[tuple[int, int], list[np.ndarray]] = {}
    for piece in range(1, 2 * size):
        low, high = sorted((int(old[piece]), int(new[piece])))
        before, after = piece_owner(piece - 1, size), piece_owner(piece, size)
        source, target = (after, before) if new[piece] > old[piece] else (before, after)
        if high > low and source != target:
            sent.setdefault((source, target), []).append(np.arange(low, high))
    nothing = [np.arange(0)]
    outgoing = [np.concatenate(sent.get((rank, peer), nothing)) for peer in range(size)]
    incoming = [np.concatenate(sent.get((peer, rank), nothing)) for peer in range(size)]
    mine = tokens_of(old, rank)
    have = np.concatenate([mine, *incoming])
    order = np.argsort(have, kind="stable")
    row_of = np.argsort(mine, kind="stable")
    return Moves(
        send=torch.from_numpy(row_of[np.searchsorted(mine[row_of], np.concatenate(outgoing))]),
        send_counts=tuple(len(part) for part in outgoing),
        receive_counts=tuple(len(part) for part in incoming),
        gather=torch.from_numpy(order[np.searchsorted(have[order], tokens_of(new, rank))]),
    )


def _halo(bounds: np.ndarray, aligned: np.ndarray, rank: int, size: int, query_pool: int) -> QueryHalo:
    """What a rank sends and receives so that every query has the `query_pool` - 1 before it in its document."""
    document = np.searchsorted(bounds, aligned, side="right") - 1
    first = np.maximum(bounds[document], aligned - (query_pool - 1))

    def tokens_before(owner: int) -> np.ndarray:
        return np.concatenate([np.arange(first[p], aligned[p]) for p in pieces_of(owner, size)])

    def owners(tokens: np.ndarray) -> np.ndarray:
        piece = np.searchsorted(aligned, tokens, side="right") - 1
        return np.minimum(piece, 2 * size - 1 - piece)

    one, other = pieces_of(rank, size)
    needed = [tokens_before(peer) for peer in range(size)]
    outgoing = [tokens[owners(tokens) == rank] for tokens in needed]
    sent = np.concatenate(outgoing)
    rows = np.where(
        sent < aligned[one + 1], sent - aligned[one], sent - aligned[other] + np.diff(aligned)[one]
    )
    source = owners(needed[rank])

    def positions(piece: int) -> np.ndarray:
        tokens = np.arange(first[piece], aligned[piece + 1])
        begin = bounds[np.searchsorted(bounds, tokens, side="right") - 1]
        return tokens - np.maximum(begin, first[piece])

    return QueryHalo(
        send=torch.from_numpy(rows),
        send_counts=tuple(len(part) for part in outgoing),
        receive_counts=tuple(np.bincount(source, minlength=size).tolist()),
        order=torch.from_numpy(np.argsort(np.argsort(source, kind="stable"))),
        sizes=(
            int(aligned[one] - first[one]), int(np.diff(aligned)[one]),
            int(aligned[other] - first[other]), int(np.diff(aligned)[other]),
        ),
        position=_int32(np.concatenate([positions(one), positions(other)])),
    )  # fmt: skip
