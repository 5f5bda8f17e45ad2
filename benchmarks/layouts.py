"""Time whole training steps of the layouts that `plan` gives, and set speed and memory beside what it said of them.

    python benchmarks/layouts.py --gpus 8 --output layouts
    python benchmarks/layouts.py --gpus 16 --output layouts --launcher "srun -n {gpus} --kill-on-bad-exit=1"
    python benchmarks/layouts.py --gpus 2 --output layouts --config configs/8b_64k.yaml --base --batch 2 model.layers=6 \\
        --layout "parallel.context=2 parallel.context_comm=p2p" --layout "parallel.context=1 parallel.tensor=2"

For every config and kind of attention (DashAttention and its full twin) these are the best layout on that many GPUs and
its runner-up, or those given. Weights and tokens are random; DashAttention's routers make way for the choices of trained
ones, as in `benchmarks/step.py --routing trained`. A step has one micro-batch a data rank, or `--batch` sequences.
Every case has processes of its own and a time limit; one that fails is a row with its error. `rows.jsonl`, `table.txt` and the
cases' logs are written to the output folder. `planned` is for the density measured. Of one profiled step of rank 0 are `communication`:
the share of it in which NCCL's kernels ran, and (`waited for`) no other kernel did; `idle`: in which none did; and in
`rows.jsonl` the `milliseconds` of kernels by class.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dash_megatron.command_line import ending_with_reader, parse_with_overrides
from dash_megatron.config import Config, load_config
from dash_megatron.launcher import launch
from dash_megatron.planning.layout import Hardware, Layout
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.planning.search import configured_layout, estimate_configured, search
from dash_megatron.planning.table import table

CONFIGS = ("configs/8b_64k.yaml", "configs/8b_128k.yaml", "configs/8b_512k.yaml")
# with this factor random weights select few chunks, as trained ones do, so that the router has as little to list
ROUTER = ("attention.target_density=null", "attention.scaling_factor=4")
ONE_GPU = "parallel.tensor=1 parallel.context=1 parallel.sequence=false zero.stage=1"
COLUMNS = (
    "config", "attention", "GPUs", "layout", "density", "tokens/s/GPU", "of one", "MFU", "s/step", "planned", "ratio",
    "GiB", "planned", "ratio", "communication", "waited for", "idle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout to be timed."""

    config: str
    kind: str
    gpus: int
    overrides: list[str]
    """All `section.key=value` of the config, the layout's included."""
    routing: str
    steps: int
    limit: float
    """Seconds after which the processes are killed."""
    trace: str | None = None
    """Where to write a Chrome trace of one step."""
    tiny: bool = False
    """Whether a CPU may run it."""

    def load(self) -> Config:
        """The config of the run."""
        return load_config(self.config, self.overrides)


@ending_with_reader()
def main() -> None:
    """Run from the command line."""
    options = _arguments()
    if options.start:
        case = Case(**json.loads(options.start.read_text()))
        raise SystemExit(launch(_one_process(options.start), case.gpus))
    # an order to stop, as from `timeout`, must reach the processes of a case
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.output.mkdir(parents=True, exist_ok=True)
    options.end = time.monotonic() + options.seconds
    wanted = [
        (place, config, kind, *layout)
        for config in options.config or CONFIGS
        for kind in options.kind
        for place, layout in enumerate(_layouts(config, kind, options))
    ]
    rows: list[dict[str, Any]] = []
    # the best of all first, then the runners-up
    for _, config, kind, gpus, layout in sorted(wanted, key=lambda case: case[0]):
        row = {"config": config, "kind": kind, "gpus": gpus, "layout": layout}
        rows.append(row | _measure(config, kind, gpus, layout, options, len(rows)))
        _add_efficiency(rows)
        _write(rows, options.output)
    lines = table([_cells(row) for row in rows], COLUMNS)
    (options.output / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU")
    parser.add_argument("--output", type=Path, default=Path("layouts"), help="folder of rows, table and logs")
    parser.add_argument("--config", action="append", help="may be repeated; default: the 8B configs")
    parser.add_argument("--kind", nargs="+", choices=("dash", "full"), default=["dash", "full"])
    parser.add_argument("--top", type=int, default=2, help="of the plan's layouts; default: 2")
    parser.add_argument(
        "--layout", action="append", help="overrides of a layout in place of the plan's; may be repeated"
    )
    parser.add_argument(
        "--base", action="store_true", help="time one GPU too, for the efficiency of the others"
    )
    parser.add_argument("--batch", type=int, help="sequences a step; default: one micro-batch a data rank")
    parser.add_argument("--density", type=float, default=0.1, help="for which to plan; default: 0.1")
    parser.add_argument("--gpu", default="H200", help="for which to plan, as `plan --gpu`")
    parser.add_argument(
        "--routing",
        default="trained",
        help="trained: the first fitting file of benchmarks/choices; the name of one; own: what random weights select",
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="steps timed, after two to warm up; fewer near the limit"
    )
    parser.add_argument("--limit", type=float, default=600, help="seconds of a case; default: 600")
    parser.add_argument(
        "--seconds", type=float, default=86400, help="of all cases; those too late are left out"
    )
    parser.add_argument(
        "--launcher",
        type=shlex.split,
        help="starts a case instead of this machine's own processes; {gpus} of them",
    )
    parser.add_argument("--trace", action="store_true", help="keep a Chrome trace of one step of each case")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, 256 tokens, any device")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parse_with_overrides(parser)
    if options.launcher is not None and shutil.which(next(iter(options.launcher), "")) is None:
        parser.error(
            f"--launcher {shlex.join(options.launcher)!r} must begin with a program that is installed here"
        )
    return options


def _overrides(kind: str, options: argparse.Namespace) -> list[str]:
    """Of all layouts of a kind of attention."""
    from benchmarks.inputs import TINY_STEP

    # the smallest chunks of which trained routers' choices are there
    tiny = [*TINY_STEP, "attention.chunk_size=32"] if options.tiny else []
    return [*ROUTER, *tiny, *options.overrides, f"attention.kind={kind}"]


def _layouts(config: str, kind: str, options: argparse.Namespace) -> list[tuple[int, str]]:
    """Numbers of GPUs and overrides of layouts: the base, and the given ones or the plan's."""
    found = [(1, ONE_GPU)] if options.base else []
    if options.layout:
        return found + [(options.gpus, layout) for layout in options.layout]
    try:
        loaded = load_config(config, _overrides(kind, options))
        routing = AssumedRouting(density=options.density)
        best = search(loaded, options.gpus, routing, Hardware.of(options.gpu))[: options.top]
    except ValueError as error:
        print(f"no plan for {config}, {kind}: {error}", flush=True)
        return found
    return found + [(options.gpus, as_overrides(estimate.layout)) for estimate in best]


def as_overrides(layout: Layout) -> str:
    """The `section.key=value` pairs that give a config the layout."""
    return (
        f"parallel.tensor={layout.tensor} parallel.context={layout.context} parallel.context_comm={layout.context_comm} "
        f"parallel.sequence={str(layout.sequence).lower()} zero.stage={layout.zero_stage} training.recompute={layout.recompute}"
    )


def in_words(layout: Layout) -> str:
    """The layout as a table shows it, such as `data 2 context 4 a2a ZeRO 3 none`."""
    sizes = [f"data {layout.data}"]
    sizes += [f"context {layout.context} {layout.context_comm}"] if layout.context > 1 else []
    sizes += [f"tensor {layout.tensor}{' sequence' if layout.sequence else ''}"] if layout.tensor > 1 else []
    return " ".join([*sizes, f"ZeRO {layout.zero_stage}", layout.recompute])


def _measure(
    config: str, kind: str, gpus: int, layout: str, options: argparse.Namespace, number: int
) -> dict[str, Any]:
    """What a row says beside its case: the figures measured and planned, or an error."""
    name = f"{number:02d}_{Path(config).stem}_{kind}_{gpus}"
    left = min(options.limit, options.end - time.monotonic())
    if left < min(60.0, options.limit):
        return {"error": f"no time left of --seconds {options.seconds:g}"}
    overrides = [*_overrides(kind, options), *layout.split()]
    trace = str(options.output / f"{name}.trace.json.gz") if options.trace else None
    try:
        # how many data ranks there are is not known before; the batch of the config may not divide by them
        loaded = load_config(config, overrides)
        batch = options.batch or loaded.training.micro_batch * loaded.data_parallel_size(gpus)
        overrides.append(f"training.global_batch={batch}")
        case = Case(config, kind, gpus, overrides, options.routing, options.steps, left, trace, options.tiny)
        loaded = case.load()
        loaded.accumulation_steps(gpus)
        hardware = Hardware.of(options.gpu)
    except ValueError as error:
        return {"error": str(error)}
    found = _in_processes(case, options.output / f"{name}.json", options.launcher)
    if "error" in found:
        return found
    routing = AssumedRouting(density=found["density"], peak_density=found["density"])
    estimate = estimate_configured(loaded, gpus, routing, hardware)
    planned = estimate.memory.total / 2**30 - hardware.reserved_gib
    memory = found["memory_gib"]
    return found | {
        "layout_words": in_words(configured_layout(loaded, gpus)),
        "sequences": batch,
        "tokens_per_second_per_gpu": estimate.tokens / found["seconds"] / gpus,
        "planned_seconds": estimate.seconds,
        "planned_parts": estimate.parts,
        "seconds_ratio": found["seconds"] / estimate.seconds,
        "planned_memory_gib": planned,
        "memory_ratio": None if memory is None else memory / planned,
    }


def _in_processes(case: Case, file: Path, launcher: list[str] | None) -> dict[str, Any]:
    """Start a case's processes, wait no longer than its limit, and read what they found."""
    file.write_text(json.dumps(dataclasses.asdict(case)))
    result, log = file.with_suffix(".result"), file.with_suffix(".log")
    result.unlink(missing_ok=True)
    if launcher is None:
        command = [sys.executable, __file__, "--start", str(file)]
    else:
        command = [*(word.replace("{gpus}", str(case.gpus)) for word in launcher), *_one_process(file)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = f"exit code {process.wait(case.limit)}"
        except subprocess.TimeoutExpired:
            ended = f"killed after {case.limit:.0f} s"
        finally:
            # srun must be asked, so that it ends its processes elsewhere
            for order in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, order)
                    process.wait(10)
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    return {"error": f"{first_error(log.read_text(errors='replace'))} ({ended}, {log})"}


def _one_process(file: Path) -> list[str]:
    """Of a case, whose libraries take seconds to import: only its processes do."""
    return [sys.executable, str(Path(__file__).with_name("layout_case.py")), str(file)]


def first_error(log: str) -> str:
    """The first error of Python's that the processes of a case told."""
    found = re.search(r"^(?:\[rank\d+\]: )?([\w.]*Error\b.*)", log, re.MULTILINE)
    return found[1] if found else "no error told"


def _add_efficiency(rows: Sequence[dict[str, Any]]) -> None:
    """Give the newest row its tokens/s a GPU over those of one GPU."""
    row = rows[-1]
    same = [x for x in rows if (x["config"], x["kind"], x["gpus"]) == (row["config"], row["kind"], 1)]
    speed = "tokens_per_second_per_gpu"
    if same and speed in same[0] and speed in row:
        row["efficiency"] = row[speed] / same[0][speed]


def _write(rows: list[dict[str, Any]], folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(" ".join(_cells(rows[-1])), flush=True)


def _cells(row: dict[str, Any]) -> list[str]:
    """A row as the table shows it."""
    named = [Path(row["config"]).stem, row["kind"], str(row["gpus"])]
    if "error" in row:
        return [*named, row["layout"], *["-"] * (len(COLUMNS) - 5), row["error"][:100]]

    def number(key: str, form: str) -> str:
        return "-" if row.get(key) is None else format(row[key], form)

    forms = (
        ("density", ".1%"), ("tokens_per_second_per_gpu", ",.0f"), ("efficiency", ".1%"), ("mfu", ".1%"), ("seconds", ".3f"),
        ("planned_seconds", ".3f"), ("seconds_ratio", ".2f"), ("memory_gib", ".1f"), ("planned_memory_gib", ".1f"),
        ("memory_ratio", ".2f"), ("communication", ".1%"), ("waited_for", ".1%"), ("idle", ".1%"),
    )  # fmt: skip
    return [*named, row["layout_words"], *(number(key, form) for key, form in forms)]


if __name__ == "__main__":
    main()
