"""How one packed sequence is split over context-parallel ranks, and where its chunks lie; plain host arithmetic.

A sequence of N tokens is cut into 2P equal pieces; rank r holds pieces r and 2P - 1 - r (zigzag), so that causal work
is the same for all. DashAttention wants whole chunks, and with packed documents a chunk may straddle the border of two
pieces: its tail moves to the rank that holds its head for the time of attention, at most chunk_size - 1 tokens a border.
Pieces with borders moved so are called aligned. A rank's rows are those of its two pieces, concatenated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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

    def map(self, function: Callable[[Tensor], Tensor]) -> Moves:
        """Apply a function to every tensor."""
        return self._replace(send=function(self.send), gather=function(self.gather))


class Alignment(NamedTuple):
    """How rows move to whole chunks and home again."""

    there: Moves
    """From rows to aligned rows."""
    back: Moves
    """From aligned rows to rows."""


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
    counts: tuple[int, ...]
    """Chunks of each rank."""
    max_chunks: int
    """Most chunks of a rank."""
    max_rows: int
    """Most aligned rows of a rank."""
    pieces: tuple[int, ...]
    """Number of the first chunk of each of the 2P aligned pieces, and the number of chunks."""

    def map(self, function: Callable[[Tensor], Tensor]) -> ChunkPlaces:
        """Apply a function to every tensor."""
        owner, local, row, length = (function(x) for x in self[:4])
        return self._replace(owner=owner, local=local, row=row, length=length)


class ChunkLayout(NamedTuple):
    """One rank's chunks, and everybody's."""

    queries: QueryChunks
    """Chunks of the aligned rows."""
    places: ChunkPlaces
    windows: tuple[tuple[tuple[int, int], ...], ...]
    """Per rank: its runs of chunks, first and one past the last, that queries of this rank may attend to."""
    alignment: Alignment | None
    """How this rank's rows are aligned; None where every border is aligned anyway."""

    def map(self, function: Callable[[Tensor], Tensor]) -> ChunkLayout:
        """Apply a function to every tensor."""
        alignment = self.alignment
        if alignment is not None:
            alignment = Alignment(*(moves.map(function) for moves in alignment))
        queries, places = self.queries.map(function), self.places.map(function)
        return self._replace(queries=queries, places=places, alignment=alignment)


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
        """Tokens of this rank."""
        return self.num_tokens // self.size

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ContextShard:
        """Copy all tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ContextShard:
        """Copy all tensors to page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> ContextShard:
        chunks = None if self.chunks is None else self.chunks.map(function)
        cu_seqlens, token = function(self.cu_seqlens), function(self.token)
        return dataclasses.replace(self, cu_seqlens=cu_seqlens, token=token, chunks=chunks)


def piece_owner(piece: int, size: int) -> int:
    """Rank that holds a piece of the zigzag split."""
    return piece if piece < size else 2 * size - 1 - piece


def zigzag_tokens(num_tokens: int, rank: int, size: int) -> Tensor:
    """Numbers int64 [num_tokens / size] of the tokens that a rank holds, in the order of its rows."""
    if num_tokens % (2 * size):
        raise ValueError(
            f"num_tokens={num_tokens} must be a multiple of {2 * size}, twice the context-parallel size; "
            f"try {max(1, num_tokens // (2 * size)) * 2 * size}"
        )
    pieces = torch.arange(num_tokens).view(2 * size, -1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def from_ranks_to_sequence(rows_of_ranks: Tensor) -> Tensor:
    """Rows of all ranks [P, N / P, ...], none aligned, in the order of the sequence [N, ...]."""
    size, rows = rows_of_ranks.shape[:2]
    pieces = rows_of_ranks.view(size, 2, rows // 2, *rows_of_ranks.shape[2:])
    return torch.cat([pieces[:, 0], pieces[:, 1].flip(0)]).flatten(0, 1)


def from_sequence_to_ranks(sequence: Tensor, size: int) -> Tensor:
    """The reverse of `from_ranks_to_sequence`."""
    pieces = sequence.view(2 * size, -1, *sequence.shape[1:])
    return torch.stack([pieces[:size], pieces[size:].flip(0)], dim=1).flatten(1, 2)


def shard_sequence(cu_seqlens: Tensor, rank: int, size: int, chunk_size: int | None) -> ContextShard:
    """Work out a rank's share.

    Args:
        cu_seqlens: int32 [documents + 1] on the host: where the documents of the sequence start, and N.
        rank, size: among the context-parallel ranks.
        chunk_size: of DashAttention; None where no layer routes.

    Raises:
        ValueError: N is no multiple of 2 * size * chunk_size.
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
    return dataclasses.replace(shard, chunks=_lay_out(bounds, rank, size, chunk_size))


def _lay_out(bounds: np.ndarray, rank: int, size: int, chunk_size: int) -> ChunkLayout:
    lengths = np.diff(bounds)
    chunks_of = -(-lengths // chunk_size)
    end_of = np.cumsum(chunks_of)
    first = np.repeat(end_of - chunks_of, chunks_of)
    start = np.repeat(bounds[:-1], chunks_of) + (np.arange(len(first)) - first) * chunk_size
    end = np.append(start[1:], bounds[-1])

    borders = np.arange(2 * size + 1) * (int(bounds[-1]) // (2 * size))
    pieces = np.searchsorted(start, borders)
    aligned = np.append(start, bounds[-1])[pieces]
    owner_of_piece = np.array([piece_owner(piece, size) for piece in range(2 * size)])
    piece = np.repeat(np.arange(2 * size), np.diff(pieces))
    # a rank's second piece follows its first
    lead_rows, lead_chunks = np.diff(aligned), np.diff(pieces)
    rows_before = np.where(np.arange(2 * size) < size, 0, lead_rows[owner_of_piece])
    chunks_before = np.where(np.arange(2 * size) < size, 0, lead_chunks[owner_of_piece])
    row = start - aligned[piece] + rows_before[piece]
    local = np.arange(len(start)) - pieces[piece] + chunks_before[piece]
    counts = np.bincount(owner_of_piece, lead_chunks, size).astype(int)
    rows = np.bincount(owner_of_piece, lead_rows, size).astype(int)

    mine = np.concatenate([np.arange(pieces[p], pieces[p + 1]) for p in (rank, 2 * size - 1 - rank)])
    int32 = lambda x: torch.from_numpy(x.astype(np.int32))  # noqa: E731
    queries = QueryChunks(
        start=int32(row[mine]),
        end=int32(row[mine] + end[mine] - start[mine]),
        number=int32(mine),
        first=int32(first[mine]),
        num_chunks=len(start),
        list_bound=int((mine - first[mine]).sum()),
    )
    places = ChunkPlaces(
        owner=torch.from_numpy(owner_of_piece[piece]),
        local=torch.from_numpy(local),
        row=int32(row),
        length=int32(end - start),
        counts=tuple(counts.tolist()),
        max_chunks=int(counts.max()),
        max_rows=int(rows.max()),
        pieces=tuple(pieces.tolist()),
    )
    reached = [((mine >= pieces[p]) & (first[mine] < pieces[p + 1])).any() for p in range(2 * size)]
    windows = tuple(
        tuple((int(pieces[p]), int(pieces[p + 1])) for p in (peer, 2 * size - 1 - peer) if reached[p])
        for peer in range(size)
    )
    alignment = None
    if (aligned != borders).any():
        alignment = Alignment(_moves(borders, aligned, rank, size), _moves(aligned, borders, rank, size))
    return ChunkLayout(queries, places, windows, alignment)


def _moves(old: np.ndarray, new: np.ndarray, rank: int, size: int) -> Moves:
    """What a rank sends and receives when the borders of the pieces change from `old` to `new`."""

    def tokens_of(borders: np.ndarray, owner: int) -> np.ndarray:
        return np.concatenate([np.arange(borders[p], borders[p + 1]) for p in (owner, 2 * size - 1 - owner)])

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
