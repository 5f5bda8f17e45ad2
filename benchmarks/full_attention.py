"""Time full attention on packed rows, by every implementation that is here.

    python benchmarks/full_attention.py --json full.json

Rows of documents that do not attend to each other: two, eight and as many as a row of short texts has. `pairs` are the
causal pairs of query and key of the row over those of one document. TFLOP/s count these pairs alone, 4 operations a pair and
element of a head forward, 10 more backward. `flex` is torch's FlexAttention with a mask of documents, compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.inputs import default_device, device_name
from benchmarks.timing import milliseconds
from dash_megatron.command_line import ending_with_reader
from dash_megatron.ops.full import IMPLEMENTATIONS, packed_attention, pick_implementation, why_unavailable

MEAN_SHORT = 1500
FORWARD, BACKWARD = 4, 10


class Row(NamedTuple):
    """What one line of the table times."""

    name: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: int


SHAPES = {"1B": (32, 8, 64), "8B": (32, 8, 128)}
ROWS = [
    Row(f"{shape} {tokens // 1024}K", tokens, *SHAPES[shape], documents)
    for shape in SHAPES
    for tokens in (16384, 65536)
    for documents in (2, 8, tokens // MEAN_SHORT)
]
TINY = [Row("tiny", 128, 4, 2, 16, documents) for documents in (2, 8)]


@ending_with_reader()
def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*IMPLEMENTATIONS, "flex"], help="implementations")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--tiny", action="store_true", help="128 tokens, any device")
    options = parser.parse_args()
    device = default_device()
    print(f"{device_name(device)}, torch {torch.__version__}")
    print(
        f"{'row':8} {'documents':>9} {'pairs':>6} {'way':>8} {'forward':>8} {'both':>8} {'TFLOP/s':>8} {'error':>8}"
    )
    results: list[dict[str, Any]] = []
    for row in TINY if options.tiny else ROWS:
        q, k, v, starts = _inputs(row, device)
        for name in options.only:
            results.append({**row._asdict(), "way": name, **_measure(row, name, q, k, v, starts)})
            _print(results[-1])
    best = pick_implementation(q)
    print(f"training takes {best}")
    if options.json is not None:
        found = {"device": device_name(device), "torch": torch.__version__, "auto": best, "results": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _inputs(row: Row, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random tensors and where documents start; their lengths are random with the same mean."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    borders = torch.randperm(row.tokens - 1, generator=generator)[: row.documents - 1].sort().values + 1
    starts = torch.tensor([0, *borders.tolist(), row.tokens], dtype=torch.int32, device=device)
    q, k, v = (
        torch.randn(row.tokens, heads, row.head_dim, generator=generator).to(device, dtype).requires_grad_()
        for heads in (row.heads, row.kv_heads, row.kv_heads)
    )
    return q, k, v, starts


def _measure(row: Row, name: str, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> dict[str, Any]:
    """Milliseconds, rate and error of one implementation, or why there are none."""
    lengths = starts.diff()
    pairs = (lengths.double() * (lengths.double() + 1) / 2).sum().item()
    found: dict[str, Any] = {"pairs": pairs / (row.tokens * (row.tokens + 1) / 2)}
    reason = why_unavailable("varlen" if name == "flex" else name, q)
    if reason is not None:
        return {**found, "reason": reason}
    try:
        attend = _flex(starts) if name == "flex" else partial(_packed, name, starts, int(lengths.max()))
        weight = torch.randn_like(q)
        out, expected = attend(q, k, v), packed_attention(q, k, v, starts, int(lengths.max()), "each")
        errors = [_error(out, expected)]
        wanted = torch.autograd.grad(expected, (q, k, v), weight)
        errors += [
            _error(x, y) for x, y in zip(torch.autograd.grad(out, (q, k, v), weight), wanted, strict=True)
        ]

        def both() -> None:
            torch.autograd.grad(attend(q, k, v), (q, k, v), weight)

        with torch.no_grad():
            forward = milliseconds(lambda: attend(q, k, v), q.device)
        whole = milliseconds(both, q.device)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return {**found, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    operations = (FORWARD + BACKWARD) * pairs * row.heads * row.head_dim
    return {
        **found,
        "forward_ms": forward,
        "both_ms": whole,
        "tflops": operations / whole / 1e9,
        "error": max(errors),
    }


def _packed(name: str, starts: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return packed_attention(q, k, v, starts, longest, name)


def _flex(starts: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, whose mask is made here, once for a batch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = int(starts[-1])
    number = torch.bucketize(torch.arange(tokens, device=starts.device), starts[1:].long(), right=True)
    mask = create_block_mask(
        lambda b, h, i, j: (number[i] == number[j]) & (i >= j), None, None, tokens, tokens, starts.device
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = compiled(*heads_first, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def _error(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def _print(found: dict[str, Any]) -> None:
    start = f"{found['name']:8} {found['documents']:>9} {found['pairs']:>6.1%} {found['way']:>8}"
    if "reason" in found:
        print(f"{start} {found['reason']}", flush=True)
        return
    print(
        f"{start} {found['forward_ms']:>8.3f} {found['both_ms']:>8.3f} {found['tflops']:>8.1f} {found['error']:>8.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
