"""Context-parallel DashAttention: three ways to bring queries and the keys they selected together.

All ranks summarize their chunks, gather all summaries (1 / chunk_size of the keys) and route their own queries. Then

- `all_gather`: keys and values of all ranks are gathered while the router works, and gathered again in the backward;
- `p2p`: keys and values travel from rank to rank, and partial results are merged through their log-sum-exp, so that a
  rank never holds more than two shards;
- `sparse`: every rank asks the others for just those chunks that its queries selected.

(The fourth, `a2a`, deals out heads instead and needs none of this: see `layers/core_attention.py`.) `planning/traffic.py`
counts the bytes of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dash_megatron.ops.sharded import KeyBuffer
from dash_megatron.parallel.context.communication import Pending
from dash_megatron.parallel.context.sides import DashSide, Queries, Side, per_head


def padded_rows(k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Keys and values [n, Hkv, D] as one tensor [2, rows, Hkv, D], zero beyond n."""
    out = k.new_zeros(2, rows, *k.shape[1:])
    out[0, : len(k)], out[1, : len(v)] = k, v
    return out


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from attention to each: outputs [n, H, D] and base-2 log-sum-exps [n, H]."""
    both = torch.logaddexp2(lse, other_lse)
    # nothing was seen where both are -inf
    finite = both.masked_fill(both == -torch.inf, 0.0)
    weight, other_weight = (torch.exp2(x - finite)[..., None].to(out.dtype) for x in (lse, other_lse))
    return weight * out + other_weight * other_out, both


class AllGather:
    """Keys and values of all ranks in one buffer, shard behind shard."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._pending: Pending | None = None

    def start(self, k: Tensor, v: Tensor) -> None:
        """Begin what need not wait for the router."""
        self._pending = self.side.group.all_gather(padded_rows(k, v, self.side.max_rows))

    def _buffer(self) -> tuple[Tensor, Tensor, Any]:
        assert self._pending is not None, "start was called"
        k, v = (x.flatten(0, 1) for x in self._pending.wait().unbind(1))
        # autograd keeps this object, which must not keep all keys
        self._pending = None
        return k, v, self.side.all_keys(k)

    def attend(self, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [n, Hq, D] and base-2 log-sum-exp [n, Hq]."""
        return self.side.attend(queries, *self._buffer())

    def attend_backward(self, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, those of `queries.d_prior` in place."""
        self.start(k, v)
        dq, *d_kv = self.side.attend_backward(queries, *self._buffer())
        group = self.side.group
        shares = torch.stack([x.unflatten(0, (group.size, -1)) for x in d_kv], dim=1)
        dk, dv = group.sum_shares(shares.to(k.dtype))[:, : len(k)]
        return dq, dk, dv


class Ring:
    """Keys and values of one rank after the other."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def start(self, k: Tensor, v: Tensor) -> None:
        """Nothing: the ring turns as attention goes."""

    def _shards(self, k: Tensor, v: Tensor) -> Any:
        """Yield the rank whose keys and values are here, and these, while the next ones travel."""
        group = self.side.group
        buffer = padded_rows(k, v, self.side.max_rows)
        for step in range(group.size):
            pending = group.shift(buffer) if step < group.size - 1 else None
            yield (group.rank - step) % group.size, buffer
            buffer = pending.wait() if pending is not None else buffer

    def attend(self, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `AllGather.attend`."""
        result: tuple[Tensor, Tensor] | None = None
        for owner, (k_shard, v_shard) in self._shards(k, v):
            for keys in self.side.keys_of(owner, k):
                part = self.side.attend(queries, k_shard, v_shard, keys)
                result = part if result is None else merge(*result, *part)
        assert result is not None, "a rank's own chunks are among its windows"
        return result

    def attend_backward(self, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `AllGather.attend_backward`. Gradients of a shard's keys travel behind them, and last of all home."""
        group, dq = self.side.group, None
        own = away = None
        for owner, (k_shard, v_shard) in self._shards(k, v):
            wide = torch.promote_types(k.dtype, torch.float32)
            d_shard = torch.zeros((2, *k_shard.shape), dtype=wide, device=k.device)
            for keys in self.side.keys_of(owner, k):
                part, *d_kv = self.side.attend_backward(queries, k_shard, v_shard, keys)
                dq = part if dq is None else dq + part
                d_shard += torch.stack(d_kv)
            if owner == group.rank:
                own = d_shard
            else:
                away = group.shift(d_shard if away is None else d_shard + away.wait())
        assert dq is not None
        assert own is not None
        dk, dv = (own if away is None else own + away.wait())[:, : len(k)]
        return dq, dk, dv


class Sparse:
    """Only the chunks that were selected, each key/value head its own, behind this rank's rows."""

    def __init__(self, side: DashSide) -> None:
        self.side = side
        self._wanted: Tensor
        self._served: Tensor
        self._counts: tuple[list[int], list[int], int]

    def start(self, k: Tensor, v: Tensor) -> None:
        """Nothing: what to ask for is not known before the router has worked."""

    def _ask(self, queries: Queries) -> None:
        """Tell every rank which of its chunks this one needs; waits for the device, which knows how many."""
        s, places = self.side, self.side.chunks.places
        listed_Hc = s.stages.listed(queries.routed, len(places.owner))
        H, P = listed_Hc.shape[0], s.group.size
        needed = torch.zeros(P, H, places.max_chunks, dtype=torch.bool, device=listed_Hc.device)
        needed[places.owner, :, places.local] = listed_Hc.mT
        needed[s.group.rank] = False
        asked = unpack_bits(s.group.all_to_all(pack_bits(needed.flatten(1))).wait(), H * places.max_chunks)
        # by peer, then head, then chunk; the peer's own list is in the same order
        self._wanted = needed.nonzero()
        self._served = asked.view_as(needed).nonzero()
        heads = needed.sum((0, 2)).amax()
        receive, send, most = torch.split(
            torch.cat([needed.sum((1, 2)), asked.sum(1), heads[None]]), [P, P, 1]
        )
        self._counts = (send.tolist(), receive.tolist(), int(most))

    def _fetch(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KeyBuffer]:
        s, places, C = self.side, self.side.chunks.places, self.side.chunk_size
        send, receive, most = self._counts
        rows, head = self._served_rows()
        pending = s.group.all_to_all(torch.stack([k[rows, head], v[rows, head]], dim=1), send, receive)
        n, H, D = k.shape
        buffer = k.new_zeros(2, n + most * C, H, D)
        buffer[0, :n], buffer[1, :n] = k, v
        rows, head = self._wanted_rows(n, H)
        buffer[:, rows, head] = pending.wait().transpose(0, 1)
        # chunks here are those this rank owns, for all heads, and those it asked for
        here = places.owner == s.group.rank
        row = per_head(torch.where(here, places.row, 0), k).clone()
        length = per_head(torch.where(here, places.length, 0), k).clone()
        peer, head_e, index = self._wanted.unbind(1)
        number = torch.empty(s.group.size, places.max_chunks, dtype=torch.int64, device=k.device)
        number[places.owner, places.local] = torch.arange(len(places.owner), device=k.device)
        row[head_e, number[peer, index]] = rows[:, 0].int()
        length[head_e, number[peer, index]] = C
        return buffer[0], buffer[1], KeyBuffer(row, length, 0, len(places.owner))

    def _served_rows(self) -> tuple[Tensor, Tensor]:
        """Row and head, [served, C], of every token of the chunks that others asked for."""
        places, C, rank = self.side.chunks.places, self.side.chunk_size, self.side.group.rank
        own = (places.owner == rank).nonzero().flatten()
        row_of = torch.zeros(places.max_chunks, dtype=torch.int64, device=own.device)
        row_of[places.local[own]] = places.row[own].long()
        _, head, index = self._served.unbind(1)
        return row_of[index][:, None] + torch.arange(C, device=own.device), head[:, None]

    def _wanted_rows(self, n: int, H: int) -> tuple[Tensor, Tensor]:
        """The same in the buffer, of the chunks that this rank asked for."""
        head = self._wanted[:, 1]
        of_head = torch.nn.functional.one_hot(head, H)
        slot = (of_head.cumsum(0) - 1).gather(1, head[:, None])
        C = self.side.chunk_size
        return n + slot * C + torch.arange(C, device=head.device), head[:, None]

    def attend(self, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `AllGather.attend`."""
        self._ask(queries)
        return self.side.attend(queries, *self._fetch(k, v))

    def attend_backward(self, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `AllGather.attend_backward`."""
        (n, H, _), group = k.shape, self.side.group
        dq, *d_kv = self.side.attend_backward(queries, *self._fetch(k, v))
        rows, head = self._wanted_rows(n, H)
        send, receive, _ = self._counts
        returned = torch.stack([x[rows, head] for x in d_kv], dim=1).to(k.dtype)
        received = group.all_to_all(returned, receive, send).wait()
        d_own = torch.stack([x[:n] for x in d_kv])
        rows, head = self._served_rows()
        # peer by peer, which names no row twice: the order of the sum is the same every time
        for part, r, h in zip(*(x.split(send) for x in (received, rows, head)), strict=True):
            d_own[:, r, h] += part.transpose(0, 1)
        return dq, *d_own


EXCHANGES: dict[str, Any] = {"all_gather": AllGather, "p2p": Ring, "sparse": Sparse}


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [rows, n] as bytes [rows, ceil(n / 8)]."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits * (1 << torch.arange(8, device=bits.device))).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The reverse of `pack_bits`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :n].bool()


def _send_summaries(summary: Tensor, s: DashSide) -> Pending:
    """Begin to gather this rank's summaries [Hkv, own chunks, D] with everybody's."""
    H, c, D = summary.shape
    padded = summary.new_zeros(H, s.chunks.places.max_chunks, D)
    padded[:, :c] = summary
    return s.group.all_gather(padded)


def _all_summaries(pending: Pending, s: DashSide) -> Tensor:
    """Summaries of all chunks [Hkv, chunks, D]."""
    places = s.chunks.places
    return pending.wait()[places.owner, :, places.local].transpose(0, 1).contiguous()


def _return_summaries(d_summary: Tensor, num_chunks: int, s: DashSide) -> Tensor:
    """Sum over ranks of the gradient [Hkv, chunks, D] of the summaries that this rank made."""
    places = s.chunks.places
    H, _, D = d_summary.shape
    shares = d_summary.new_zeros(s.group.size, H, places.max_chunks, D)
    shares[places.owner, :, places.local] = d_summary.transpose(0, 1)
    return s.group.sum_shares(shares)[:, :num_chunks]


class _ShardedDash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        head_scaling: Tensor | None,
        side: DashSide,
        exchange: Any,
    ) -> tuple[Tensor, Tensor]:
        stages, chunks, C = side.stages, side.chunks.queries, side.chunk_size
        with side.group.counting("forward"):
            pending = _send_summaries(stages.summarize(k, w, chunks.start, chunks.end, C), side)
            # behind the summaries, which the router waits for
            exchange.start(k, v)
            summary = _all_summaries(pending, side)
            routed = stages.route(q, summary, chunks, side.router, C, head_scaling)
            out, lse = exchange.attend(Queries(q, routed), k, v)
        out = out.to(q.dtype)
        # nothing of size stays on ctx itself, where activation checkpointing would not find it
        ctx.save_for_backward(q, k, v, w, head_scaling, out, lse, summary, *routed)
        ctx.side, ctx.exchange, ctx.routed_type = side, exchange, type(routed)
        ctx.mark_non_differentiable(routed.selected)
        return out, routed.selected

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Any) -> Any:
        q, k, v, w, head_scaling, out, lse, summary, *routed = ctx.saved_tensors
        routed = ctx.routed_type(*routed)
        side, d_out = ctx.side, d_out.contiguous()
        stages, chunks, C = side.stages, side.chunks.queries, side.chunk_size
        with side.group.counting("backward"):
            d_prior = stages.new_d_prior(routed)
            queries = Queries(q, routed, d_out, out, lse, d_prior)
            dq, dk, dv = ctx.exchange.attend_backward(queries, k, v)
            dq_router, d_summary, d_scaling = stages.route_backward(
                routed, d_prior, q, summary, chunks, side.router, C, head_scaling
            )
            d_own = _return_summaries(d_summary, len(chunks.start), side)
            dk_summary, dw = stages.summarize_backward(d_own, k, w, chunks.start, chunks.end, C)
        gradients = dq + dq_router, dk + dk_summary, dv, dw
        if head_scaling is not None:
            d_scaling = d_scaling.to(head_scaling.dtype)
        return *(g.to(x.dtype) for g, x in zip(gradients, (q, k, v, w), strict=True)), d_scaling, None, None


def sharded_dash_attention(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, side: DashSide, exchange: str, head_scaling: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """DashAttention of this rank's aligned rows, differentiable; collective.

    Args:
        q: [n, Hq, D], rows of `side.chunks.queries`.
        k, v: [n, Hkv, D].
        w: summary query [Hkv, D]; its gradient is this rank's part.
        side: see `DashSide`.
        exchange: "all_gather", "p2p" or "sparse".
        head_scaling: multiplies the router's scaling factor, for each key/value head [Hkv]; its gradient is this rank's
            part.

    Returns:
        Output [n, Hq, D] in q's dtype, and the number of chunks selected, the own one included, int32 [n, Hkv].
    """
    return _ShardedDash.apply(
        q, k.contiguous(), v.contiguous(), w, head_scaling, side, EXCHANGES[exchange](side)
    )
