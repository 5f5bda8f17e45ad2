"""Time generation of one text by a whole model on one GPU, DashAttention against full: `python -m benchmarks.generate`.

The model has the shape of a config and random weights, made on the GPU. Both kinds of attention run on the same weights.

- Decoding: the cache is filled, not computed, as `benchmarks/decode.py` makes inputs (keys around topics, a topic a chunk),
  since full attention would take minutes for a prompt of 512K tokens. Queries are the model's own, and know nothing of
  the topics: every layer's scaling factor is searched by bisection until random tokens at the end of the context select
  the density asked for. Steps are timed twice: as `model.generate` takes them, and as one CUDA graph of the whole model,
  from the token to the next one's choice, which is how an engine serves. The graph's tokens are random too.
- Full attention decodes with whatever of torch's is fastest on the same cache, which is tried first.
- Prefill: a prompt of random tokens, computed at once into a cache. Scaling factors are searched layer by layer in a
  forward pass before, on queries spread over the prompt. Full attention takes cuDNN or flash. Longer prompts than
  `--prefill` names are skipped: full attention alone would take two minutes at 512K.
- With `--choices NAME` chunks like those that a trained model selected (`benchmarks/choices`) take the place of those of every
  layer's router in prompts; it runs all the same.

A folder that `python -m dash_megatron convert to-hf` wrote in `--model` takes the place of the config, and a file in `--text` that
of random tokens: then prompts are timed as the trained model selects, and no density is searched for.

Every case is written to `--output` when it is done. One that fails, as for want of memory, is reported, and the others go on.
Without a GPU, `--tiny` walks through everything with the reference.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, DynamicCache, StaticCache

from benchmarks.density_search import (
    SPARE_TOKENS,
    attention_layers,
    random_tokens,
    replaced,
    set_decoding_density,
    set_kind,
    set_prefill_density,
)
from benchmarks.given import Given, models_like
from benchmarks.inputs import TINY_MODEL, Inputs, default_device, device_name
from benchmarks.timing import Attention, dense_decoders, graph_microseconds, seconds_of, wait
from dash_megatron.command_line import ending_with_reader, parse_with_overrides
from dash_megatron.config import load_config
from dash_megatron.hf.config import llama_config
from dash_megatron.hf.fast_cache import fast_layer
from dash_megatron.hf.modeling_dash import DashForCausalLM, DashSelfAttention, dash_layer
from dash_megatron.ops.fingerprint import implementation_fingerprint

KINDS = ("dash", "full")
TOPICS = 10
# Tokens of a prompt that is computed before one is timed.
WARM_TOKENS = 32768


def build_model(options: argparse.Namespace, device: torch.device) -> DashForCausalLM:
    """The exported model, or the config's with random weights, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.model is not None:
        # transformers' types hide the model's own `to`
        loaded: Any = DashForCausalLM.from_pretrained(options.model, dtype=dtype)
        model: DashForCausalLM = loaded.to(device)
    else:
        model = _random_model(options, dtype, device)
    for attention in attention_layers(model):
        attention.backend = "auto" if device.type == "cuda" else "reference"
    return model.eval().requires_grad_(False)


def _random_model(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> DashForCausalLM:
    config = load_config(options.config, [*(TINY_MODEL if options.tiny else []), *options.overrides])
    shape = llama_config(config, config.model.vocab_size or options.vocab_size, dtype, end_token=0)
    shape.max_position_embeddings = max(*options.contexts, *options.prefill, 1) + SPARE_TOKENS
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return DashForCausalLM(shape)
    finally:
        torch.set_default_dtype(torch.float32)


def fill_cache(model: DashForCausalLM, cache: StaticCache, context: int) -> None:
    """Put `context` keys and values into every layer, around a topic a chunk."""
    device = model.device
    start = torch.zeros(1, dtype=torch.int64, device=device)
    for index, attention in enumerate(attention_layers(model)):
        # a plain Llama has no chunks, and takes as long whatever the keys are
        C, H, D = getattr(model.config, "chunk_size", 64), attention.kv_heads, attention.head_dim
        inputs = Inputs(TOPICS, H, D, device, model.dtype, seed=index)
        k_NHD = inputs.gather_keys(inputs.noise(1, context, H, D), C)
        k, v = (x.transpose(1, 2).contiguous() for x in (k_NHD, inputs.noise(1, context, H, D)))
        dash_layer(cache, index)
        if attention.is_full:
            cache.update(k, v, index)
        else:
            places = (attention.indexer_q.view(H, D), start, 0, attention.backend)
            own = attention.has_router_projections
            # set_decoding_density sets the few that a router of more than one query looks at; keys of its own are the same
            q = k.new_zeros(1).expand(1, H if own else attention.q_proj.out_features // D, context, D)
            layer = fast_layer(cache, index, C, attention.router.query_pool, q, *places, own=own)
            layer.write(k, v, q, *places, k if own else None)


def fastest_full(first: list[Any], q: Tensor) -> tuple[str, Attention]:
    """The way of torch's to attend fully with q [1, Hq, D] that is fastest on the first layers' caches, and its name."""
    times: dict[str, float] = {}
    ways = dense_decoders(q.device)
    layers = [
        [x[:, :, : layer.filled].transpose(1, 2) for x in (layer.keys, layer.values)] for layer in first
    ]
    for name, way in ways.items():
        try:
            times[name] = graph_microseconds([partial(way, q, k, v) for k, v in layers], q.device)
        except RuntimeError as error:
            print(f"    {name} does not run: {str(error).splitlines()[0]}", flush=True)
            wait(q.device)
    print("    " + ", ".join(f"{name} {x:.0f} us" for name, x in times.items()), flush=True)
    best = min(times, key=lambda name: times[name])
    return best, ways[best]


def time_steps(model: DashForCausalLM, cache: StaticCache, position: int) -> float:
    """Seconds of one step from a random token to the choice of the next, on a GPU by replays of a CUDA graph."""
    token = random_tokens(model, 1, 1)
    places = torch.full((1, 1), position, device=model.device)

    def step() -> Tensor:
        places.add_(1)
        return model(token, position_ids=places, past_key_values=cache).logits.argmax(-1)

    def before() -> None:
        token.random_(model.vocab_size)

    step()
    wait(model.device)
    return graph_microseconds([step], model.device, before) / 1e6


def decode_case(
    model: DashForCausalLM, kind: str, context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of decoding after `context` tokens."""
    cache = StaticCache(config=model.config, max_cache_len=context + SPARE_TOKENS)
    fill_cache(model, cache, context)
    density, way = 1.0, ""
    if kind == "dash":
        density = set_decoding_density(model, cache, context, options.density)
    override: AbstractContextManager[None] = nullcontext()
    full = [attention for attention in attention_layers(model) if attention.is_full]
    if full:
        shape = 1, model.config.num_attention_heads, full[0].head_dim
        q = torch.randn(shape, dtype=model.dtype, device=model.device)
        way, attend = fastest_full([cache.layers[attention.index] for attention in full[:4]], q)
        override = attending_by(model, attend)
    with override:
        time_generate(model, cache, 2)
        seconds = time_generate(model, cache, options.tokens)
        step = time_steps(model, cache, cache.get_seq_length() - 1)
    return {
        "density": density,
        "attention": way,
        "generate_tokens_per_second": options.tokens / seconds,
        "step_milliseconds": step * 1e3,
        "tokens_per_second": 1 / step,
    }


def attending_by(model: DashForCausalLM, attend: Attention) -> AbstractContextManager[None]:
    """Let full attention of one token go through `attend` in every layer."""

    def fully(_: DashSelfAttention) -> Callable[..., Tensor]:
        return lambda q, k, v, *_: attend(q[:, :, 0], k.transpose(1, 2), v.transpose(1, 2))[:, :, None]

    return replaced(model, "_attend_fully", fully)


def time_generate(model: DashForCausalLM, cache: StaticCache, tokens: int) -> float:
    """Seconds that `model.generate` takes for some tokens after those in the cache."""
    # all but the last token are in the cache
    prompt = random_tokens(model, 1, cache.get_seq_length() + 1)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": tokens,
        "past_key_values": cache,
    }
    generating: Any = model  # by its types, transformers does not take it for a model that generates
    return seconds_of(lambda: generating.generate(prompt, **settings), model.device)


def prompt_of(model: DashForCausalLM, context: int, options: argparse.Namespace) -> Tensor:
    """Tokens of a prompt, int64 [1, context].

    Raises:
        ValueError: the text has fewer.
    """
    if options.text is None:
        return random_tokens(model, 1, context)
    tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"]
    if len(tokens) < context:
        raise ValueError(
            f"--text {options.text} has {len(tokens)} tokens, and must have the {context} of --prefill"
        )
    return torch.tensor([tokens[:context]], device=model.device)


def prefill_case(
    model: DashForCausalLM, kind: str, context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of a prompt of `context` tokens."""
    prompt = prompt_of(model, context, options)
    target = None if options.model is not None else options.density
    density = set_prefill_density(model, prompt, target) if kind == "dash" else 1.0
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    given = None
    if kind == "dash" and options.choices is not None:
        given = given_to(model, options.choices)

    def run() -> None:
        model(prompt, past_key_values=DynamicCache(), logits_to_keep=1)

    with sdpa_kernel(backends, set_priority=True), nullcontext() if given is None else giving(model, given):
        model(prompt[:, :WARM_TOKENS], use_cache=False, logits_to_keep=1)
        if given is not None and context > WARM_TOKENS:
            # choices are made in a pass that is not timed
            run()
        seconds = seconds_of(run, model.device)
    if given is not None:
        density = statistics.mean(given.densities.values())
    return {"density": density, "prefill_seconds": seconds, "prefill_tokens_per_second": context / seconds}


def given_to(model: DashForCausalLM, choices: str) -> Given:
    """Choices of a model of `benchmarks/choices` for all layers.

    Raises:
        ValueError: its chunks are others than the layers'.
    """
    size, local = model.config.chunk_size, getattr(model.config, "local_chunks", 0)
    fitting = models_like(size, local)
    if choices not in fitting:
        raise ValueError(
            f"--choices {choices} must be one of {fitting}, which have the layers' attention.chunk_size={size} "
            f"and attention.local_chunks={local}"
        )
    return Given(choices, model.config.num_hidden_layers)


@contextmanager
def giving(model: DashForCausalLM, given: Given) -> Iterator[None]:
    """Let every layer attend, with the kernels, to what it is given instead of what its router selects."""

    def attend(attention: DashSelfAttention) -> Any:
        return given.of_layer(attention.index, partial(DashSelfAttention._attend_with_kernels, attention))

    with ExitStack() as stack:
        stack.enter_context(given.instead())
        stack.enter_context(replaced(model, "_attend_with_kernels", attend))
        for attention in attention_layers(model):
            stack.enter_context(patch.object(attention, "backend", "triton"))
        yield


CASES = {"decode": decode_case, "prefill": prefill_case}


def run_case(
    model: DashForCausalLM, what: str, kind: str, context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One case's figures, or why it has none."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    set_kind(model, kind)
    begin = time.perf_counter()
    result: dict[str, Any] = {"what": what, "kind": kind, "context": context}
    try:
        result |= CASES[what](model, kind, context, options)
    except Exception as error:  # what has been measured before must not be lost
        result["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    gc.collect()
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    print(f"  {result}, took {time.perf_counter() - begin:.1f} s", flush=True)
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    """One row a case, with the ratio to full attention where both ran."""
    figures = {"decode": "tokens_per_second", "prefill": "prefill_tokens_per_second"}
    by_key = {(x["what"], x["kind"], x["context"]): x for x in results}
    print(f"\n{'':8}{'context':>8} {'attention':>9} {'density':>8} {'tokens/s':>10} {'to full':>8} ", end="")
    print(f"{'ms/step':>8} {'generate':>9} {'seconds':>8} {'memory':>9}")
    for x in results:
        head = f"{x['what']:8}{x['context']:>8} {x['kind']:>9}"
        if "failed" in x:
            print(f"{head}  {x['failed']}")
            continue
        speed = x[figures[x["what"]]]
        full = by_key.get((x["what"], "full", x["context"]), {}).get(figures[x["what"]])
        ratio = f"{speed / full:.2f}x" if full else "-"
        cells = [
            (x.get("step_milliseconds"), 8, ".2f"),
            (x.get("generate_tokens_per_second"), 9, ".1f"),
            (x.get("prefill_seconds"), 8, ".2f"),
        ]
        text = " ".join(
            f"{'-' if value is None else format(value, form):>{width}}" for value, width, form in cells
        )
        print(
            f"{head} {x['density']:>8.1%} {speed:>10,.1f} {ratio:>8} {text} {x.get('peak_gib', 0):>5.1f} GiB"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/8b_128k.yaml")
    parser.add_argument(
        "--model", type=Path, help="folder of an export, for prompts only, instead of a config"
    )
    parser.add_argument("--text", type=Path, help="file that --model's prompts are the beginning of")
    parser.add_argument("--choices", help="a model of benchmarks/choices that prompts' choices are like")
    parser.add_argument(
        "--contexts", type=int, nargs="*", help="tokens in the cache; default 32K, 128K, 512K"
    )
    parser.add_argument("--prefill", type=int, nargs="*", help="tokens of prompts; default 32K and 128K")
    parser.add_argument("--density", type=float, default=0.1, help="of DashAttention")
    parser.add_argument("--tokens", type=int, default=32, help="that generate is timed on, up to 128")
    parser.add_argument("--vocab-size", type=int, default=32768, help="where the config has none")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which no case is begun")
    parser.add_argument("--output", default="generate.json", help="file to write")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, short contexts, any device")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parse_with_overrides(parser, arguments)
    if options.contexts is None and (options.model is not None or options.choices is not None):
        options.contexts = []
    if options.contexts is None:
        options.contexts = [256, 1024] if options.tiny else [32768, 131072, 524288]
    if options.prefill is None:
        options.prefill = [256] if options.tiny else [32768, 131072]
    if not 1 <= options.tokens <= 128:
        parser.error(f"--tokens {options.tokens} must be from 1 to 128")
    if options.text is not None and options.model is None:
        parser.error(f"--text {options.text} needs a --model, whose tokenizer reads it")
    if options.contexts and options.model is not None:
        parser.error(
            f"--contexts {options.contexts} must be left out beside --model, whose prompts are timed"
        )
    return options


@ending_with_reader()
@torch.no_grad()
def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run from the command line."""
    options, begin = parse(arguments), time.perf_counter()
    device = default_device()
    model = build_model(options, device)
    header = {
        "gpu": device_name(device),
        "torch": torch.__version__,
        "config": options.config if options.model is None else None,
        "model": None if options.model is None else str(options.model),
        "choices": options.choices,
        "implementation": implementation_fingerprint(),
        "parameters": model.num_parameters(),
    }
    print(f"{header}, made in {time.perf_counter() - begin:.1f} s", flush=True)
    cases = [("decode", context) for context in options.contexts]
    cases += [("prefill", context) for context in options.prefill]
    results: list[dict[str, Any]] = []
    for what, context in cases:
        for kind in KINDS:
            late = time.perf_counter() - begin > options.limit
            skipped = {"what": what, "kind": kind, "context": context, "failed": "not begun: out of time"}
            results.append(skipped if late else run_case(model, what, kind, context, options))
            Path(options.output).write_text(json.dumps({**header, "results": results}, indent=1) + "\n")
    print_table(results)
    return results


if __name__ == "__main__":
    main()
