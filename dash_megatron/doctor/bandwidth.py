"""The bandwidth check: how fast the process groups of a run's layout communicate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.doctor.runner import Figure, Finding
from dash_megatron.doctor.session import Session
from dash_megatron.parallel import context_parallel_group, gradient_group, tensor_group

# of one process, in float32
BYTES_ON_GPU = 256 << 20
BYTES_ON_CPU = 4 << 20
_WARM_UP, _REPEATS = 2, 5


class _Case(NamedTuple):
    name: str
    communicate: Callable[[], Any]
    sent: float
    """Bytes that each process must send for the communication."""
    is_right: Callable[[], Tensor]


def check_bandwidth(session: Session) -> Finding:
    """Measure bytes per second that each process sends in every kind of communication, and check the values received.

    Rates are of the bytes that the best algorithm needs, so that they compare with the network's: 2 (n - 1) / n of the
    buffer for a sum over n processes, half of that to gather or to sum into shares, the buffer for a neighbour.
    """
    figures: dict[str, Figure] = {}
    wrong = []
    with session.model_groups(session.config.parallel):
        groups = {
            "data x context": gradient_group(),
            "context": context_parallel_group(),
            "tensor": tensor_group(),
        }
        shared = {label: group for label, group in groups.items() if dist.get_world_size(group) > 1}
        for label, group in shared.items():
            for case in _cases(label, group, session.device):
                seconds = _time(case.communicate, group, session.device)
                figures[f"{label} {case.name} GB/s"] = case.sent / seconds / 1e9
                if not case.is_right():
                    wrong.append(f"{label} {case.name} gave wrong values")
    if wrong:
        return Finding(
            "failed", figures, f"{'; '.join(wrong)}: take this machine out and have its network checked"
        )
    if not figures:
        return Finding("skipped", {}, "one process communicates with nobody")
    return Finding(figures=figures)


def _cases(label: str, group: dist.ProcessGroup, device: torch.device) -> Iterator[_Case]:
    """The communication that a kind of group does in training."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    count = (BYTES_ON_GPU if device.type == "cuda" else BYTES_ON_CPU) // 4 // n * n
    mine = torch.full((count,), float(rank + 1), device=device)
    out = torch.zeros_like(mine)
    share, total, num_bytes = count // n, n * (n + 1) / 2, float(mine.nbytes)
    part = (n - 1) / n * num_bytes
    if label != "context":
        yield _Case(
            "all_reduce",
            lambda: dist.all_reduce(out.copy_(mine), group=group),
            2 * part,
            lambda: (out == total).all(),
        )
    if label == "data x context":
        every = torch.arange(1.0, n + 1, device=device)[:, None]
        yield _Case(
            "all_gather",
            lambda: dist.all_gather_into_tensor(out, mine[:share], group=group),
            part,
            lambda: (out.view(n, -1) == every).all(),
        )
        yield _Case(
            "reduce_scatter",
            lambda: dist.reduce_scatter_tensor(out[:share], mine, group=group),
            part,
            lambda: (out[:share] == total).all(),
        )
    if label != "tensor":
        yield _Case(
            "to next rank",
            lambda: _shift(mine, out, group),
            num_bytes,
            lambda: (out == (rank - 1) % n + 1).all(),
        )


def _shift(send: Tensor, receive: Tensor, group: dist.ProcessGroup) -> None:
    """Send a tensor to the next rank of the group, and receive the one of the rank before."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (rank + step) % n) for step in (1, -1))
    operations = [
        dist.P2POp(dist.isend, send, after, group),
        dist.P2POp(dist.irecv, receive, before, group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _time(communicate: Callable[[], Any], group: dist.ProcessGroup, device: torch.device) -> float:
    """Mean seconds of one communication, measured from when all processes of the group are ready."""
    for _ in range(_WARM_UP):
        communicate()
    one = torch.ones(1, device=device)
    dist.all_reduce(one, group=group)
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        communicate()
    _wait_for(device)
    return (time.perf_counter() - started) / _REPEATS


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
