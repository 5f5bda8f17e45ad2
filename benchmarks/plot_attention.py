"""Draw what `benchmarks/attention.py` measured: time against density at one length, and time against length.

python benchmarks/plot_attention.py attention.json --output docs/results/kernels.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dash_megatron.command_line import ending_with_reader
from dash_megatron.drawing import COLORS, GRID, plt, save

TOTALS = ("forward", "forward and backward")
# Dense attention that times are compared with; "math" is all there is without a GPU.
NAMES = {"cudnn": "cuDNN", "math": "dense"}
COLOR_OF = dict(zip(TOTALS, COLORS, strict=False))


@ending_with_reader()
def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what attention.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--tokens", type=int, default=65536, help="length of the plot against density")
    parser.add_argument("--topics", type=int, default=10, help="density dial of the plot against length")
    options = parser.parse_args()
    measured = json.loads(options.json.read_text())
    first = measured["results"][0]["case"]
    rows = [row for row in measured["results"] if "refused" not in row and _is_like(row["case"], first)]
    dense = "cudnn" if "cudnn" in rows[0]["dense"] else "math"
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8))
    _against_density(axes[0], [row for row in rows if row["case"]["tokens"] == options.tokens], dense)
    _against_length(axes[1], [row for row in rows if row["case"]["topics"] == options.topics], dense)
    heads = f"{first['heads']} query and {first['kv_heads']} key/value heads"
    figure.suptitle(f"{measured['gpu']}, bf16, {heads}, D = {first['head_dim']}, C = {first['chunk_size']}")
    figure.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save(figure, options.output, dpi=150)


def _is_like(case: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether a case differs from the first one in nothing but its length and its density."""
    return all(case[key] == first[key] for key in first.keys() - {"name", "tokens", "topics"})


def _against_density(axis: Any, rows: list[dict[str, Any]], dense: str) -> None:
    rows = sorted(rows, key=lambda row: row["density"])
    density = np.array([row["density"] for row in rows])
    for index, name in enumerate(TOTALS):
        times = np.array([row["milliseconds"][name] for row in rows])
        axis.plot(100 * density, times, "o", color=COLOR_OF[name], label=f"DashAttention, {name}")
        slope, offset = np.polyfit(density, times, 1)
        line = np.array([0, density.max()])
        label = f"{offset:.1f} ms + {slope / 100:.2f} ms per % of density"
        axis.plot(100 * line, offset + slope * line, "-", lw=1, color=COLOR_OF[name], label=label)
        time = rows[0]["dense"][dense][index]
        axis.axhline(
            time, ls="--", lw=1, color=COLOR_OF[name], label=f"{NAMES[dense]}, {name}: {time:.0f} ms"
        )
    axis.set_xlabel("density measured (% of causal chunks)")
    axis.set_ylabel("milliseconds")
    axis.set_title(f"{rows[0]['case']['tokens']} tokens")
    axis.set_ylim(0)
    axis.grid(alpha=GRID)
    axis.legend(fontsize=8)


def _against_length(axis: Any, rows: list[dict[str, Any]], dense: str) -> None:
    rows = sorted(rows, key=lambda row: row["case"]["tokens"])
    tokens = [row["case"]["tokens"] / 1024 for row in rows]
    for index, name in enumerate(TOTALS):
        ours = [row["milliseconds"][name] for row in rows]
        others = [row["dense"][dense][index] for row in rows]
        axis.plot(tokens, ours, "o-", color=COLOR_OF[name], label=f"DashAttention, {name}")
        axis.plot(tokens, others, "s--", color=COLOR_OF[name], label=f"{NAMES[dense]}, {name}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [f"{count:g}K" for count in tokens])
    axis.set_xlabel("tokens")
    axis.set_ylabel("milliseconds")
    share = [row["density"] for row in rows]
    axis.set_title(f"density {min(share):.0%} to {max(share):.0%}")
    axis.grid(alpha=GRID, which="both")
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
