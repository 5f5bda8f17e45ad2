"""Time DashAttention's Triton kernels against dense attention on one GPU, stage by stage: `python benchmarks/attention.py`.

Prints one table per case and writes everything as JSON. A case whose check against float64 fails is not timed.
`--routing trained` takes the chunks that trained routers selected (`benchmarks/choices`) in place of the router's own.
Without a GPU, `TRITON_INTERPRET=1 python benchmarks/attention.py --tiny` walks through everything on a few tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import CASES, MORE_CASES, TINY_CASES, TRAINED, TRAINED_TINY, trained_cases, with_routing
from benchmarks.inputs import default_device, device_name, kernels_run
from benchmarks.stages import Case, Stages, given_chunks, make_inputs
from benchmarks.timing import dense_backends, milliseconds, wait
from dash_megatron.command_line import ending_with_reader
from dash_megatron.ops import dash_attention
from dash_megatron.ops.fingerprint import implementation_fingerprint

# Largest relative errors of bfloat16 output and gradients before a case is refused.
ALLOWED_OUT, ALLOWED_GRAD = 1e-2, 4e-2
CHECK_TOKENS = 4096
REFERENCE_TOKENS = 4096
DEVICE = default_device()


def attend(case: Case, leaves: list[Tensor], backend: str = "triton") -> Tensor:
    """DashAttention's output for a case's leaves."""
    q, k, v, w = leaves
    router: dict[str, Any] = {
        "chunk_size": case.chunk_size,
        "scaling_factor": case.scaling_factor,
        "sigma": 1.0,
    }
    return dash_attention(q, k, v, w, **router, backend=backend)


@contextmanager
def deterministic() -> Iterator[None]:
    """Let gradients be the same to the last bit in every run; memory is not filled before it is written."""
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        memory.fill_uninitialized_memory = fill


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def check(case: Case) -> dict[str, float]:
    """Relative errors against float64 on the case's inputs, cut to a length where that fits; raises if too large."""
    case = replace(case, tokens=min(case.tokens, CHECK_TOKENS), batch=1)
    leaves, upstream = make_inputs(case, DEVICE)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    if case.model:
        # a router that decides nothing has no gradient for summary_query
        doubles = doubles[:-1]
        expected = attend_to_given(case, doubles)
        ours = [x[None] for x in whole_calls(case)[1]()[:-1]]
    else:
        expected = attend(case, doubles, "reference")
        ours = [*whole_calls(case)[1]()]
    wanted = expected, *torch.autograd.grad(expected, doubles, upstream.double())
    names = ("out", "dq", "dk", "dv", "dw")[: len(wanted)]
    errors = {name: relative_error(x, y) for name, x, y in zip(names, ours, wanted, strict=True)}
    wrong = [name for name, e in errors.items() if not e <= (ALLOWED_OUT if name == "out" else ALLOWED_GRAD)]
    if wrong:
        raise AssertionError(f"{case.name}: relative errors {errors}, too large for {wrong}; not timed")
    return errors


def attend_to_given(case: Case, qkv: list[Tensor]) -> Tensor:
    """Attention of q, k, v to each token's own chunk and to those the trained model of a case selected."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    token_N = torch.arange(case.tokens, device=DEVICE)
    seen_HNc = given_chunks(case, DEVICE).clone()
    seen_HNc[:, token_N, token_N // case.chunk_size] = True
    seen_HNN = seen_HNc.repeat_interleave(case.chunk_size, 2) & (token_N <= token_N[:, None])
    mask = seen_HNN.repeat_interleave(case.heads // case.kv_heads, 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def whole_calls(
    case: Case, reproducible: bool = False, backend: str = "triton"
) -> tuple[Callable[[], Tensor], Callable[[], Sequence[Tensor]]]:
    """The forward, and the forward with its backward, which gives the output and the gradients of q, k, v, summary_query.

    Chunks that are given come from the stages, one after the other, without autograd and without a leading 1 in shapes.
    """
    if case.model:
        stages = Stages(case, DEVICE, deterministic=reproducible)

        def forward_stages() -> Tensor:
            stages.run(*Stages.FORWARD)
            return stages.out

        def all_stages() -> Sequence[Tensor]:
            stages.run(*Stages.FORWARD, *Stages.BACKWARD)
            return stages.out, stages.dq, stages.dk, stages.dv, stages.dw

        return forward_stages, all_stages
    leaves, upstream = make_inputs(case, DEVICE)

    def forward_without_grad() -> Tensor:
        with torch.no_grad():
            return attend(case, leaves, backend)

    def both() -> Sequence[Tensor]:
        out = attend(case, leaves, backend)
        return out, *torch.autograd.grad(out, leaves, upstream)

    return forward_without_grad, both


def time_dense(case: Case, backend: SDPBackend) -> tuple[float, float]:
    """Forward, and forward with backward, of dense causal attention."""
    leaves, upstream = make_inputs(case, DEVICE)
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in leaves[:3])
    upstream = upstream.transpose(1, 2)

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def forward_without_grad() -> Tensor:
        with torch.no_grad():
            return forward()

    both = milliseconds(lambda: torch.autograd.grad(forward(), (q, k, v), upstream), DEVICE)
    return milliseconds(forward_without_grad, DEVICE), both


def time_ours(case: Case, repeatable: bool) -> tuple[dict[str, float], int, dict[str, float]]:
    """Milliseconds of whole calls, bytes a forward and backward takes beyond inputs, output and gradients, and `spread`.

    The bytes are not measured where chunks are given: 0. Unless `repeatable`, there are no deterministic calls and no spread.
    """
    forward, both = whole_calls(case)
    extra = 0 if case.model else extra_memory(both)
    total = {
        "forward": milliseconds(forward, DEVICE),
        "forward and backward": milliseconds(both, DEVICE),
    }
    if not repeatable:
        return total, extra, {}
    with deterministic():
        total["forward and backward, deterministic"] = milliseconds(whole_calls(case, True)[1], DEVICE)
    return total, extra, spread(both)


def extra_memory(both: Callable[[], Sequence[Tensor]]) -> int:
    """Bytes that a call takes at its peak beyond what it returns; 0 without a GPU."""
    if DEVICE.type != "cuda":
        return 0
    both()
    wait(DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = both()
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)


def spread(both: Callable[[], Sequence[Tensor]]) -> dict[str, float]:
    """Largest relative difference of the output and the gradients between runs on the same inputs: what atomics do."""
    runs = 5 if DEVICE.type == "cuda" else 2
    first, worst = both(), dict.fromkeys(("out", "dq", "dk", "dv", "dw"), 0.0)
    for _ in range(runs - 1):
        for name, x, again in zip(worst, first, both(), strict=True):
            difference = ((again.float() - x.float()).norm() / x.float().norm()).item()
            worst[name] = max(worst[name], difference)
    return worst


def time_case(case: Case, dense: dict[str, tuple[float, float]], repeatable: bool) -> dict[str, Any]:
    """All figures of one case, in milliseconds, TFLOP/s and bytes."""
    total, extra, differences = time_ours(case, repeatable)
    stages = Stages(case, DEVICE)
    names = (*Stages.FORWARD, *Stages.BACKWARD)
    stages.run(*names)
    # the router's backward adds to dq in place: what it adds to does not change its time
    times = {name: milliseconds(getattr(stages, name), DEVICE) for name in names}
    density, product = stages.density(), stages.products()
    visited, selected = stages.listed_and_selected()
    available = int(stages.available().sum()) * case.kv_heads
    rates = {"attend": 2 * product, "backward_queries": 3 * product, "backward_keys": 4 * product}
    result: dict[str, Any] = {
        "case": asdict(case),
        "density": density,
        "tiles": {"rows": stages.sizes.tile_rows, "tokens": stages.sizes.tile_tokens},
        "pairs": {"selected": selected, "visited": visited, "available": available},
        "listed_over_selected": visited / selected,
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
            selected / available * forward_ms / total["forward"],
            selected / available * both_ms / total["forward and backward"],
        )
    return result


def print_table(result: dict[str, Any]) -> None:
    case, total = result["case"], result["milliseconds"]
    print(
        f"\n{case['name']}: density {result['density']:.1%}, tiles of {result['tiles']['tokens']} tokens, "
        f"{result['pairs']['selected'] / 1e6:.2f}M pairs of a token and a chunk selected, "
        f"{result['pairs']['visited'] / 1e6:.2f}M visited ({result['listed_over_selected']:.2f} times as many), "
        f"extra memory {result['extra_memory_bytes'] / 2**30:.2f} GiB"
    )
    print(f"  {'':28s}{'forward':>10s}{'fwd+bwd':>10s}{'ratio':>8s}{'ratio':>8s}")
    for name, (forward_ms, both_ms) in result["dense"].items():
        ratios = result["speedup"][name]
        print(f"  {name:28s}{forward_ms:10.2f}{both_ms:10.2f}{ratios[0]:8.2f}{ratios[1]:8.2f}")
    print(f"  {'ours':28s}{total['forward']:10.2f}{total['forward and backward']:10.2f}")
    if repeatable := total.get("forward and backward, deterministic"):
        print(f"  {'ours, deterministic':28s}{'':10s}{repeatable:10.2f}")
    if result["fraction_of_ideal"]:
        a, b = result["fraction_of_ideal"]
        print(f"  {'share of ideal':28s}{a:10.2f}{b:10.2f}   (selected pairs at cuDNN's time a pair)")
    parts = [
        f"{name} {ms:.2f}" + (f" ({result['tflops'][name]:.0f} TFLOP/s)" if name in result["tflops"] else "")
        for name, ms in result["stages"].items()
    ]
    print("  " + ", ".join(parts), flush=True)


class Suite:
    """Runs cases; what many of them share, their checks and dense attention, is done once."""

    def __init__(self, flash: bool, repeatable: bool) -> None:
        self.repeatable = repeatable
        self.dense = {name: x for name, x in dense_backends(DEVICE).items() if flash or name != "flash"}
        self.dense_of: dict[tuple[int, ...], dict[str, tuple[float, float]]] = {}
        self.errors_of: dict[Case, dict[str, float]] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """Check, time and print one case."""
        try:
            # cut to the length of the check, many cases are the same
            short = replace(case, tokens=min(case.tokens, CHECK_TOKENS), name="", batch=1)
            if short not in self.errors_of:
                self.errors_of[short] = check(case)
            errors = self.errors_of[short]
        except AssertionError as error:
            print(f"\nREFUSED {error}", flush=True)
            return {"case": asdict(case), "refused": str(error)}
        print(f"\n{case.name}: relative errors " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        key = case.batch, case.tokens, case.heads, case.kv_heads, case.head_dim
        if key not in self.dense_of:
            self.dense_of[key] = {name: time_dense(case, backend) for name, backend in self.dense.items()}
        dense = dict(self.dense_of[key])
        if case.tokens <= REFERENCE_TOKENS and not case.model:
            forward, both = whole_calls(case, backend="reference")
            dense["reference"] = milliseconds(forward, DEVICE), milliseconds(both, DEVICE)
        result = {**time_case(case, dense, self.repeatable), "errors": errors}
        print_table(result)
        return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="names of cases; default: those of the goals")
    parser.add_argument(
        "--more", action="store_true", help="also other run lengths, group sizes and densities"
    )
    parser.add_argument("--tiny", action="store_true", help="a few hundred tokens, narrow heads, any device")
    parser.add_argument(
        "--routing",
        metavar="HOW",
        help="which chunks queries select: `independent` (each its own topic), `runs:N` (N queries share one), `unstructured` (no "
        "topics), `trained` (cases of benchmarks/choices: the middle layers, of the last router and with --more all), "
        "`trained:MODEL:LAYER` (the usual cases with choices like this layer's and its chunk size); default: as the case says",
    )
    parser.add_argument(
        "--tokens", type=int, help="of each row; choices of trained routers are made where files are shorter"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="rows of each case's tokens in one batch; default: 1"
    )
    parser.add_argument("--json", default="attention.json", help="file to write")
    parser.add_argument("--no-flash", action="store_true", help="skip dense flash attention")
    parser.add_argument(
        "--no-deterministic",
        action="store_true",
        help="skip deterministic gradients, whose kernels compile anew, and the comparison of runs with each other",
    )
    options = parser.parse_args()
    if not kernels_run(DEVICE):
        parser.error(
            "there is no GPU; set TRITON_INTERPRET=1 and add --tiny to run the kernels in Triton's interpreter"
        )
    options.cases = pick_cases(options, parser)
    return options


def pick_cases(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """The cases that the options ask for."""
    like = {f"trained:{case.model}:{case.layer}" for case in trained_cases(TRAINED)}
    usual = r"independent|unstructured|trained|runs:[1-9]\d*"
    if options.routing and not re.fullmatch(usual, options.routing) and options.routing not in like:
        parser.error(
            f"--routing {options.routing} must be independent, runs:N, unstructured or trained, or one of {sorted(like)}"
        )
    if options.routing == "trained":
        by_name = {case.name: case for case in trained_cases(TRAINED_TINY if options.tiny else TRAINED)}
        tiny = [by_name["d11, layer 2"]]
        few = [x for x in by_name.values() if options.more or x.layer == 2 or "_w4" in x.model]
        default = tiny if options.tiny else few
    else:
        by_name = {case.name: case for case in CASES + MORE_CASES + TINY_CASES}
        default = TINY_CASES if options.tiny else CASES + (MORE_CASES if options.more else [])
    unknown = set(options.cases or []) - set(by_name)
    if unknown:
        parser.error(f"--cases {sorted(unknown)} must be among {list(by_name)}")
    cases = [by_name[name] for name in options.cases] if options.cases else default
    if options.routing not in (None, "trained"):
        cases = [with_routing(case, options.routing) for case in cases]
    for name, value in (("batch", options.batch), ("tokens", options.tokens)):
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    if options.tokens:
        cases = [
            replace(case, name=f"{case.name}, {options.tokens} tokens", tokens=options.tokens)
            for case in cases
        ]
    if options.batch > 1:
        cases = [replace(case, name=f"{options.batch} x {case.name}", batch=options.batch) for case in cases]
    return cases


@ending_with_reader()
def main() -> None:
    """Run from the command line."""
    options = parse()
    header = {
        "gpu": device_name(DEVICE),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "implementation": implementation_fingerprint(),
    }
    print(header)
    suite, results = Suite(not options.no_flash, not options.no_deterministic), []
    for case in options.cases:
        results.append(suite.run(case))
        Path(options.json).write_text(json.dumps({**header, "results": results}, indent=1))
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
