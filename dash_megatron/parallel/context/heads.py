"""The exchange of tokens for heads (`a2a`): all heads of some tokens become all tokens of some heads, and back.

Tokens travel by pieces of the zigzag split, straight to and from their places in the sequence: the heads of a rank are
copied once, when rows of all heads are cut or joined. One piece is copied while the one before it travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dash_megatron.parallel.context.communication import ContextGroup, differentiable_transfer
from dash_megatron.parallel.context.layout import pieces_of


def heads_for_rows(group: ContextGroup, *rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [N / P, H, D] of all heads for all rows [N, H / P, D], in order, of this rank's heads; differentiable."""
    return differentiable_transfer(rows, partial(_cut, group), partial(_join, group), group)


def rows_for_heads(group: ContextGroup, tokens: Tensor) -> Tensor:
    """The reverse of `heads_for_rows`, of one tensor."""
    return differentiable_transfer([tokens], partial(_join, group), partial(_cut, group), group)[0]


def _cut(group: ContextGroup, rows: Sequence[Tensor]) -> list[Tensor]:
    """All tokens of this rank's heads from rows of all heads."""
    peers = [rank for rank in range(group.size) if rank != group.rank]
    filled, pending, own = [], [], []
    for x in rows:
        n, H, D = x.shape
        tokens = x.new_empty(group.size * n, H // group.size, D)
        places = tokens.chunk(2 * group.size)
        for number, half in enumerate(_by_rank(x.contiguous(), group.size)):
            place = [places[pieces_of(rank, group.size)[number]] for rank in range(group.size)]
            sent = [(rank, _copy(half[rank], torch.empty_like(place[rank]))) for rank in peers]
            pending.append(group.trade(sent, [(rank, place[rank]) for rank in peers]))
            own.append((half[group.rank], place[group.rank]))
        filled.append(tokens)
    # what is sent is on its way
    for part, place_of_own in own:
        _copy(part, place_of_own)
    for trade in pending:
        trade.wait()
    return filled


def _join(group: ContextGroup, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Rows of all heads from all tokens of this rank's heads."""
    peers = [rank for rank in range(group.size) if rank != group.rank]
    joined, pending, own = [], [], []
    for x in tokens:
        N, heads, D = x.shape
        rows = x.new_empty(N // group.size, heads * group.size, D)
        pieces = x.contiguous().chunk(2 * group.size)
        for number, half in enumerate(_by_rank(rows, group.size)):
            piece = [pieces[pieces_of(rank, group.size)[number]] for rank in range(group.size)]
            received = [(rank, torch.empty_like(piece[rank])) for rank in peers]
            trade = group.trade([(rank, piece[rank]) for rank in peers], received)
            pending.append((trade, [(part, half[rank]) for rank, part in received]))
            own.append((piece[group.rank], half[group.rank]))
        joined.append(rows)
    for part, place in own:
        _copy(part, place)
    for trade, arrived in pending:
        trade.wait()
        for part, place in arrived:
            _copy(part, place)
    return joined


def _by_rank(rows: Tensor, size: int) -> list[list[Tensor]]:
    """Of each half of rows [n, H, D] the heads of every rank, views [n / 2, H / P, D]."""
    return [list(half.unflatten(1, (size, -1)).unbind(1)) for half in rows.chunk(2)]


def _copy(part: Tensor, place: Tensor) -> Tensor:
    """Fill a place [rows, heads, D], 8 bytes at a time where a head has so many: rows of it have gaps between them."""
    if part.shape[-1] * part.element_size() % 8 == 0:
        place.view(torch.int64).copy_(part.view(torch.int64))
    else:
        place.copy_(part)
    return place
