"""Time decoding of one token against dense attention on one GPU, in CUDA graphs: `python -m benchmarks.decode`.

A graph has one call a layer, of so many layers that what each reads comes from memory, as in a model. Dense attention is
whatever of torch's is fastest on the same caches. Prints one table per case and writes everything as JSON. A case whose
check against float64 fails is not timed.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_megatron.ops import DashCache, dash_decode
from dash_megatron.ops.decode_reference import decode_reference
from dash_megatron.ops.fingerprint import implementation_fingerprint

# Largest relative error of the bfloat16 output before a case is refused.
ALLOWED_ERROR = 1e-2
# What is selected in all layers together has about this many bytes: twice the second-level cache of an H200.
SELECTED_BYTES, USUAL_DENSITY = 100e6, 0.06
MIN_LAYERS, MAX_LAYERS = 2, 128
REPLAYS = 30
SWEPT_SPLITS = (3, 7, 15, 23, 31, 47, 63, 127)
ROUTER = {"scaling_factor": 1.0, "sigma": 1.0, "estimate_diagonal": True, "alpha": 1.5}


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
    Case("128K paged", 1, 131072, topics=10, page_size=64),
    Case("16 x 64K paged", 16, 65536, topics=10, page_size=64),
    Case("128 x 8K", 128, 8192, topics=10),
    Case("128K 32/8", 1, 131072, topics=10, kv_heads=8),
    Case("128K 24%", 1, 131072, topics=4),
]


def make_layer(case: Case, seed: int, device: str) -> tuple[DashCache, Tensor]:
    """A cache that holds `tokens` of every sequence, in bfloat16, and the last one's query; topics are the dial on density."""
    generator = torch.Generator(device).manual_seed(seed)
    B, N, Hkv, D, C = case.batch, case.tokens, case.kv_heads, case.head_dim, case.chunk_size

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=generator)

    topics, heads = noise(Hkv, case.topics, D), torch.arange(Hkv, device=device)

    def topic(*shape: int) -> Tensor:
        return topics[heads, torch.randint(case.topics, (*shape, Hkv), device=device, generator=generator)]

    if case.page_size is None:
        cache = DashCache.contiguous(B, N, Hkv, D, chunk_size=C, device=device)
    else:
        pages = torch.randperm(B * N // case.page_size, device=device, generator=generator)
        cache = DashCache.paged(
            len(pages), pages.int().view(B, -1), Hkv, D, page_size=case.page_size, chunk_size=C
        )
    k = noise(B, N, Hkv, D)
    k.view(B, N // C, C, Hkv, D).add_(topic(B, N // C)[:, :, None])
    cu_seqlens = torch.arange(B + 1, device=device, dtype=torch.int32) * N
    cache.prefill(k.flatten(0, 1), noise(B * N, Hkv, D), 0.1 * noise(Hkv, D), cu_seqlens)
    q = 0.35 * noise(B, case.heads, D) + topic(B).repeat_interleave(case.heads // Hkv, dim=1)
    return cache, q


def make_layers(case: Case, count: int, device: str) -> list[tuple[DashCache, Tensor]]:
    return [make_layer(case, seed, device) for seed in range(count)]


def density(case: Case, selected: Tensor) -> float:
    """Mean of chunks selected over chunks available."""
    return selected.double().mean().item() / math.ceil(case.tokens / case.chunk_size)


def check(cache: DashCache, q: Tensor) -> float:
    """Relative error against float64 on the same cache; raises if too large."""
    out = dash_decode(q, cache, **ROUTER)
    worst = 0.0
    for b in range(min(cache.batch, 2)):
        rows = slice(b, b + 1) if cache.page_table is None else slice(None)
        table = None if cache.page_table is None else cache.page_table[b : b + 1]
        tensors = (x.double() for x in (q[b : b + 1], cache.k[rows], cache.v[rows], cache.summary[rows]))
        expected, _ = decode_reference(
            *tensors, cache.lengths[b : b + 1], table, cache.chunk_size, *ROUTER.values()
        )
        worst = max(worst, ((out[b].double() - expected[0]).norm() / expected.norm()).item())
    if not worst <= ALLOWED_ERROR:
        raise AssertionError(f"relative error {worst}, must be at most {ALLOWED_ERROR}; not timed")
    return worst


def graph_microseconds(
    calls: list[Callable[[], object]], before: Callable[[], object] = lambda: None
) -> float:
    """Median time of one of the calls, all in one CUDA graph; `before` runs ahead of every replay and is not timed."""
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
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times[3:]) / len(calls)


def dense_attentions() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Ways to attend densely with q [B, Hq, D] to k and v [B, N, Hkv, D]; some may not run everywhere."""

    def with_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def group_as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.unflatten(1, (k.shape[2], -1))
        return F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2)).flatten(1, 2)

    def on(backend: SDPBackend, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attend(q, k, v)

        return call

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    ways = {"": with_gqa, ", group as rows": group_as_rows}
    return {f"{b}{w}": on(backend, way) for b, backend in backends.items() for w, way in ways.items()}


def flex_decoding() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Torch's compiled flash decoding."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)


def time_dense(layers: list[tuple[DashCache, Tensor]], flex: bool) -> dict[str, float | str]:
    """Microseconds of every way of dense attention that runs, or why it does not."""
    times: dict[str, float | str] = {}
    ways = dense_attentions() | ({"flex": flex_decoding()} if flex else {})
    for name, attend in ways.items():
        calls = [lambda cache=cache, q=q, attend=attend: attend(q, cache.k, cache.v) for cache, q in layers]
        try:
            times[name] = graph_microseconds(calls)
        except RuntimeError as error:
            times[name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    return times


def time_kernels(layers: list[tuple[DashCache, Tensor]]) -> dict[str, float]:
    """Mean microseconds of every kernel of a decode, outside of a graph."""
    calls = [layers[i % len(layers)] for i in range(20)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for cache, q in calls:
            dash_decode(q, cache, **ROUTER)
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / len(calls) for event in profile.key_averages()}


def time_append(layers: list[tuple[DashCache, Tensor]]) -> float:
    """Microseconds of the append that completes a chunk."""
    w = layers[0][0].k.new_zeros(layers[0][0].k.shape[2:])
    tokens = [(cache, cache.k[:, -1].clone()) for cache, _ in layers]
    kept, lengths = [cache.lengths for cache, _ in layers], layers[0][0].lengths.clone()

    def before() -> None:
        torch._foreach_copy_(kept, [lengths - 1] * len(kept))

    try:
        return graph_microseconds(
            [lambda cache=cache, k=k: cache.append(k, k, w) for cache, k in tokens], before
        )
    finally:
        torch._foreach_copy_(kept, [lengths] * len(kept))


def sweep(layers: list[tuple[DashCache, Tensor]]) -> dict[str, float]:
    """Microseconds of decodes launched otherwise than by rule: one or two changes at a time."""
    from dash_megatron.ops.kernels import decode

    cache, q = layers[0]
    plan = decode.plan_decode
    usual = plan(q, cache.k.shape[2], cache.capacity // cache.chunk_size, cache.chunk_size)
    changes: list[dict[str, int | bool]] = [{}, {"dependent": not usual.dependent}]
    changes += [{"splits": s} for s in SWEPT_SPLITS] + [
        {"splits": s, "dependent": False} for s in SWEPT_SPLITS
    ]
    changes += [{"block_scores": s} for s in (1024, 2048, 4096)]
    if cache.capacity <= 32768:
        changes += [{"short": not usual.short}, {"short": not usual.short, "warps": 8}]
    times: dict[str, float] = {}
    try:
        for change in changes:
            decode.plan_decode = lambda *args, change=change: plan(*args)._replace(**change)
            calls = [lambda cache=cache, q=q: dash_decode(q, cache, **ROUTER) for cache, q in layers]
            times[json.dumps(change)] = graph_microseconds(calls)
    finally:
        decode.plan_decode = plan
    return times


def time_case(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """All figures of one case, in microseconds."""
    layers = make_layers(case, case.layers, "cuda")
    error = check(*layers[0])
    ours = graph_microseconds(
        [lambda cache=cache, q=q: dash_decode(q, cache, **ROUTER) for cache, q in layers]
    )
    selected = torch.cat([dash_decode(q, cache, **ROUTER, return_selected=True)[1] for cache, q in layers])
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


def print_table(result: dict[str, object]) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="names of cases; default: those of the goals")
    parser.add_argument("--more", action="store_true", help="also other lengths, layouts and densities")
    parser.add_argument("--output", default="decode.json", help="file to write")
    parser.add_argument(
        "--kernels", action="store_true", help="also the time of each kernel, outside of a graph"
    )
    parser.add_argument("--sweep", action="store_true", help="also other launch configurations")
    parser.add_argument(
        "--flex", action="store_true", help="also torch's flex attention, which it has to compile"
    )
    args = parser.parse_args()
    by_name = {case.name: case for case in CASES + MORE_CASES}
    unknown = set(args.cases or []) - set(by_name)
    if unknown:
        parser.error(f"--cases {sorted(unknown)} must be among {list(by_name)}")
    cases = (
        [by_name[name] for name in args.cases] if args.cases else CASES + (MORE_CASES if args.more else [])
    )
    header = {
        "gpu": torch.cuda.get_device_name(),
        "cudnn": torch.backends.cudnn.version(),
        "implementation": implementation_fingerprint(),
    }
    print(header)
    results: list[dict[str, object]] = []
    for case in cases:
        try:
            results.append(time_case(case, args))
            print_table(results[-1])
        except AssertionError as error:
            print(f"\nREFUSED {case.name}: {error}", flush=True)
            results.append({"case": asdict(case), "refused": str(error)})
        Path(args.output).write_text(json.dumps({**header, "results": results}, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
