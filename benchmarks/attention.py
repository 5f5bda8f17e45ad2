"""Time DashAttention's Triton kernels against dense attention on one GPU, stage by stage: `python benchmarks/attention.py`.

Prints one table per case and writes everything as JSON. A case whose check against float64 fails is not timed.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dash_megatron.ops.fingerprint import implementation_fingerprint
from dash_megatron.ops.kernels import configs, dash, geometry
from dash_megatron.ops.kernels.attend import attend
from dash_megatron.ops.kernels.backward_kv import backward_kv
from dash_megatron.ops.kernels.backward_q import backward_q, backward_router
from dash_megatron.ops.kernels.route import route
from dash_megatron.ops.kernels.summarize import summarize
from dash_megatron.ops.kernels.transpose import divide, transpose
from dash_megatron.ops.reference import dash_attention_reference
from dash_megatron.ops.types import Router

# Largest relative errors of bfloat16 output and gradients before a case is refused.
ALLOWED_OUT, ALLOWED_GRAD = 1e-2, 4e-2
CHECK_TOKENS = 4096
REFERENCE_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """One benchmark input."""

    name: str
    tokens: int
    heads: int = 32
    kv_heads: int = 2
    topics: int = 10
    run: int = 32
    """Consecutive queries that share a topic."""
    scaling_factor: float = 1.0
    chunk_size: int = 64
    head_dim: int = 128
    structured: bool = True


CASES = [
    Case("16K 32/2 25%", 16384, topics=4),
    Case("64K 32/2 24%", 65536, topics=4),
    Case("64K 32/2 10%", 65536, topics=10),
    Case("64K 32/8 10%", 65536, topics=10, kv_heads=8),
    Case("64K 32/32 10%", 65536, topics=10, kv_heads=32),
    Case("128K 32/2 10%", 131072, topics=10),
    Case("128K 32/2 2.6%", 131072, topics=40),
    Case("16K 32/2 100%", 16384, scaling_factor=1e-3),
]
# other inputs: nothing may fall off a cliff
MORE_CASES = [
    Case("64K 32/2 2.6%", 65536, topics=40),
    Case("16K 32/2 10%", 16384, topics=10),
    Case("32K 32/2 10%", 32768, topics=10),
    Case("64K 32/2 runs of 8", 65536, topics=10, run=8),
    Case("64K 32/2 runs of 1", 65536, topics=10, run=1),
    Case("64K 32/2 unstructured", 65536, structured=False, scaling_factor=6.0),
    Case("64K 32/4 10%", 65536, topics=10, kv_heads=4),
    Case("64K 32/1 10%", 65536, topics=10, kv_heads=1),
    *(
        Case(
            f"{name}, heads of 64, chunks of {size}",
            tokens,
            topics=topics,
            kv_heads=8,
            head_dim=64,
            chunk_size=size,
        )
        for name, tokens, topics in (("16K 32/8 25%", 16384, 4), ("64K 32/8 10%", 65536, 10))
        for size in (64, 32)
    ),
]


def make_inputs(case: Case, tokens: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v, summary_query in bfloat16 and an upstream gradient; topics are the dial on density."""
    torch.manual_seed(seed)
    Hkv, D = case.kv_heads, case.head_dim

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    topics = noise(Hkv, case.topics, D)
    heads = torch.arange(Hkv, device="cuda")

    def topic(run: int) -> Tensor:
        pick = torch.randint(case.topics, (math.ceil(tokens / run), Hkv), device="cuda")
        return topics[heads, pick].repeat_interleave(run, dim=0)[None, :tokens]

    q, k = noise(1, tokens, case.heads, D), noise(1, tokens, Hkv, D)
    if case.structured:
        k += topic(case.chunk_size)
        q = 0.35 * q + topic(case.run).repeat_interleave(case.heads // Hkv, dim=2)
    leaves = [q, k, noise(1, tokens, Hkv, D), 0.1 * noise(Hkv, D)]
    return [x.requires_grad_() for x in leaves], noise(1, tokens, case.heads, D)


def make_router(case: Case) -> Router:
    return Router(case.chunk_size, case.scaling_factor, sigma=1.0)


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def check(case: Case) -> dict[str, float]:
    """Relative errors against float64 on the case's inputs, cut to a length where that fits; raises if too large."""
    leaves, upstream = make_inputs(case, min(case.tokens, CHECK_TOKENS))
    out, _ = dash.dash_attention_triton(*leaves, make_router(case), None)
    grads = torch.autograd.grad(out, leaves, upstream)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected, _ = dash_attention_reference(*doubles, make_router(case), None)
    expected_grads = torch.autograd.grad(expected, doubles, upstream.double())
    errors = {"out": relative_error(out, expected)}
    for name, grad, wanted in zip(("dq", "dk", "dv", "dw"), grads, expected_grads, strict=True):
        errors[name] = relative_error(grad, wanted)
    wrong = [name for name, e in errors.items() if not e <= (ALLOWED_OUT if name == "out" else ALLOWED_GRAD)]
    if wrong:
        raise AssertionError(f"{case.name}: relative errors {errors}, too large for {wrong}; not timed")
    return errors


def milliseconds(function: Callable[[], object], budget_ms: float = 250.0) -> float:
    """Median time of a call by CUDA events, after one call that compiles and one that tells how often to repeat."""
    function()

    def once() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    repeats = max(3, min(20, int(budget_ms / max(once(), 1e-3))))
    return statistics.median(once() for _ in range(repeats))


def time_dense(case: Case, backend: SDPBackend) -> tuple[float, float]:
    """Forward, and forward with backward, of dense causal attention."""
    leaves, upstream = make_inputs(case, case.tokens)
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in leaves[:3])
    upstream = upstream.transpose(1, 2)

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def forward_without_grad() -> Tensor:
        with torch.no_grad():
            return forward()

    return milliseconds(forward_without_grad), milliseconds(
        lambda: torch.autograd.grad(forward(), (q, k, v), upstream)
    )


class Stages:
    """Every stage of one forward and backward as a function to time; each keeps what the next ones need."""

    def __init__(self, case: Case, plan: configs.Plan | None = None, deterministic: bool = False) -> None:
        leaves, upstream = make_inputs(case, case.tokens)
        self.q, self.k, self.v = (x.detach()[0] for x in leaves[:3])
        self.w, self.d_out = leaves[3].detach(), upstream[0]
        self.plan = plan or configs.plan(
            self.q.device, self.q.dtype, case.head_dim, case.chunk_size, case.heads // case.kv_heads
        )
        self.router = make_router(case)
        self.sizes = geometry.measure(self.q[None], self.k[None], case.chunk_size, None, self.plan.tile_rows)
        self.deterministic = deterministic

    def layout(self) -> None:
        self.chunks, self.offsets = geometry.layout(self.sizes, 1, None, self.q.device)

    def summarize(self) -> None:
        self.summary = summarize(self.k, self.w, self.chunks, self.sizes)

    def route(self) -> None:
        self.lists, self.tau, self.mean_log, self.selected = route(
            self.q,
            self.summary,
            self.chunks,
            self.offsets,
            self.sizes,
            self.router,
            self.plan.route,
        )

    def attend(self) -> None:
        self.out, self.lse = attend(
            self.q, self.k, self.v, self.lists, self.mean_log, self.chunks, self.sizes, self.router,
            self.plan.attend,
        )  # fmt: skip

    def backward_queries(self) -> None:
        self.dq, self.d_prior, self.delta, self.centred_lse = backward_q(
            self.q, self.k, self.v, self.out, self.d_out, self.lse, self.lists, self.mean_log, self.chunks,
            self.sizes, self.router, self.plan.queries,
        )  # fmt: skip

    def backward_router(self) -> None:
        self.d_summary, self.mean_dp, _ = backward_router(
            self.q, self.summary, self.tau, self.dq, self.d_prior, self.lists, self.chunks, self.sizes,
            self.router, self.plan.router, self.deterministic,
        )  # fmt: skip

    def transpose(self) -> None:
        self.transposed = transpose(self.lists, self.chunks, self.sizes)
        parts = min(self.plan.parts, self.sizes.least_work)
        self.division = divide(self.transposed, self.chunks, self.sizes, parts)

    def backward_keys(self) -> None:
        self.dk, self.dv, self.dw = backward_kv(
            self.q, self.k, self.v, self.w, self.d_out, self.centred_lse, self.delta, self.tau, self.mean_log, self.mean_dp,
            self.summary, self.d_summary, self.d_prior, self.lists, self.transposed, self.division, self.chunks,
            self.sizes, self.router, self.plan.keys, self.deterministic,
        )  # fmt: skip

    FORWARD = ("layout", "summarize", "route", "attend")
    BACKWARD = ("backward_queries", "backward_router", "transpose", "backward_keys")

    def run(self, *names: str) -> None:
        for name in names:
            getattr(self, name)()

    def density(self) -> float:
        """Mean over tokens of chunks selected over chunks causally available."""
        available = torch.arange(len(self.q), device="cuda") // self.sizes.chunk_size + 1
        return (self.selected.double() / available[:, None]).mean().item()

    def products(self) -> float:
        """Floating-point operations of one matrix product over everything listed, own chunks included."""
        blocks = int(self.lists.counts.sum(dtype=torch.int64)) + self.sizes.num_tiles
        return 2.0 * blocks * self.sizes.tile_rows * self.sizes.chunk_size * self.sizes.head_dim


def time_ours(case: Case) -> tuple[dict[str, float], int, dict[str, float]]:
    """Milliseconds of whole calls, bytes a forward and backward takes beyond inputs, output and gradients, and `spread`."""
    leaves, upstream = make_inputs(case, case.tokens)

    def forward() -> Tensor:
        return dash.dash_attention_triton(*leaves, make_router(case), None)[0]

    def forward_without_grad() -> Tensor:
        with torch.no_grad():
            return forward()

    def both(deterministic: bool = False) -> tuple[Tensor, ...]:
        out, _ = dash.dash_attention_triton(*leaves, make_router(case), None, deterministic=deterministic)
        return out, *torch.autograd.grad(out, leaves, upstream)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = both()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)
    del results
    total = {
        "forward": milliseconds(forward_without_grad),
        "forward and backward": milliseconds(both),
        "forward and backward, deterministic": milliseconds(lambda: both(True)),
    }
    return total, extra, spread(both)


def spread(both: Callable[[], tuple[Tensor, ...]], runs: int = 5) -> dict[str, float]:
    """Largest relative difference of the output and the gradients between runs on the same inputs: what atomics do."""
    first, worst = both(), dict.fromkeys(("out", "dq", "dk", "dv", "dw"), 0.0)
    for _ in range(runs - 1):
        for name, x, again in zip(worst, first, both(), strict=True):
            difference = ((again.float() - x.float()).norm() / x.float().norm()).item()
            worst[name] = max(worst[name], difference)
    return worst


def time_case(case: Case, dense: dict[str, tuple[float, float]]) -> dict[str, object]:
    """All figures of one case, in milliseconds, TFLOP/s and bytes."""
    total, extra, differences = time_ours(case)
    stages = Stages(case)
    names = (*Stages.FORWARD, *Stages.BACKWARD)
    stages.run(*names)
    times = {
        name: milliseconds(lambda name=name: stages.run(name)) for name in names if name != "backward_router"
    }
    # adds to dq in place: what it adds to does not change its time
    times["backward_router"] = milliseconds(stages.backward_router)
    density, product = stages.density(), stages.products()
    rates = {"attend": 2 * product, "backward_queries": 3 * product, "backward_keys": 4 * product}
    result = {
        "case": asdict(case),
        "density": density,
        "tiles": {"rows": stages.sizes.tile_rows, "tokens": stages.sizes.tile_tokens},
        "listed_over_selected": product
        / (
            2.0
            * stages.selected.sum(dtype=torch.float64).item()
            * stages.sizes.group
            * case.chunk_size
            * case.head_dim
        ),
        "milliseconds": total,
        "stages": times,
        "tflops": {name: work / times[name] / 1e9 for name, work in rates.items()},
        "extra_memory_bytes": extra,
        "spread": differences,
        "dense": dense,
        "speedup": {},
        "fraction_of_ideal": {},
    }
    for name, (forward_ms, both_ms) in dense.items():
        ours = total["forward"], total["forward and backward"]
        result["speedup"][name] = (forward_ms / ours[0], both_ms / ours[1])
    if "cudnn" in dense:
        forward_ms, both_ms = dense["cudnn"]
        result["fraction_of_ideal"] = (
            density * forward_ms / total["forward"],
            density * both_ms / total["forward and backward"],
        )
    return result


def time_reference(case: Case) -> tuple[float, float]:
    leaves, upstream = make_inputs(case, case.tokens)

    def both() -> tuple[Tensor, ...]:
        out, _ = dash_attention_reference(*leaves, make_router(case), None)
        return torch.autograd.grad(out, leaves, upstream)

    def forward() -> Tensor:
        with torch.no_grad():
            return dash_attention_reference(*leaves, make_router(case), None)[0]

    return milliseconds(forward), milliseconds(both)


def print_table(result: dict[str, object]) -> None:
    case, total = result["case"], result["milliseconds"]
    print(
        f"\n{case['name']}: density {result['density']:.1%}, tiles of {result['tiles']['tokens']} tokens, "
        f"listed/selected {result['listed_over_selected']:.2f}, "
        f"extra memory {result['extra_memory_bytes'] / 2**30:.2f} GiB"
    )
    print(f"  {'':28s}{'forward':>10s}{'fwd+bwd':>10s}{'ratio':>8s}{'ratio':>8s}")
    for name, (forward_ms, both_ms) in result["dense"].items():
        ratios = result["speedup"][name]
        print(f"  {name:28s}{forward_ms:10.2f}{both_ms:10.2f}{ratios[0]:8.2f}{ratios[1]:8.2f}")
    print(f"  {'ours':28s}{total['forward']:10.2f}{total['forward and backward']:10.2f}")
    print(f"  {'ours, deterministic':28s}{'':10s}{total['forward and backward, deterministic']:10.2f}")
    if result["fraction_of_ideal"]:
        a, b = result["fraction_of_ideal"]
        print(f"  {'fraction of density x cuDNN':28s}{a:10.2f}{b:10.2f}")
    parts = [
        f"{name} {ms:.2f}" + (f" ({result['tflops'][name]:.0f} TFLOP/s)" if name in result["tflops"] else "")
        for name, ms in result["stages"].items()
    ]
    print("  " + ", ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="names of cases; default: those of the goals")
    parser.add_argument(
        "--more", action="store_true", help="also other run lengths, group sizes and densities"
    )
    parser.add_argument("--json", default="attention.json", help="file to write")
    parser.add_argument("--no-flash", action="store_true", help="skip dense flash attention")
    args = parser.parse_args()
    cases = CASES + (MORE_CASES if args.more else [])
    if args.cases:
        by_name = {c.name: c for c in CASES + MORE_CASES}
        cases = [by_name[name] for name in args.cases]
    header = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "implementation": implementation_fingerprint(),
    }
    print(header)
    results, dense_of, errors_of = [], {}, {}
    for case in cases:
        try:
            # cut to the length of the check, many cases are the same
            short = replace(case, tokens=min(case.tokens, CHECK_TOKENS), name="")
            if short not in errors_of:
                errors_of[short] = check(case)
            errors = errors_of[short]
        except AssertionError as error:
            print(f"\nREFUSED {error}", flush=True)
            results.append({"case": asdict(case), "refused": str(error)})
            continue
        print(f"\n{case.name}: relative errors " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        key = case.tokens, case.heads, case.kv_heads, case.head_dim
        if key not in dense_of:
            dense_of[key] = {"cudnn": time_dense(case, SDPBackend.CUDNN_ATTENTION)}
            if not args.no_flash:
                dense_of[key]["flash"] = time_dense(case, SDPBackend.FLASH_ATTENTION)
        dense = dict(dense_of[key])
        if case.tokens <= REFERENCE_TOKENS:
            dense["reference"] = time_reference(case)
        results.append({**time_case(case, dense), "errors": errors})
        print_table(results[-1])
        Path(args.json).write_text(json.dumps({**header, "results": results}, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
