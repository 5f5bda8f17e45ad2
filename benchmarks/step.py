"""Time whole training steps of a config on random tokens: full attention, and DashAttention at dialled densities.

    python benchmarks/step.py --config configs/1b_16k.yaml --densities 0.25 0.1 --json step.json data.seq_length=65536
    python benchmarks/step.py --config configs/1b_16k.yaml --routing trained --json step.json

Weights are random, so that nothing is known of the routing a trained model would have: every layer's scaling factor is
searched until the layer selects the density asked for; the density reported is the one measured. With `--routing trained`
the chunks that trained routers selected (`benchmarks/choices`) take the place of those of every layer's router, which runs all
the same; layers, heads and tokens beyond a file's get made choices that persist alike. The share of attention is what a step
saves when core attention hands its values through instead. `--tiny` makes the config's model so small, and its sequences so
short, that any device runs it in seconds; with `--routing trained` under TRITON_INTERPRET=1 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.given import Given, models_like
from benchmarks.inputs import TINY_STEP, default_device, device_name, kernels_run
from benchmarks.timing import seconds_of
from dash_megatron.command_line import ending_with_reader, parse_with_overrides
from dash_megatron.config import Config, config_from_dict, load_config
from dash_megatron.config.flops import peak_flops, training_flops_per_token
from dash_megatron.data.batches import PackedBatch, pack_samples
from dash_megatron.layers import (
    DashCoreAttention,
    FullCoreAttention,
    RoutingMeans,
    build_model,
    dash_layers,
    init_weights,
    routing_means,
)
from dash_megatron.parallel import destroy_process_groups, init_process_groups, read_launch
from dash_megatron.training.engine import Engine
from dash_megatron.training.loss import share_of_global_mean

NO_TOKEN = -1
# densities are dialled
NO_TARGET = "attention.target_density=null"
# The smallest chunks of which trained routers' choices are there, few enough for Triton's interpreter.
TINY_TRAINED = ["attention.chunk_size=32", "attention.backend=triton", "data.seq_length=192"]


@ending_with_reader()
def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.25, 0.1], help="of DashAttention")
    parser.add_argument(
        "--routing",
        choices=("dialled", "trained"),
        default="dialled",
        help="trained: densities are those of the files",
    )
    parser.add_argument("--steps", type=int, default=5, help="steps timed, after two to warm up")
    parser.add_argument("--vocab-size", type=int, default=32768, help="where the config has none")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, 256 tokens, any device")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parse_with_overrides(parser)
    if default_device().type != "cuda" and not options.tiny:
        parser.error(
            "there is no GPU; add --tiny to time two narrow layers on 256 tokens, which any device does in seconds"
        )
    trained = options.routing == "trained"
    if trained and not kernels_run(default_device()):
        parser.error(
            "--routing trained gives choices to the Triton kernels, which need a GPU; set TRITON_INTERPRET=1 to interpret them"
        )
    tiny = [*TINY_STEP, *(TINY_TRAINED if trained else [])] if options.tiny else []
    config = load_config(options.config, [NO_TARGET, *tiny, *options.overrides])
    wanted: Any = options.densities
    if trained:
        try:
            wanted = models_like(config.attention.chunk_size, config.attention.local_chunks)
        except ValueError as error:
            parser.error(str(error))
    launch = read_launch({})
    device = init_process_groups(launch, config.parallel)
    cases: list[tuple[str, float | str | None]] = [("full", None)]
    cases += [("dash", density_or_model) for density_or_model in wanted]
    _print_header(config, device)
    results: list[dict[str, Any]] = []
    for kind, routing in cases:
        results.append(_measure(_case(config, kind), kind, routing, options, device))
        _print_row(results, device)
        if options.json is not None:
            written = {"config": options.config, "results": results}
            options.json.write_text(json.dumps(written, indent=1) + "\n")
    destroy_process_groups()


def _case(config: Config, kind: str) -> Config:
    """One process, one micro-batch a step, the kind of attention asked for."""
    tree = config.model_dump()
    tree["attention"]["kind"] = kind
    tree["training"]["global_batch"] = tree["training"]["micro_batch"]
    return config_from_dict(tree)


def _measure(
    config: Config, kind: str, routing: float | str | None, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    vocab_size = config.model.vocab_size or options.vocab_size
    model = build_model(config, vocab_size, device)
    init_weights(model, config.training.seed, config.model.init_std)
    engine = Engine(model, config, world_size=1)
    batch = _random_batch(config, vocab_size).to(device)
    if isinstance(routing, float):
        _dial(engine, batch, routing)
    given = with_choices(engine, config, routing) if isinstance(routing, str) else contextlib.nullcontext()
    with given:
        engine.forward(batch.tokens, batch.position_ids, batch.labels, batch.cu_seqlens)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = _time_steps(engine, batch, options.steps, device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    means = routing_means(engine.model)
    chunks = {layer: mean.chunks_selected.item() for layer, mean in means.items()}
    context = (batch.position_ids + 1).float().mean().item()
    flops = training_flops_per_token(config, vocab_size, context, chunks if means else None)
    hand_values_through(engine.model)
    without = _time_steps(engine, batch, options.steps, device)
    tokens = batch.tokens.numel()
    del model, engine
    gc.collect()  # engine and model refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "kind": kind,
        "choices": routing if isinstance(routing, str) else None,
        "density": _density(means.values()) if means else 1.0,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": memory,
        "attention_share": 1 - without / seconds,
        "model_tflops_per_second": flops * tokens / seconds / 1e12,
    }


def _density(means: Iterable[RoutingMeans]) -> float:
    """Mean over layers of chunks selected over chunks available."""
    return statistics.mean((x.chunks_selected / x.chunks_available).item() for x in means)


def _random_batch(config: Config, vocab_size: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(config.training.seed)
    size = config.training.micro_batch, config.data.seq_length + 1
    tokens = torch.randint(vocab_size, size, generator=generator)
    return pack_samples([{"tokens": row[:-1], "labels": row[1:]} for row in tokens], eod=NO_TOKEN)


@torch.no_grad()
def _dial(engine: Engine, batch: PackedBatch, density: float) -> None:
    """Search every layer's scaling factor by bisection of its logarithm; more scaling selects less."""
    layers = dash_layers(engine.model)
    low = {index: module.scaling_factor * 2.0**-4 for index, module in layers.items()}
    high = {index: module.scaling_factor * 2.0**24 for index, module in layers.items()}
    for _ in range(16):
        for index, module in layers.items():
            module.scaling_factor = (low[index] * high[index]) ** 0.5
        engine.forward(batch.tokens, batch.position_ids, batch.labels, batch.cu_seqlens)
        for index, means in routing_means(engine.model).items():
            bound = low if means.chunks_selected > density * means.chunks_available else high
            bound[index] = layers[index].scaling_factor


@contextlib.contextmanager
def with_choices(engine: Engine, config: Config, model: str) -> Iterator[Given]:
    """Within, every layer's router runs, and then makes way for choices of a model's layer at the same relative depth."""
    rows = config.training.micro_batch
    given = Given(model, config.model.layers, rows)

    def one_document_a_row(attend: Any) -> Any:
        """Attention to a batch of which nothing else is packed."""

        def attend_as(q: Tensor, k: Tensor, v: Tensor, packed: Any) -> Tensor:
            out: Tensor = attend(*(x.view(rows, -1, *x.shape[2:]) for x in (q, k, v)), None)
            return out.view(*q.shape[:2], *out.shape[2:])

        return attend_as

    with contextlib.ExitStack() as stack:
        stack.enter_context(given.instead())
        for number, module in dash_layers(engine.model).items():
            attend = given.of_layer(number, one_document_a_row(module._attend_here))
            stack.enter_context(patch.object(module, "_attend_here", attend))
            shared = given.of_layer(number, module._attend_shards)
            stack.enter_context(patch.object(module, "_attend_shards", shared))
        yield given


def _time_steps(engine: Engine, batch: PackedBatch, steps: int, device: torch.device) -> float:
    """Median seconds of an optimizer step."""
    targets = batch.loss_mask.sum().float()
    # weights must not move away from the dialled density while the clock runs
    engine.set_lr(0.0)

    def step() -> None:
        engine.backward(share_of_global_mean(engine.forward, batch, targets))
        engine.step()

    return statistics.median([seconds_of(step, device) for _ in range(steps + 2)][2:])


def hand_values_through(model: torch.nn.Module) -> None:
    """From now on every core attention gives each query head the values of its own token."""

    def values(own: int, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return value.repeat_interleave(query.shape[2] // value.shape[2] - own, dim=2).flatten(2)

    for module in model.modules():
        if isinstance(module, DashCoreAttention | FullCoreAttention):
            # a router of its own has one more query in each group
            own = isinstance(module, DashCoreAttention) and module.attention.router_projections
            module.forward = functools.partial(values, int(own))  # type: ignore[method-assign]


def _print_header(config: Config, device: torch.device) -> None:
    training = config.training
    print(
        f"{config.run_dir}: {config.data.seq_length} tokens x {training.micro_batch}, {training.precision}, "
        f"recompute {training.recompute}, ZeRO {config.zero.stage}, {device_name(device)}, torch {torch.__version__}"
    )
    print(
        f"{'attention':>10} {'density':>8} {'s/step':>8} {'tokens/s':>9} {'memory':>9} {'attention':>10} {'MFU':>6} {'speed-up':>9}",
        flush=True,
    )


def _print_row(results: list[dict[str, Any]], device: torch.device) -> None:
    """The newest result; the first is what others are compared with."""
    row, peak = results[-1], peak_flops(device_name(device))
    memory = "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f} GiB"
    utilization = f"{row['model_tflops_per_second'] * 1e12 / peak:.0%}" if peak else "-"
    print(
        f"{row['kind']:>10} {row['density']:>8.1%} {row['seconds']:>8.3f} {row['tokens_per_second']:>9,.0f} "
        f"{memory:>9} {row['attention_share']:>10.0%} {utilization:>6} "
        f"{results[0]['seconds'] / row['seconds']:>8.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
