"""The exchange of tokens for heads (`a2a`): all heads of some tokens become all tokens of some heads, and back.

A layer makes its rows rank by rank, those of its own heads last: heads of other ranks travel while the next ones are projected.
On the way back its own heads are used first, while those of other ranks come. In the backward it is the same, the other way
round. Tokens travel by pieces of the zigzag split, straight to and from their places in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dash_megatron.parallel.context.communication import ContextGroup, PendingTrade
from dash_megatron.parallel.context.layout import pieces_of


def heads_for_rows(group: ContextGroup, rows_of: Callable[[int], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """All tokens [N, heads, D] of this rank's heads, in order; differentiable, collective.

    Args:
        group: the ranks.
        rows_of: makes this rank's rows [N / P, heads, D] of a rank's heads, of each tensor that travels; as many heads for every rank.
    """
    exchange = _Exchange(group)
    steps = range(1, group.size)
    sent = [_SendRows.apply(exchange, step, *rows_of(exchange.ranks(step)[0])) for step in steps]
    tokens: tuple[Tensor, ...] = _TakeTokens.apply(exchange, *sent, *rows_of(group.rank))
    return tokens


def rows_for_heads(group: ContextGroup, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The reverse of `heads_for_rows`, of one tensor: yield ranks and the rows of their heads, this rank's first, then as they come."""
    exchange = _Exchange(group)
    own, *sent = _SendTokens.apply(exchange, tokens)
    yield group.rank, own
    for step, ticket in enumerate(sent, 1):
        yield exchange.ranks(step)[0], _TakeRows.apply(exchange, step, ticket)


def heads_for_whole_rows(group: ContextGroup, *rows: Tensor) -> tuple[Tensor, ...]:
    """`heads_for_rows` of rows [N / P, P * heads, D] that are there with all heads."""
    # not by an index, whose gradient is a copy between zeros
    parts = [x.chunk(group.size, dim=1) for x in rows]
    return heads_for_rows(group, lambda rank: [part[rank] for part in parts])


def whole_rows_for_heads(group: ContextGroup, tokens: Tensor) -> Tensor:
    """`rows_for_heads`, all heads side by side."""
    rows = dict(rows_for_heads(group, tokens))
    return torch.cat([rows[rank] for rank in range(group.size)], dim=1)


class _Exchange:
    """One exchange of several tensors, in steps of one peer to send to and one to receive from.

    In a step rows go to the rank that is so many after this one, and come from the one as many before; tokens go the other way.
    """

    def __init__(self, group: ContextGroup) -> None:
        self.group = group
        self._tokens: list[Tensor] = []
        self._pending: dict[int, tuple[PendingTrade, list[Tensor]]] = {}

    def ranks(self, step: int) -> tuple[int, int]:
        """Whose heads this rank's rows are of, and whose rows are of this rank's heads."""
        return (self.group.rank + step) % self.group.size, (self.group.rank - step) % self.group.size

    def send_rows(self, step: int, rows: Sequence[Tensor], phase: str) -> None:
        """Begin to send rows [N / P, heads, D], and to fill the places of others in tokens that `all_tokens` returns."""
        self._tokens = self._tokens or [x.new_empty(self.group.size * len(x), *x.shape[1:]) for x in rows]
        to, source = self.ranks(step)
        whole = [x if x.is_contiguous() else _copy(x, x.new_empty(x.shape)) for x in rows]
        sent = [(to, half) for x in whole for half in x.chunk(2)]
        received = [(source, piece) for tokens in self._tokens for piece in self._pieces(tokens, source)]
        with self.group.counting(phase):
            self._pending[step] = self.group.trade(sent, received), []

    def all_tokens(self, own: Sequence[Tensor]) -> list[Tensor]:
        """All tokens [N, heads, D], once all have come; `own` are this rank's rows of its heads."""
        tokens, self._tokens = self._tokens, []
        for x, rows in zip(tokens, own, strict=True):
            for place, half in zip(self._pieces(x, self.group.rank), rows.chunk(2), strict=True):
                _copy(half, place)
        for step in range(1, self.group.size):
            self.rows(step)
        return tokens

    def send_tokens(self, step: int, tokens: Sequence[Tensor], phase: str) -> None:
        """Begin to send a rank its tokens, and to fill the rows that `rows` returns."""
        to, source = self.ranks(step)
        rows = [x.new_empty(len(x) // self.group.size, *x.shape[1:]) for x in tokens]
        sent = [(source, piece) for x in tokens for piece in self._pieces(x.contiguous(), source)]
        received = [(to, half) for x in rows for half in x.chunk(2)]
        with self.group.counting(phase):
            self._pending[step] = self.group.trade(sent, received), rows

    def own_rows(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """This rank's rows of its own heads."""
        return [torch.cat(self._pieces(x, self.group.rank)) for x in tokens]

    def rows(self, step: int) -> list[Tensor]:
        """What a step has brought, once it is here."""
        trade, rows = self._pending.pop(step)
        trade.wait()
        return rows

    def _pieces(self, tokens: Tensor, rank: int) -> list[Tensor]:
        pieces = tokens.chunk(2 * self.group.size)
        return [pieces[number] for number in pieces_of(rank, self.group.size)]


def _copy(part: Tensor, place: Tensor) -> Tensor:
    """Fill a place [rows, heads, D], 8 bytes at a time where a head has so many: rows may have gaps between them."""
    if part.shape[-1] * part.element_size() % 8 == 0:
        place.view(torch.int64).copy_(part.view(torch.int64))
    else:
        place.copy_(part)
    return place


# Each of these pairs is the other's backward: `_SendRows` and `_TakeTokens`, `_SendTokens` and `_TakeRows`. What was sent in one
# and is taken in the other has an empty tensor for autograd to follow.


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, step: int, *rows: Tensor) -> Tensor:
        ctx.exchange, ctx.step = exchange, step
        exchange.send_rows(step, rows, "forward")
        return rows[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.exchange.rows(ctx.step)


class _TakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *sent_and_own: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.all_tokens(sent_and_own[exchange.group.size - 1 :]))

    @staticmethod
    def backward(ctx: Any, *d_tokens: Tensor) -> tuple[Tensor | None, ...]:
        exchange, steps = ctx.exchange, range(1, ctx.exchange.group.size)
        # those whose rows were sent last are differentiated first
        for step in reversed(steps):
            exchange.send_tokens(step, d_tokens, "backward")
        return None, *(d_tokens[0].new_empty(0) for _ in steps), *exchange.own_rows(d_tokens)


class _SendTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, tokens: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        steps = range(1, exchange.group.size)
        for step in steps:
            exchange.send_tokens(step, [tokens], "forward")
        return *exchange.own_rows([tokens]), *(tokens.new_empty(0) for _ in steps)

    @staticmethod
    def backward(ctx: Any, d_own: Tensor, *_: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, *ctx.exchange.all_tokens([d_own])


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, step: int, sent: Tensor) -> Tensor:
        ctx.exchange, ctx.step = exchange, step
        (rows,) = exchange.rows(step)
        return rows

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[override]
        ctx.exchange.send_rows(ctx.step, [d_rows], "backward")
        return None, None, d_rows.new_empty(0)
