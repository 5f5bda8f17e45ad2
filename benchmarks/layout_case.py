"""One process of a case of `benchmarks/layouts.py`, which starts it with the file of the case: time its steps, and profile one."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.given import models_like
from benchmarks.inputs import device_name
from benchmarks.kernels import StepKernels, step_kernels
from benchmarks.layouts import Case
from benchmarks.step import NO_TOKEN, with_choices
from benchmarks.timing import seconds_of
from dash_megatron.config import Config
from dash_megatron.config.flops import peak_flops, training_flops_per_token
from dash_megatron.data.batches import PackedBatch, pack_samples
from dash_megatron.data.vocabulary import vocabulary_rows
from dash_megatron.layers import build_model, init_weights, routing_means, take_context_bytes
from dash_megatron.parallel import (
    context_rank,
    data_rank,
    destroy_process_groups,
    init_process_groups,
    read_launch,
)
from dash_megatron.training.engine import Engine
from dash_megatron.training.loss import global_target_tokens, share_of_global_mean

WARM_UP = 2
# a process that hangs says where before it is killed; so long before, no further step begins
LAST_WORDS_SECONDS = 15


def run_case(file: Path) -> None:
    """Time the case that a file describes, as one process of its run; rank 0 writes what was found beside the file."""
    begin = time.monotonic()
    case = Case(**json.loads(file.read_text()))
    end = begin + case.limit - LAST_WORDS_SECONDS
    faulthandler.dump_traceback_later(max(1.0, end - begin))
    config, launched = case.load(), read_launch(os.environ)
    device = init_process_groups(launched, config.parallel, timeout_minutes=case.limit / 60)
    if device.type != "cuda" and not case.tiny:
        raise ValueError(
            "there is no GPU; add --tiny to time two narrow layers on 256 tokens, which any device does"
        )
    found = _measure(case, config, device, end)
    if dist.get_rank() == 0:
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(found))
        unfinished.rename(file.with_suffix(".result"))
    faulthandler.cancel_dump_traceback_later()
    destroy_process_groups()


def _measure(case: Case, config: Config, device: torch.device, end: float) -> dict[str, Any]:
    cuda, vocab_size = device.type == "cuda", vocabulary_rows(config)
    model = build_model(config, vocab_size, device)
    init_weights(model, config.training.seed, config.model.init_std)
    engine = Engine(model, config, config.data_parallel_size(case.gpus) * config.parallel.context)
    batches = [batch.to(device) for batch in _batches(case, config, vocab_size)]
    targets = global_target_tokens(batches, device)
    losses: list[float] = []
    # weights stay, so that every layout has the same loss
    engine.set_lr(0.0)

    def step() -> None:
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = share_of_global_mean(engine.forward, batch, targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / config.parallel.tensor)

    with contextlib.ExitStack() as stack:
        held = 0
        if config.attention.kind == "dash" and case.routing != "own":
            names = models_like(config.attention.chunk_size, config.attention.local_chunks)
            name = names[0] if case.routing == "trained" else case.routing
            given = stack.enter_context(with_choices(engine, config, name))
            with torch.no_grad():
                # choices are made while no activations are kept: that takes much memory
                share_of_global_mean(engine.forward, batches[0], targets)
            held = given.num_bytes
            take_context_bytes(engine.model)  # of no step
        seconds = _time_steps(step, case.steps, device, end)
        memory = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else 0.0
        sent = take_context_bytes(engine.model).get(0, (0, 0))
        kernels = _profile(step, case.trace, device)
    chunks, density = _routing(engine)
    flops = training_flops_per_token(config, vocab_size, (config.data.seq_length + 1) / 2, chunks or None)
    median, peak = statistics.median(seconds[WARM_UP:] or seconds[-1:]), peak_flops(device_name(device))
    tokens = config.training.global_batch * config.data.seq_length / case.gpus
    measured: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "density": density,
        "seconds": median,
        "all_seconds": seconds,
        "mfu": flops * tokens / median / peak if peak else None,
        "memory_gib": _largest(memory, device) if cuda else None,
        "context_bytes_per_layer_and_step": [number / len(seconds) for number in sent],
        "loss": losses[0],
        "grad_norm": engine.grad_norm(),
    }
    return measured | (kernels._asdict() if kernels else {})


def _batches(case: Case, config: Config, vocab_size: int) -> list[PackedBatch]:
    """This rank's micro-batches of a step of random tokens, the same in every layout."""
    ranks, rows = config.data_parallel_size(case.gpus), config.training.micro_batch
    attention, batches = config.attention, []
    for index in range(config.accumulation_steps(case.gpus)):
        generator = torch.Generator().manual_seed(index * ranks + data_rank())
        tokens = torch.randint(vocab_size, (rows, config.data.seq_length + 1), generator=generator)
        batch = pack_samples([{"tokens": row[:-1], "labels": row[1:]} for row in tokens], eod=NO_TOKEN)
        chunk_size = attention.chunk_size if attention.kind == "dash" else None
        batches.append(batch.shard(context_rank(), config.parallel.context, chunk_size, attention.query_pool))
    return batches


def _largest(value: float, device: torch.device) -> float:
    """The largest of all processes' values; collective."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def _time_steps(step: Callable[[], None], steps: int, device: torch.device, end: float) -> list[float]:
    """Seconds of every step, those to warm up first; fewer than asked for where the time is up, but two."""
    seconds: list[float] = []
    late = 0.0
    while len(seconds) < WARM_UP or (len(seconds) < WARM_UP + steps and not late):
        dist.barrier()
        seconds.append(seconds_of(step, device))
        if len(seconds) == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # one more and the one that is profiled
        late = _largest(time.monotonic() + 3 * seconds[-1] > end, device)
    return seconds


def _routing(engine: Engine) -> tuple[dict[int, float], float]:
    """Chunks selected in each layer, and the density, of all processes; none and 1 with full attention; collective."""
    means = routing_means(engine.model)
    if not means:
        return {}, 1.0
    both = torch.stack([torch.stack([x.chunks_selected, x.chunks_available]) for x in means.values()]).float()
    dist.all_reduce(both)
    both /= dist.get_world_size()
    return dict(zip(means, both[:, 0].tolist(), strict=True)), (both[:, 0] / both[:, 1]).mean().item()


def _profile(step: Callable[[], None], trace: str | None, device: torch.device) -> StepKernels | None:
    """What ran in one step of rank 0; None of other ranks; collective."""
    if dist.get_rank():
        step()
        return None
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA] if cuda and not trace else None) as profile:
        seconds_of(step, device)
    if trace:
        profile.export_chrome_trace(trace)
    return step_kernels(profile, cuda)


if __name__ == "__main__":
    run_case(Path(sys.argv[1]))
