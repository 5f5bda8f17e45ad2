"""Time decoding of one token against dense attention on one GPU, in CUDA graphs: `python -m benchmarks.decode`.

A graph has one call a layer, of so many layers that what each reads comes from memory, as in a model. Dense attention is
whatever of torch's is fastest on the same caches. Prints one table per case and writes everything as JSON. A case whose
check against float64 fails is not timed. Without a GPU, `--tiny` walks through everything on a few tokens, with the kernels
under TRITON_INTERPRET=1 and otherwise with the reference.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, default_device, device_name, kernels_run
from benchmarks.timing import Attention, dense_decoders, graph_microseconds, wait
from dash_megatron.command_line import ending_with_reader
from dash_megatron.ops import DashCache
from dash_megatron.ops.decode import decode_and_count
from dash_megatron.ops.fingerprint import implementation_fingerprint
from dash_megatron.ops.types import Router

# Largest relative error of the bfloat16 output before a case is refused.
ALLOWED_ERROR = 1e-2
# What is selected in all layers together has about this many bytes: twice the second-level cache of an H200.
SELECTED_BYTES, USUAL_DENSITY = 100e6, 0.06
MIN_LAYERS, MAX_LAYERS = 2, 128
SWEPT_SPLITS = (3, 7, 15, 23, 31, 47, 63, 127)
DEVICE = default_device()
BACKEND = "triton" if kernels_run(DEVICE) else "reference"


@dataclass(frozen=True)
class Case:
    """One benchmark input."""

    name: str
    batch: int
    tokens: int
    """In every sequence, the new one included."""
    topics: int
    goal: float = 0.0
    """Least ratio to dense attention that is hoped for."""
    heads: int = 32
    kv_heads: int = 2
    chunk_size: int = 64
    head_dim: int = 128
    page_size: int | None = None

    @property
    def layers(self) -> int:
        """Caches that one after the other are read from memory rather than from the second-level cache."""
        layer_bytes = 4 * self.batch * self.tokens * self.kv_heads * self.head_dim
        return max(MIN_LAYERS, min(MAX_LAYERS, math.ceil(SELECTED_BYTES / USUAL_DENSITY / layer_bytes)))


CASES = [
    Case("8K", 1, 8192, topics=10, goal=1 / 1.2),
    Case("128K", 1, 131072, topics=10, goal=2.5),
    Case("512K", 1, 524288, topics=16, goal=4),
    Case("16 x 64K", 16, 65536, topics=10, goal=4),
]
MORE_CASES = [
    Case("16K", 1, 16384, topics=10),
    Case("32K", 1, 32768, topics=10),
    Case("64K", 1, 65536, topics=10),
    Case("256K", 1, 262144, topics=12),
    Case("16 x 16K", 16, 16384, topics=10),
    Case("2 x 128K", 2, 131072, topics=10),
    Case("128K paged", 1, 131072, topics=10, page_size=64),
    Case("16 x 64K paged", 16, 65536, topics=10, page_size=64),
    Case("128 x 8K", 128, 8192, topics=10),
    Case("128K 32/8", 1, 131072, topics=10, kv_heads=8),
    Case("128K 24%", 1, 131072, topics=4),
]


TINY_CASES = [
    Case("64 tokens", 1, 64, topics=3, heads=4, chunk_size=16, head_dim=16),
    Case("2 x 64 paged", 2, 64, topics=3, heads=4, chunk_size=16, head_dim=16, page_size=16),
]


def decode(q: Tensor, cache: DashCache, backend: str = BACKEND) -> tuple[Tensor, Tensor]:
    """The last token's output and the number of chunks it selected."""
    return decode_and_count(q, cache, Router(cache.chunk_size, sigma=1.0), backend)


def make_layer(case: Case, seed: int) -> tuple[DashCache, Tensor]:
    """A cache that holds `tokens` of every sequence, in bfloat16, and the last one's query; topics are the dial on density."""
    B, N, Hkv, D, C = case.batch, case.tokens, case.kv_heads, case.head_dim, case.chunk_size
    inputs = Inputs(case.topics, Hkv, D, DEVICE, seed=seed)
    if case.page_size is None:
        cache = DashCache.contiguous(B, N, Hkv, D, chunk_size=C, device=DEVICE)
    else:
        pages = torch.randperm(B * N // case.page_size, device=DEVICE, generator=inputs.generator)
        cache = DashCache.paged(
            len(pages), pages.int().view(B, -1), Hkv, D, page_size=case.page_size, chunk_size=C
        )
    k = inputs.gather_keys(inputs.noise(B, N, Hkv, D), C)
    cu_seqlens = torch.arange(B + 1, device=DEVICE, dtype=torch.int32) * N
    v, w = inputs.noise(B * N, Hkv, D), 0.1 * inputs.noise(Hkv, D)
    cache.prefill(k.flatten(0, 1), v, w, cu_seqlens, BACKEND)
    q = inputs.gather_queries(inputs.noise(B, 1, case.heads, D), 1)
    return cache, q[:, 0]


def density(case: Case, selected: Tensor) -> float:
    """Mean of chunks selected over chunks available."""
    return selected.double().mean().item() / math.ceil(case.tokens / case.chunk_size)


def check(cache: DashCache, q: Tensor) -> float:
    """Relative error against float64 on the same cache; raises if too large."""
    out, _ = decode(q, cache)
    worst = 0.0
    for b in range(min(cache.batch, 2)):
        rows = slice(b, b + 1) if cache.page_table is None else slice(None)
        table = None if cache.page_table is None else cache.page_table[b : b + 1]
        k, v, summary = (x[rows].double() for x in (cache.k, cache.v, cache.summary))
        alone = DashCache(k, v, summary, cache.lengths[b : b + 1], cache.chunk_size, table)
        expected, _ = decode(q[b : b + 1].double(), alone, "reference")
        worst = max(worst, ((out[b].double() - expected[0]).norm() / expected.norm()).item())
    if not worst <= ALLOWED_ERROR:
        raise AssertionError(f"relative error {worst}, must be at most {ALLOWED_ERROR}; not timed")
    return worst


def flex_decoding() -> Attention:
    """Torch's compiled flash decoding."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)


def time_dense(layers: list[tuple[DashCache, Tensor]], flex: bool) -> dict[str, float | str]:
    """Microseconds of every way of dense attention that runs, or why it does not."""
    times: dict[str, float | str] = {}
    ways = dense_decoders(DEVICE) | ({"flex": flex_decoding()} if flex else {})
    for name, way in ways.items():
        calls = [partial(way, q, cache.k, cache.v) for cache, q in layers]
        try:
            times[name] = graph_microseconds(calls, DEVICE)
        except RuntimeError as error:
            times[name] = str(error).splitlines()[0]
            wait(DEVICE)
    return times


def time_kernels(layers: list[tuple[DashCache, Tensor]]) -> dict[str, float]:
    """Mean microseconds of every kernel of a decode, outside of a graph."""
    calls = [layers[i % len(layers)] for i in range(20)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for cache, q in calls:
            decode(q, cache)
        wait(DEVICE)
    return {event.key: event.device_time_total / len(calls) for event in profile.key_averages()}


def time_append(layers: list[tuple[DashCache, Tensor]]) -> float:
    """Microseconds of the append that completes a chunk."""
    w = layers[0][0].k.new_zeros(layers[0][0].k.shape[2:])
    tokens = [(cache, cache.k[:, -1].clone()) for cache, _ in layers]
    kept, lengths = [cache.lengths for cache, _ in layers], layers[0][0].lengths.clone()

    def before() -> None:
        torch._foreach_copy_(kept, [lengths - 1] * len(kept))

    try:
        calls = [partial(cache.append, k, k, w, backend=BACKEND) for cache, k in tokens]
        return graph_microseconds(calls, DEVICE, before)
    finally:
        torch._foreach_copy_(kept, [lengths] * len(kept))


def sweep(layers: list[tuple[DashCache, Tensor]]) -> dict[str, float]:
    """Microseconds of decodes launched otherwise than by rule: one or two changes at a time."""
    from dash_megatron.ops.kernels import decode as kernel

    cache, q = layers[0]
    find_launch = kernel.find_launch
    chunks = cache.capacity // cache.chunk_size
    usual = find_launch(q, cache.k.shape[2], chunks, cache.chunk_size)
    splits = [s for s in SWEPT_SPLITS if s <= chunks]
    changes: list[dict[str, int | bool]] = [{}, *({"splits": s} for s in splits)]
    if DEVICE.type == "cuda":  # nothing else launches a kernel before the one it depends on has ended
        changes.append({"dependent": not usual.dependent})
        changes += [{"splits": s, "dependent": False} for s in splits]
    changes += [{"block_scores": s} for s in (1024, 2048, 4096)]
    if cache.capacity <= 32768:
        changes.append({"short": not usual.short})
    times: dict[str, float] = {}
    for change in changes:

        def changed(*arguments: Any, change: dict[str, Any] = change) -> Any:
            return find_launch(*arguments)._replace(**change)

        with mock.patch.object(kernel, "find_launch", changed):
            times[json.dumps(change)] = time_decode(layers)
    return times


def time_decode(layers: list[tuple[DashCache, Tensor]]) -> float:
    """Microseconds of one layer's decode."""
    return graph_microseconds([partial(decode, q, cache) for cache, q in layers], DEVICE)


def time_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one case, in microseconds."""
    layers = [make_layer(case, seed) for seed in range(MIN_LAYERS if args.tiny else case.layers)]
    error = check(*layers[0])
    ours = time_decode(layers)
    selected = torch.cat([decode(q, cache)[1] for cache, q in layers])
    dense = time_dense(layers, args.flex) if case.page_size is None else {}
    figures = [x for x in dense.values() if not isinstance(x, str)]
    return {
        "case": asdict(case),
        "layers": len(layers),
        "density": density(case, selected),
        "error": error,
        "ours": ours,
        "append": time_append(layers) if case.page_size is None else None,
        "dense": dense,
        "speedup": min(figures) / ours if figures else None,
        "kernels": time_kernels(layers) if args.kernels else {},
        "sweep": sweep(layers) if args.sweep else {},
    }


def print_table(result: dict[str, Any]) -> None:
    case, speedup = result["case"], result["speedup"]
    print(
        f"\n{case['name']}: density {result['density']:.1%}, {result['layers']} layers, error {result['error']:.1e}"
    )
    ratio = "" if speedup is None else f"  {speedup:.2f}x the fastest dense, goal {case['goal']:.2f}x"
    append = "" if result["append"] is None else f" (append of a chunk's last token {result['append']:.1f})"
    print(f"  {'ours':28s}{result['ours']:9.1f} us{ratio}{append}")
    for group in ("dense", "kernels", "sweep"):
        for name, time in result[group].items():
            print(
                f"  {name[:60]:28s}"
                + (f"{time:9.1f} us" if isinstance(time, float) else f"  does not run: {time}")
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="names of cases; default: those of the goals")
    parser.add_argument("--more", action="store_true", help="also other lengths, layouts and densities")
    parser.add_argument("--tiny", action="store_true", help="a few tokens and two layers, any device")
    parser.add_argument("--output", default="decode.json", help="file to write")
    parser.add_argument(
        "--kernels", action="store_true", help="also the time of each kernel, outside of a graph; needs a GPU"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also other launch configurations; needs the kernels"
    )
    parser.add_argument(
        "--flex", action="store_true", help="also torch's flex attention, which it has to compile"
    )
    options = parser.parse_args()
    by_name = {case.name: case for case in CASES + MORE_CASES + TINY_CASES}
    unknown = set(options.cases or []) - set(by_name)
    if unknown:
        parser.error(f"--cases {sorted(unknown)} must be among {list(by_name)}")
    if options.kernels and DEVICE.type != "cuda":
        parser.error("--kernels needs a GPU, whose profiler tells the kernels apart")
    if options.sweep and BACKEND != "triton":
        parser.error("--sweep needs the kernels: a GPU, or TRITON_INTERPRET=1")
    if options.cases:
        options.cases = [by_name[name] for name in options.cases]
    else:
        options.cases = TINY_CASES if options.tiny else CASES + (MORE_CASES if options.more else [])
    return options


@ending_with_reader()
def main() -> None:
    """Run from the command line."""
    options = parse()
    header = {
        "gpu": device_name(DEVICE),
        "cudnn": torch.backends.cudnn.version(),
        "implementation": implementation_fingerprint(),
    }
    print(header)
    results: list[dict[str, Any]] = []
    for case in options.cases:
        try:
            results.append(time_case(case, options))
            print_table(results[-1])
        except AssertionError as error:
            print(f"\nREFUSED {case.name}: {error}", flush=True)
            results.append({"case": asdict(case), "refused": str(error)})
        Path(options.output).write_text(json.dumps({**header, "results": results}, indent=1))
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
