"""Clocks: CUDA events and CUDA graphs on a GPU, the wall clock elsewhere; and torch's dense attention to compare with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Replays of a graph that are timed.
REPLAYS = 30

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_backends(device: torch.device) -> dict[str, SDPBackend]:
    """Kinds of dense attention that torch has for the device, fastest first as a rule."""
    if device.type == "cuda":
        return {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {"math": SDPBackend.MATH}


def wait(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by the wall clock."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def milliseconds(function: Callable[[], object], device: torch.device, budget_ms: float = 250.0) -> float:
    """Median time of a call by CUDA events, after one call that compiles and one that tells how often to repeat.

    On a device other than a GPU, the time of one call.
    """
    if device.type != "cuda":
        return 1e3 * seconds_of(function, device)
    function()
    repeats = max(3, min(20, int(budget_ms / max(_by_events(function), 1e-3))))
    return statistics.median(_by_events(function) for _ in range(repeats))


def _by_events(function: Callable[[], object]) -> float:
    """Milliseconds of one call on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graph_microseconds(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Median time of one of the calls, all in one CUDA graph; `before` runs ahead of every replay and is not timed.

    On a device other than a GPU, one run of the calls without a graph.
    """
    if device.type != "cuda":
        before()
        return 1e6 * seconds_of(lambda: [call() for call in calls], device) / len(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        before()
        for call in calls:
            call()
    stream.synchronize()
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        before()
        times.append(_by_events(graph.replay))
    return 1e3 * statistics.median(times[3:]) / len(calls)


def dense_decoders(device: torch.device) -> dict[str, Attention]:
    """Ways to attend densely with q [B, Hq, D] to k and v [B, N, Hkv, D]; some may not run everywhere."""

    def with_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def group_as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.unflatten(1, (k.shape[2], -1))
        return F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2)).flatten(1, 2)

    def on(backend: SDPBackend, way: Attention) -> Attention:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return way(q, k, v)

        return call

    ways = {"": with_gqa, ", group as rows": group_as_rows}
    return {
        f"{b}{w}": on(backend, way)
        for b, backend in dense_backends(device).items()
        for w, way in ways.items()
    }
