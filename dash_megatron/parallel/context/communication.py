"""Communication between context-parallel ranks: asynchronous, counted, over NCCL or gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.parallel.context.layout import Moves

Transfer = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class PendingTensor:
    """A tensor that is on its way.

    Args:
        result: what is being filled.
        work: what fills it.
        device: where it is wanted, if not where it arrives.
    """

    def __init__(
        self, result: Tensor, work: Sequence[dist.Work | None], device: torch.device | None = None
    ) -> None:
        self._result, self._work, self._device = result, work, device

    def wait(self) -> Tensor:
        """The tensor, once it has arrived."""
        for work in self._work:
            if work is not None:
                work.wait()
        self._work = ()
        return self._result if self._device is None else self._result.to(self._device)


class PendingTrade:
    """Tensors that others are filling.

    Args:
        work: what fills them.
        sent: kept until they have been sent.
        arrived: pairs of where tensors arrive and where they are wanted, if elsewhere.
    """

    def __init__(
        self, work: Sequence[dist.Work], sent: Sequence[Tensor], arrived: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._work, self._sent, self._arrived = work, sent, arrived

    def wait(self) -> None:
        """Return once they are filled."""
        for work in self._work:
            work.wait()
        for x, wanted in self._arrived:
            wanted.copy_(x)
        self._work, self._sent, self._arrived = (), (), ()


class ContextGroup:
    """The ranks that share a sequence.

    Args:
        group: their process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = {"forward": 0, "backward": 0}
        """Bytes that left this rank, in forward and backward passes."""
        self.counts = True
        """Whether to count; validation does not."""
        self._phase = "forward"

    def take_bytes(self) -> tuple[int, int]:
        """Bytes sent in forward and backward passes since the last call."""
        sent = self.bytes_sent["forward"], self.bytes_sent["backward"]
        self.bytes_sent = dict.fromkeys(self.bytes_sent, 0)
        return sent

    @contextlib.contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Count what is sent meanwhile as "forward" or "backward"."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def all_gather(self, x: Tensor) -> PendingTensor:
        """Every rank's x [...], of the same shape everywhere: [P, ...]."""
        x, device = self._stage(x)
        out = x.new_empty(self.size, *x.shape)
        work = dist.all_gather_into_tensor(out.view(-1), x.view(-1), self.group, async_op=True)
        self._count((self.size - 1) * x.nbytes)
        return PendingTensor(out, [work], device)

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int] | None = None, receive_counts: Sequence[int] | None = None
    ) -> PendingTensor:
        """Give every rank its rows of x [rows, ...]: equal shares, or `send_counts` of them; [received rows, ...]."""
        x, device = self._stage(x)
        if send_counts is None or receive_counts is None:
            out, own_rows = torch.empty_like(x), x.shape[0] // self.size
        else:
            out, own_rows = x.new_empty(sum(receive_counts), *x.shape[1:]), send_counts[self.rank]
        receive, send = (None if c is None else list(c) for c in (receive_counts, send_counts))
        work = dist.all_to_all_single(out, x, receive, send, self.group, async_op=True)
        self._count((x.shape[0] - own_rows) * x[:1].nbytes)
        return PendingTensor(out, [work], device)

    def shift(self, x: Tensor) -> PendingTensor:
        """Send x to the next rank and receive as much from the one before."""
        x, device = self._stage(x)
        out = torch.empty_like(x)
        after, before = ((self.rank + step) % self.size for step in (1, -1))
        return PendingTensor(out, self._send_and_receive([(after, x)], [(before, out)]), device)

    def trade(
        self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
    ) -> PendingTrade:
        """Send tensors to ranks, and fill those of others; all are contiguous, and each rank's in the order of its peer's."""
        leaving, arriving = ([(rank, self._stage(x)[0]) for rank, x in each] for each in (sent, received))
        work = self._send_and_receive(leaving, arriving)
        arrived = [
            (x, wanted) for (_, x), (_, wanted) in zip(arriving, received, strict=True) if x is not wanted
        ]
        return PendingTrade(work, [x for _, x in leaving], arrived)

    def _send_and_receive(
        self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
    ) -> list[dist.Work]:
        """Begin to send tensors to ranks and to fill those of others, all where the group has the means to."""
        self._count(sum(x.nbytes for _, x in sent))
        return dist.batch_isend_irecv(
            [
                dist.P2POp(kind, x, dist.get_global_rank(self.group, rank), self.group)
                for kind, tensors in ((dist.isend, sent), (dist.irecv, received))
                for rank, x in tensors
            ]
        )

    def send_shares(self, shares: Tensor) -> PendingTensor:
        """Send shares [P, ...] to their ranks: what `sum_of_shares` takes."""
        return self.all_to_all(shares.contiguous())

    def move(self, x: Tensor, moves: Moves) -> Tensor:
        """Redistribute rows x [rows, ...]."""
        received = self.all_to_all(x[moves.send], moves.send_counts, moves.receive_counts).wait()
        return torch.cat([x, received])[moves.gather]

    def _stage(self, x: Tensor) -> tuple[Tensor, torch.device | None]:
        """Contiguous, and on the host where the group has no means to send from the device."""
        if x.is_cuda and "nccl" not in str(dist.get_backend_config(self.group)):
            return x.contiguous().cpu(), x.device
        return x.contiguous(), None

    def _count(self, num_bytes: int) -> None:
        if self.counts:
            self.bytes_sent[self._phase] += num_bytes


def sum_of_shares(pending: PendingTensor) -> Tensor:
    """Of all ranks' shares [P, ...] the sum [...], in float32 or wider, once they have come."""
    received = pending.wait()
    return received.sum(0, dtype=torch.promote_types(received.dtype, torch.float32))


def rounded_sum(shares: Tensor) -> Tensor:
    """The sum [...] of shares [P, ...] in their dtype, rounded once."""
    # one share needs no copy; of two an addition is rounded once too, and takes a third of the time
    return sum(shares[1:], shares[0]) if len(shares) <= 2 else shares.sum(0)


class _DifferentiableTransfer(torch.autograd.Function):
    """An exchange of rows, and in the backward pass its reverse for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, transfer: Transfer, reverse: Transfer, group: ContextGroup, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.reverse, ctx.group = reverse, group
        with group.counting("forward"):
            return tuple(transfer(rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.group.counting("backward"):
            return None, None, None, *ctx.reverse(gradients)


def differentiable_transfer(
    rows: Sequence[Tensor], transfer: Transfer, reverse: Transfer, group: ContextGroup
) -> tuple[Tensor, ...]:
    """`transfer(rows)`, counted and differentiable: `reverse` makes the gradients of rows from those of the result."""
    moved: tuple[Tensor, ...] = _DifferentiableTransfer.apply(transfer, reverse, group, *rows)
    return moved


def move_rows(x: Tensor, moves: Moves, reverse: Moves, group: ContextGroup) -> Tensor:
    """`ContextGroup.move`, differentiable: gradients go back by `reverse`."""
    there, back = (partial(_move_all, group, each) for each in (moves, reverse))
    return differentiable_transfer([x], there, back, group)[0]


def _move_all(group: ContextGroup, moves: Moves, rows: Sequence[Tensor]) -> list[Tensor]:
    return [group.move(x, moves) for x in rows]


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [rows, n] as bytes [rows, ceil(n / 8)]."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits * (1 << torch.arange(8, device=bits.device))).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The reverse of `pack_bits`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :n].bool()
