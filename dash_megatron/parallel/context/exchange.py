"""Exchanges of context-parallel DashAttention: three ways that bring queries and the keys they selected together.

All are a `ContextExchange`, which `parallel/context/attention.py` calls when a rank's queries are routed:

- `AllGather`: keys and values of all ranks are gathered while the router works, and gathered again in the backward;
- `Ring` (`p2p`): keys and values travel from rank to rank, and partial results are merged through their log-sum-exp, so
  that a rank never holds more than two shards;
- `Sparse`: every rank asks the others for just those chunks that its queries selected.

The fourth, `a2a`, deals out heads instead and needs none of this: see `heads.py`.
`planning/traffic.py` counts the bytes of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.shards import (
    Attended,
    KeyBuffer,
    OutputGradient,
    Routed,
    RoutedQueries,
    Stages,
)
from dash_megatron.parallel.context.communication import (
    ContextGroup,
    PendingTensor,
    pack_bits,
    unpack_bits,
)
from dash_megatron.parallel.context.layout import ChunkLayout


class ExchangedGradients(NamedTuple):
    """Gradients of a rank's queries, keys and values."""

    q: Tensor
    """[n, Hq, D], as `AttentionGradients` has it."""
    keys: Callable[[], tuple[Tensor, Tensor]]
    """Waits for those of keys and values, which travel meanwhile; collective. Of each the shares [parts, n, Hkv, D] whose sum it is, in
    the dtype in which they came."""


class ContextExchange(ABC):
    """How a rank's queries get the keys and values that they selected from other ranks.

    An object serves one call of attention: its forward and, later, its backward. Autograd keeps it until then, so that it
    must not keep keys or values.

    Args:
        stages: computes attention.
        layout: where all chunks lie.
        group: the ranks that share the sequence.
    """

    def __init__(self, stages: Stages, layout: ChunkLayout, group: ContextGroup) -> None:
        self.stages, self.layout, self.group = stages, layout, group

    def start(self, k: Tensor, v: Tensor) -> None:  # noqa: B027  most have nothing to begin
        """Begin what need not wait for the router."""

    @abstractmethod
    def attend(self, queries: RoutedQueries, k: Tensor, v: Tensor) -> Attended:
        """Attend to all selected keys, of all ranks.

        Args:
            queries: this rank's.
            k, v: this rank's keys and values [n, Hkv, D].
        """

    @abstractmethod
    def attend_backward(
        self, gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor
    ) -> ExchangedGradients:
        """Gradients of this rank's q, k and v from those of all ranks' outputs; fills `gradient.d_prior`.

        The other arguments are those of `attend`.
        """


class AllGather(ContextExchange):
    """Keys and values of all ranks in one buffer, shard after shard."""

    _pending: tuple[PendingTensor, PendingTensor] | None = None

    def start(self, k: Tensor, v: Tensor) -> None:
        """Gather keys and values, each rank's padded to the rows of the largest."""
        rows = self.layout.places.max_rows
        self._pending = self.group.all_gather(padded(k, rows)), self.group.all_gather(padded(v, rows))

    def _buffer(self) -> tuple[Tensor, Tensor, KeyBuffer]:
        assert self._pending is not None, "start was called"
        k, v = (pending.wait().flatten(0, 1) for pending in self._pending)
        self._pending = None
        places = self.layout.places
        row = (places.owner * places.max_rows).int() + places.row
        return k, v, KeyBuffer(per_head(row, k), per_head(places.length, k), 0, len(row), whole=True)

    def attend(self, queries: RoutedQueries, k: Tensor, v: Tensor) -> Attended:
        """As `ContextExchange.attend`, after `start`."""
        return self.stages.attend(queries, *self._buffer())

    def attend_backward(
        self, gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor
    ) -> ExchangedGradients:
        """As `ContextExchange.attend_backward`."""
        if self._pending is None:
            self.start(k, v)
        found = self.stages.attend_backward(gradient, queries, *self._buffer())
        # rounded to the inputs' dtype
        pending = [
            self.group.send_shares(x.to(k.dtype).unflatten(0, (self.group.size, -1)))
            for x in (found.k, found.v)
        ]
        n = len(k)

        def arrive() -> tuple[Tensor, Tensor]:
            dk, dv = (x.wait()[:, :n] for x in pending)
            return dk, dv

        return ExchangedGradients(found.q, arrive)


class Ring(ContextExchange):
    """Keys and values of one rank after the other."""

    def _shards(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the rank whose keys and values are here, and these [2, rows, Hkv, D], while the next ones travel."""
        group = self.group
        buffer = torch.stack([padded(x, self.layout.places.max_rows) for x in (k, v)])
        for step in range(group.size):
            pending = group.shift(buffer) if step < group.size - 1 else None
            yield (group.rank - step) % group.size, buffer
            buffer = pending.wait() if pending is not None else buffer

    def _windows(self, owner: int, k: Tensor) -> list[KeyBuffer]:
        """Keys of one rank that this rank's queries may attend to, piece by piece."""
        places = self.layout.places
        row, length = per_head(places.row, k), per_head(places.length, k)
        return [KeyBuffer(row, length, *window) for window in self.layout.windows[owner]]

    def attend(self, queries: RoutedQueries, k: Tensor, v: Tensor) -> Attended:
        """As `ContextExchange.attend`."""
        result: Attended | None = None
        for owner, (k_shard, v_shard) in self._shards(k, v):
            for keys in self._windows(owner, k):
                part = self.stages.attend(queries, k_shard, v_shard, keys)
                result = part if result is None else merge(result, part)
                del part  # there is no room for it beside the next one
        assert result is not None, "a rank's own chunks are among its windows"
        return result

    def attend_backward(
        self, gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor
    ) -> ExchangedGradients:
        """As `ContextExchange.attend_backward`. Gradients of a shard's keys follow it around the ring, and last of all home."""
        group = self.group
        dq: Tensor | None = None
        own: Tensor | None = None
        away: PendingTensor | None = None
        for owner, (k_shard, v_shard) in self._shards(k, v):
            wide = torch.promote_types(k.dtype, torch.float32)
            d_shard = torch.zeros((2, *k_shard.shape), dtype=wide, device=k.device)
            for keys in self._windows(owner, k):
                part = self.stages.attend_backward(gradient, queries, k_shard, v_shard, keys)
                dq = part.q if dq is None else dq.add_(part.q)
                d_shard[0] += part.k
                d_shard[1] += part.v
                del part  # there is no room for it beside the next one
            if owner == group.rank:
                own = d_shard
            else:
                away = group.shift(d_shard if away is None else d_shard.add_(away.wait()))
        assert dq is not None
        home, coming, n = own, away, len(k)
        assert home is not None

        def arrive() -> tuple[Tensor, Tensor]:
            dk, dv = (home if coming is None else home + coming.wait())[:, None, :n]
            return dk, dv

        return ExchangedGradients(dq, arrive)


class Sparse(ContextExchange):
    """Only the chunks that were selected, each key/value head its own, after this rank's rows."""

    _wanted: Tensor
    """int64 [chunks that this rank asked for, 3]: peer, head, and number among the peer's chunks."""
    _served: Tensor
    """int64 [chunks that others asked for, 3]: peer, head, and number among this rank's chunks."""
    _counts: tuple[list[int], list[int], int]
    """Chunks served and wanted, of each peer, and the most wanted of a head."""

    def attend(self, queries: RoutedQueries, k: Tensor, v: Tensor) -> Attended:
        """As `ContextExchange.attend`."""
        self._ask(queries.routed)
        return self.stages.attend(queries, *self._fetch(k, v, queries.router.chunk_size))

    def attend_backward(
        self, gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor
    ) -> ExchangedGradients:
        """As `ContextExchange.attend_backward`."""
        (n, H, _), C = k.shape, queries.router.chunk_size
        dq, *d_kv = self.stages.attend_backward(gradient, queries, *self._fetch(k, v, C))
        rows, head = self._wanted_rows(n, H, C)
        send, receive, _ = self._counts
        returned = torch.stack([x[rows, head] for x in d_kv], dim=1).to(k.dtype)
        pending = self.group.all_to_all(returned, receive, send)
        d_own = torch.stack([x[:n] for x in d_kv])
        rows, head = self._served_rows(C)

        def arrive() -> tuple[Tensor, Tensor]:
            # peer by peer, which names no row twice: the order of the sum is the same every time
            for part, r, h in zip(*(x.split(send) for x in (pending.wait(), rows, head)), strict=True):
                d_own[:, r, h] += part.transpose(0, 1)
            return d_own[:1], d_own[1:]

        return ExchangedGradients(dq, arrive)

    def _ask(self, routed: Routed) -> None:
        """Tell every rank which of its chunks this one needs; waits for the device, which knows how many."""
        places, group = self.layout.places, self.group
        listed_Hc = self.stages.listed(routed, len(places.owner))
        H, P = listed_Hc.shape[0], group.size
        needed = torch.zeros(P, H, places.max_chunks, dtype=torch.bool, device=listed_Hc.device)
        needed[places.owner, :, places.local] = listed_Hc.mT
        needed[group.rank] = False
        asked = unpack_bits(group.all_to_all(pack_bits(needed.flatten(1))).wait(), H * places.max_chunks)
        # by peer, then head, then chunk; the peer's own list is in the same order
        self._wanted = needed.nonzero()
        self._served = asked.view_as(needed).nonzero()
        heads = needed.sum((0, 2)).amax()
        counts = torch.cat([needed.sum((1, 2)), asked.sum(1), heads[None]]).tolist()
        self._counts = counts[P : 2 * P], counts[:P], counts[-1]

    def _fetch(self, k: Tensor, v: Tensor, C: int) -> tuple[Tensor, Tensor, KeyBuffer]:
        """Own keys and values, and after them the chunks of size C that this rank asked for."""
        places = self.layout.places
        send, receive, most = self._counts
        rows, head = self._served_rows(C)
        pending = self.group.all_to_all(torch.stack([k[rows, head], v[rows, head]], dim=1), send, receive)
        n, H, D = k.shape
        buffer = k.new_zeros(2, n + most * C, H, D)
        buffer[0, :n], buffer[1, :n] = k, v
        rows, head = self._wanted_rows(n, H, C)
        buffer[:, rows, head] = pending.wait().transpose(0, 1)
        # chunks here are those this rank owns, for all heads, and those it asked for
        here = places.owner == self.group.rank
        row = per_head(torch.where(here, places.row, 0), k).clone()
        length = per_head(torch.where(here, places.length, 0), k).clone()
        peer, head_e, index = self._wanted.unbind(1)
        number = torch.empty(self.group.size, places.max_chunks, dtype=torch.int64, device=k.device)
        number[places.owner, places.local] = torch.arange(len(places.owner), device=k.device)
        row[head_e, number[peer, index]] = rows[:, 0].int()
        length[head_e, number[peer, index]] = C
        return buffer[0], buffer[1], KeyBuffer(row, length, 0, len(places.owner))

    def _served_rows(self, C: int) -> tuple[Tensor, Tensor]:
        """Row and head, [served, C], of every token of the chunks that others asked for."""
        _, head, index = self._served.unbind(1)
        row = self.layout.queries.start.long()[index]
        return row[:, None] + torch.arange(C, device=row.device), head[:, None]

    def _wanted_rows(self, n: int, H: int, C: int) -> tuple[Tensor, Tensor]:
        """Row in the buffer and head, [wanted, C], of every token of the chunks that this rank asked for."""
        head = self._wanted[:, 1]
        of_head = head[:, None] == torch.arange(H, device=head.device)
        slot = (of_head.cumsum(0) - 1).gather(1, head[:, None])
        return n + slot * C + torch.arange(C, device=head.device), head[:, None]


EXCHANGES: dict[str, type[ContextExchange]] = {"all_gather": AllGather, "p2p": Ring, "sparse": Sparse}


def padded(x: Tensor, rows: int) -> Tensor:
    """Rows [n, ...] as [rows, ...], zero beyond n."""
    if len(x) == rows:
        return x
    out = x.new_zeros(rows, *x.shape[1:])
    out[: len(x)] = x
    return out


def per_head(x: Tensor, k: Tensor) -> Tensor:
    """A table x [chunks], which all key/value heads of k share, as [Hkv, chunks]."""
    return x.expand(k.shape[1], -1)


def merge(one: Attended, other: Attended) -> Attended:
    """Attention to two sets of keys from attention to each."""
    both = torch.logaddexp2(one.lse, other.lse)
    # nothing was seen where both are -inf
    finite = both.masked_fill(both == -torch.inf, 0.0)
    weight, other_weight = (torch.exp2(x.lse - finite)[..., None].to(x.out.dtype) for x in (one, other))
    return Attended(weight * one.out + other_weight * other.out, both)
