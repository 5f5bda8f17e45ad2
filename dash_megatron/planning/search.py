"""The layout that a config asks for, and all that it could have on a number of GPUs, ranked by throughput."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from dash_megatron.config import Config
from dash_megatron.data.vocabulary import vocabulary_rows
from dash_megatron.planning.layout import Hardware, Layout, Recompute, with_layout
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.planning.step_time import StepEstimate, estimate_step
from dash_megatron.planning.traffic import ContextComm

EXCHANGES: tuple[ContextComm, ...] = ("all_gather", "p2p", "a2a", "sparse")
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "attention", "full")


def configured_layout(config: Config, gpus: int) -> Layout:
    """The layout a config asks for.

    Raises:
        ValueError: the number of GPUs does not divide by tensor x context.
    """
    parallel = config.parallel
    return Layout(
        tensor=parallel.tensor,
        context=parallel.context,
        data=config.data_parallel_size(gpus),
        zero_stage=config.zero.stage,
        context_comm=parallel.context_comm if parallel.context > 1 else "all_gather",
        recompute=config.training.recompute,
        sequence=parallel.sequence,
    )


def estimate_configured(
    config: Config, gpus: int, routing: AssumedRouting | None = None, hardware: Hardware | None = None
) -> StepEstimate:
    """The step of the layout a config asks for, whether or not it fits into memory.

    Raises:
        ValueError: it breaks a rule on this number of GPUs.
    """
    layout = configured_layout(config, gpus)
    with_layout(config, layout)
    return estimate_step(config, layout, vocabulary_rows(config), routing, hardware)


def candidates(config: Config, gpus: int, hardware: Hardware) -> Iterator[Layout]:
    """Layouts that break no rule: powers of two for tensor (inside a node) and context, the rest data parallel."""
    sizes = [2**power for power in range(gpus.bit_length())]
    for tensor, context in product([size for size in sizes if size <= hardware.gpus_per_node], sizes):
        if gpus % (tensor * context):
            continue
        exchanges = EXCHANGES if context > 1 else EXCHANGES[:1]
        for stage, kind, sequence in product((1, 2, 3), exchanges, (False, True)):
            if sequence and tensor == 1:
                continue
            layout = Layout(tensor, context, gpus // (tensor * context), stage, kind, "none", sequence)
            with contextlib.suppress(ValueError):
                with_layout(config, layout)
                # no rule asks what is recomputed
                yield from (replace(layout, recompute=recompute) for recompute in RECOMPUTE)


def search(
    config: Config, gpus: int, routing: AssumedRouting | None = None, hardware: Hardware | None = None
) -> list[StepEstimate]:
    """Every layout that breaks no rule and fits into memory, most tokens/s per GPU first; ties go to less memory.

    Raises:
        ValueError: nothing fits, with the nearest miss, or no layout keeps the rules.
    """
    hardware = hardware or Hardware()
    if gpus < 1:
        raise ValueError(f"--gpus {gpus} must be at least 1")
    vocab_size = vocabulary_rows(config)
    estimates = [
        estimate_step(config, layout, vocab_size, routing, hardware)
        for layout in candidates(config, gpus, hardware)
    ]
    if not estimates:
        per_pass, batch = config.training.micro_batch * gpus, config.training.global_batch
        raise ValueError(
            f"--gpus {gpus}: no tensor x context x data split keeps the rules with training.global_batch={batch}, "
            f"data.seq_length={config.data.seq_length} and model.kv_heads="
            f"{config.model.kv_heads}; try training.global_batch={max(per_pass, batch // per_pass * per_pass)}, or another "
            "number of GPUs"
        )
    fitting = [estimate for estimate in estimates if estimate.memory.total <= hardware.budget_bytes]
    if not fitting:
        least = min(estimates, key=lambda estimate: estimate.memory.total)
        raise ValueError(
            f"--gpus {gpus}: nothing fits: the leanest layout needs {least.memory.total / 2**30:.0f} GiB a GPU, and "
            f"{hardware.budget_bytes / 2**30:.0f} of {hardware.memory_gib:.0f} GiB may be used; take more GPUs or "
            "a shorter data.seq_length"
        )
    return sorted(fitting, key=lambda estimate: (-estimate.tokens_per_second_per_gpu, estimate.memory.total))
