"""What the kernels of a profiled step were: milliseconds by class, and shares of it in which some or none ran."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

# the first that fits, in a name in small letters
CLASSES = (
    ("communication", r"^nccl|^gloo:"),
    ("attention", r"sdpa|fmha|flash|cudnn::fusion"),
    ("matmul", r"gemm|nvjet|cutlass|sm90_xmma|splitk"),
    ("loss", r"loss|cross_entropy|softmax"),
    ("optimizer", r"adam|fusedopti|normtwo|multi_tensor_apply|^triton_.*mul_sqrt_sub"),
    ("norm", r"layer_?norm|rms_?norm|gammabeta|^_norm"),
    ("elementwise", r"^triton_|silu|swiglu|rope"),
    # what is left of kernels whose names are those of functions in Triton
    ("attention", r"^\w+$"),
    ("copy", r"memcpy|copy|catarray|memset|fillfunctor"),
    ("elementwise", r"elementwise|reduce_kernel"),
)
"""What a kernel does, by its name: Triton's own are `_name_kernel`, what torch compiles is `triton_...`, torch's own are C++."""

Spans = list[tuple[float, float]]


class StepKernels(NamedTuple):
    """Kernels of one step of one GPU; on a CPU, which has none, only what the collectives took."""

    communication: float
    """Share of the step in which collectives ran."""
    waited_for: float
    """Share in which nothing else ran meanwhile."""
    idle: float | None
    """Share in which no kernel ran."""
    milliseconds: dict[str, float]
    """By class, largest first; kernels that ran at the same time count each."""


def class_of(name: str) -> str:
    """The class of a kernel: communication, attention, matmul, loss, optimizer, norm, copy, elementwise or other."""
    low = name.lower()
    return next((found for found, pattern in CLASSES if re.search(pattern, low)), "other")


def step_kernels(profile: torch.profiler.profile, cuda: bool) -> StepKernels:
    """What ran in a profiled step, from its first kernel to its last."""
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    sent: Spans = []
    others: Spans = []
    milliseconds: collections.Counter[str] = collections.Counter()
    for event in profile.events() or ():
        # ranges of the host are shown on the device's track too
        if event.device_type != kind or (cuda and _is_of_host(event)):
            continue
        named = class_of(event.name)
        (sent if named == "communication" else others).append((event.time_range.start, event.time_range.end))
        milliseconds[named] += event.time_range.elapsed_us() / 1e3
    if not cuda:
        others, milliseconds = [], collections.Counter(communication=milliseconds["communication"])
    step = length([*sent, *others], whole=True)
    idle = 1 - length([*sent, *others]) / step if cuda and step else None
    return StepKernels(*shares_of_step(sent, others, step), idle, dict(milliseconds.most_common()))


def _is_of_host(event: Any) -> bool:
    named = event.name.startswith(("Optimizer.", "ProfilerStep"))
    return named or getattr(event, "is_user_annotation", False)


def shares_of_step(sent: Spans, others: Spans, step: float) -> tuple[float, float]:
    """Shares of a step in which something was sent, and in which nothing else ran meanwhile.

    Args:
        sent, others: first and last moment of kernels that communicate, and of all others.
        step: length of the step, in the same unit.
    """
    alone = length([*sent, *others]) - length(others)
    return (length(sent) / step, alone / step) if step else (0.0, 0.0)


def length(spans: Iterable[tuple[float, float]], whole: bool = False) -> float:
    """Of the union of spans, or from the first moment to the last."""
    total, first, last = 0.0, None, float("-inf")
    for begin, end in sorted(spans):
        first = begin if first is None else first
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return last - first if whole and first is not None else total
