"""Find launch configurations on this GPU and pin them: `python benchmarks/tune_kernels.py` writes configs.json.

Each stage is timed alone, on the benchmark's inputs. Training never tunes: it reads the table.
Without a GPU, `TRITON_INTERPRET=1 python benchmarks/tune_kernels.py --tiny` walks through everything on a few tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.inputs import default_device, device_name, kernels_run
from benchmarks.stages import Case, Stages
from benchmarks.timing import milliseconds
from dash_megatron.command_line import ending_with_reader
from dash_megatron.ops.kernels.configs import (
    HOPPER,
    HOPPER_OVERLAP,
    PLAIN,
    STAGES,
    Config,
    Entry,
    Launches,
    find_launches,
    shape_key,
)

TOKENS, TINY_TOKENS = 32768, 64
TABLE = "dash_megatron/ops/kernels/configs.json"
DEVICE = default_device()
# Pairs are always taken where tiles would have to list less than this many times the selected pairs to cost less.
ALWAYS_BELOW = 1.05
STAGE_METHOD = {
    "route": "route",
    "attend": "attend",
    "attend_pairs": "attend",
    "queries": "backward_queries",
    "router": "backward_router",
    "keys": "backward_keys",
    "pairs": "backward_keys",
    "backward_pairs": "backward_attention",
}
# The other way of a stage, over pairs; that of queries has keys and values with it.
BY_PAIR = {"attend": "attend_pairs", "queries": "backward_pairs", "keys": "pairs"}
# Where `Launches` says which of the two to take, by the name of either.
ABOVE = {stage: f"{pairs}_above" for tiles, pairs in BY_PAIR.items() for stage in (tiles, pairs)}


def candidates(stage: str, chunk_size: int) -> list[Config]:
    """Configurations to try, as warps, pipeline stages, and what else the stage has."""
    summaries = {
        "route": [(8, 3, 32), (8, 2, 32), (8, 1, 32), (4, 3, 32), (4, 2, 32), (4, 1, 32), (8, 2, 64), (4, 2, 64)],
        "router": [(4, 1, 32), (4, 1, 64), (8, 1, 32), (8, 2, 64)],
    }  # fmt: skip
    if stage in summaries:
        return [Config(*values) for values in summaries[stage]]
    over_slabs = [
        (4, 2, 64, PLAIN),
        (4, 3, 64, PLAIN),
        (4, 2, 128, PLAIN),
        (8, 2, 128, PLAIN),
        (4, 2, 32, PLAIN),
    ]
    tries = {
        "attend": [
            (4, 5, 0, HOPPER_OVERLAP), (4, 5, 0, HOPPER), (4, 4, 0, HOPPER_OVERLAP), (8, 3, 0, PLAIN), (8, 2, 0, PLAIN),
            (4, 4, 0, PLAIN), (4, 3, 0, PLAIN),
        ],
        "queries": [(8, 3, 0, PLAIN), (8, 2, 0, PLAIN), (4, 3, 0, PLAIN), (4, 2, 0, PLAIN)],
        "keys": [
            (4, 2, 64, HOPPER), (4, 2, 64, PLAIN), (4, 2, 32, PLAIN), (4, 3, 32, PLAIN), (8, 2, 64, PLAIN), (8, 2, 128, PLAIN),
        ],
        "pairs": [(4, 2, 64, PLAIN), (4, 3, 64, PLAIN), (4, 3, 32, PLAIN), (4, 2, 128, PLAIN)],
        "attend_pairs": over_slabs,
        "backward_pairs": over_slabs,
    }  # fmt: skip
    # smaller chunks are taken side by side: in attend and queries several of a list, over pairs neighbours
    several = stage in ("attend", "queries") and chunk_size < 64
    steps = [x for x in (32, 64) if x > chunk_size] if several else [64 if stage == "pairs" else chunk_size]
    found = [Config(w, s, block, keys, kernel) for keys in steps for w, s, block, kernel in tries[stage]]
    if stage == "queries" and several:
        # two programs a multiprocessor, which heads of 64 gain from
        found.append(Config(8, 3, 0, 64, maxnreg=128))
    return found


def table_entry(config: Config) -> Entry:
    """The fields that differ from their defaults, as the table has them."""
    defaults = Config._field_defaults
    return {name: value for name, value in config._asdict().items() if value != defaults.get(name)}


def try_time(stages: Stages, stage: str, launches: Launches) -> float:
    """Milliseconds of one stage, infinite for a configuration that does not fit the GPU."""
    stages.launches = launches
    try:
        return milliseconds(getattr(stages, STAGE_METHOD[stage]), DEVICE, budget_ms=40)
    except (
        triton.runtime.errors.OutOfResources,
        triton.compiler.errors.CompilationError,
        RuntimeError,
    ) as error:
        # after an illegal access, of which torch and Triton tell in their own words, nothing else runs in this process
        if "CUDA error" in str(error) or "illegal" in str(error):
            error.add_note(f"{stage}: {list(getattr(launches, stage))}")
            raise
        return float("inf")


def with_config(launches: Launches, stage: str, config: Config) -> Launches:
    """The same launches, but for one stage; where there are two ways, over tiles and over pairs, the stage's own is taken."""
    changed: dict[str, Any] = {stage: config}
    if stage in ABOVE:
        changed[ABOVE[stage]] = 0 if stage in BY_PAIR.values() else math.inf
    return launches._replace(**changed)


def pairs_above(stages: Stages, over_tiles: float, over_pairs: float) -> float:
    """How many times the selected pairs tiles must list for pairs to cost less, from milliseconds of both on one input.

    Tiles cost what they list, pairs what is selected. 0 where tiles, which list at least what is selected, would hardly ever
    cost less: one way alone is faster than both with a choice.
    """
    listed, selected = stages.listed_and_selected()
    ratio = over_pairs / over_tiles * listed / selected
    return round(ratio, 2) if ratio > ALWAYS_BELOW else 0


def compile_one(case: Case, tile_rows: int, stage: str, config: Config) -> None:
    """Run a stage once on a few tokens, which leaves its kernel in Triton's cache for the process that times it.

    Sixteen chunks: Triton compiles anew for numbers that sixteen does not divide.
    """
    start = first_launches(case, tile_rows)
    stages = Stages(replace(case, tokens=16 * case.chunk_size), DEVICE, start)
    names = (*Stages.FORWARD, *Stages.BACKWARD, "backward_attention")
    stages.run(*names[: names.index(STAGE_METHOD[stage])])
    try_time(stages, stage, with_config(start, stage, config))


def compile_all(case: Case, tile_rows: int, processes: int) -> None:
    """Compile every candidate, several at a time: compiling is what takes long."""
    tasks = [
        (case, tile_rows, stage, config)
        for stage in STAGE_METHOD
        for config in candidates(stage, case.chunk_size)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(compile_one, tasks, chunksize=1)


def first_launches(case: Case, tile_rows: int) -> Launches:
    group = case.heads // case.kv_heads
    start = find_launches(DEVICE, torch.bfloat16, case.head_dim, case.chunk_size, group)
    return start._replace(tile_rows=tile_rows)


def tune_tile(case: Case, tile_rows: int, most_candidates: int | None) -> tuple[float, Entry]:
    """The best configuration of every stage for one size of query tiles, and their total time.

    Args:
        case: the shape to tune for.
        tile_rows: rows of a query tile.
        most_candidates: of each stage, how many are tried; None: all.
    """
    best = first_launches(case, tile_rows)
    multiprocessors = count_multiprocessors()
    stages = Stages(case, DEVICE, best)
    stages.run(*Stages.FORWARD)
    times, per_multiprocessor = {}, 2
    for stage in STAGE_METHOD:
        timed = []
        for config in candidates(stage, case.chunk_size)[:most_candidates]:
            for per in (1, 2, 3) if stage == "keys" else (per_multiprocessor,):
                trial = with_config(best, stage, config)._replace(parts=per * multiprocessors)
                timed.append((try_time(stages, stage, trial), config, per))
        timed.sort(key=lambda x: x[0])
        milliseconds_best, config, per_multiprocessor = timed[0]
        best = with_config(best, stage, config)._replace(parts=per_multiprocessor * multiprocessors)
        stages.launches = best
        stages.run(STAGE_METHOD[stage])
        times[stage] = milliseconds_best
        shown = ", ".join(f"{list(c)}x{p} {ms:.2f}" for ms, c, p in timed[:5])
        print(f"  rows {tile_rows} {stage}: {shown}", flush=True)
    entry: Entry = {stage: table_entry(getattr(best, stage)) for stage in STAGES}
    entry |= {"tile_rows": tile_rows, "parts_per_multiprocessor": per_multiprocessor}
    # what keys and values take anyway
    times["backward_pairs"] -= min(times["keys"], times["pairs"])
    total = sum(times.values())
    for tiles, pairs in BY_PAIR.items():
        entry[ABOVE[pairs]] = pairs_above(stages, times[tiles], times[pairs])
        # structured inputs take the better of the two
        total -= max(times[tiles], times[pairs])
    return total, entry


def count_multiprocessors() -> int:
    """Of the GPU, or 1."""
    return torch.cuda.get_device_properties(0).multi_processor_count if DEVICE.type == "cuda" else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", type=int, default=[16, 4, 1])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--tile-rows", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--processes", type=int, default=8, help="that compile at a time")
    parser.add_argument(
        "--tiny", action="store_true", help="one candidate a stage on a few tokens, any device"
    )
    parser.add_argument("--table", help=f"file to add to; default: {TABLE}, with --tiny none")
    options = parser.parse_args()
    if not kernels_run(DEVICE):
        parser.error(
            "there is no GPU; set TRITON_INTERPRET=1 and add --tiny to run the kernels in Triton's interpreter"
        )
    if options.table is None and not options.tiny:
        options.table = TABLE
    return options


@ending_with_reader()
def main() -> None:
    """Run from the command line."""
    options = parse()
    path = Path(options.table) if options.table else None
    table = json.loads(path.read_text()) if path and path.exists() else {}
    of_gpu = table.setdefault(device_name(DEVICE), {})
    tokens, heads = (TINY_TOKENS, max(options.groups)) if options.tiny else (TOKENS, 32)
    for group in options.groups:
        key = shape_key(torch.bfloat16, options.head_dim, options.chunk_size, group)
        print(key, flush=True)
        case = Case(
            key, tokens, heads=heads, kv_heads=heads // group, chunk_size=options.chunk_size,
            head_dim=options.head_dim,
        )  # fmt: skip
        if DEVICE.type == "cuda":
            for rows in options.tile_rows:
                compile_all(case, rows, options.processes)
        tried = [tune_tile(case, rows, 1 if options.tiny else None) for rows in options.tile_rows]
        total, of_gpu[key] = min(tried, key=lambda x: x[0])
        print(f"  best: {total:.2f} ms {of_gpu[key]}", flush=True)
        if path:
            path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
