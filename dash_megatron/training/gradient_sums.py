"""Sums of a step's gradients over processes, sent while the backward of its last micro-batch still makes others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

MIN_BUCKET_ELEMENTS = 2**27
"""Gradients that are added up over processes by one collective, at least, where a group has as many: 512 MiB."""


class Bf16Optimizer(Protocol):
    """What is read of DeepSpeed's optimizer for bf16 under ZeRO 1; parameters are numbered within their group."""

    bf16_groups: list[list[Tensor]]
    """The parameters of each group."""
    fp32_groups_gradients: list[list[Tensor]]
    """Each parameter's gradient of the step so far, float32: views of the group's buffer, in order."""
    fp32_groups_gradients_flat: list[Tensor]
    """The buffer of each group."""
    real_dp_process_group: list[dist.ProcessGroup]
    """For each group the processes that hold the same weights."""

    def add_gradients(self, places: Iterable[tuple[int, int]]) -> None:
        """Add `parameter.grad` of some parameters, each given by group and number, to the gradients of the step."""
        ...


class _Bucket(NamedTuple):
    """Neighbouring gradients of a group, which are added up over processes together."""

    group: int
    numbers: range
    """Numbers of the parameters."""
    gradients: Tensor
    """Their part of the group's buffer."""


class GradientSums:
    """Adds up a step's gradients over processes while the backward of its last micro-batch still makes others.

    A gradient joins those of earlier micro-batches as soon as it is made. Buckets are sent from the ends of the buffers on,
    because backward passes make the last parameters' gradients first; the order is the same on every process, in whatever
    order gradients come.
    """

    def __init__(self, optimizer: Bf16Optimizer) -> None:
        self._optimizer = optimizer
        self._buckets = [
            bucket
            for group in range(len(optimizer.bf16_groups))
            for bucket in _cut_into_buckets(group, optimizer)
        ]
        self._missing: list[set[int]] = []
        """Parameters of each bucket whose gradients are to come."""
        self._sent = 0
        self._work: list[dist.Work] = []
        self._active = False
        for place, bucket in enumerate(self._buckets):
            for number in bucket.numbers:
                take = functools.partial(self._take, place, number)
                optimizer.bf16_groups[bucket.group][number].register_post_accumulate_grad_hook(take)

    @contextlib.contextmanager
    def taking(self, last: bool) -> Iterator[None]:
        """Run the backward of a micro-batch within this; `last` says that it is the last one of its step."""
        self._active, self._sent = last, 0
        self._missing = [set(bucket.numbers) for bucket in self._buckets]
        try:
            yield
        finally:
            self._active = False

    def _take(self, place: int, number: int, parameter: Tensor) -> None:
        if not self._active:
            return
        group = self._buckets[place].group
        if place < self._sent:
            raise RuntimeError(f"parameter {number} of group {group} has a gradient after its sum was sent")
        self._optimizer.add_gradients([(group, number)])
        parameter.grad = None
        self._missing[place].discard(number)
        while self._sent < len(self._buckets) and not self._missing[self._sent]:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._sent]
        process_group = self._optimizer.real_dp_process_group[bucket.group]
        self._work.append(dist.all_reduce(bucket.gradients, group=process_group, async_op=True))
        self._sent += 1

    def finish(self) -> None:
        """Send what is left, and wait for all."""
        while self._sent < len(self._buckets):
            self._send_next()
        for work in self._work:
            work.wait()
        self._work = []


def _cut_into_buckets(group: int, optimizer: Bf16Optimizer) -> list[_Bucket]:
    """Cut a group's buffer into buckets, the last first; each but the one at its beginning has `MIN_BUCKET_ELEMENTS` or more."""
    sizes = [gradient.numel() for gradient in optimizer.fp32_groups_gradients[group]]
    buckets, end, stop = [], len(sizes), sum(sizes)
    start = stop
    for number in reversed(range(len(sizes))):
        start -= sizes[number]
        if stop - start >= MIN_BUCKET_ELEMENTS or not number:
            gradients = optimizer.fp32_groups_gradients_flat[group][start:stop]
            buckets.append(_Bucket(group, range(number, end), gradients))
            end, stop = number, start
    return buckets
