"""Find launch configurations on this GPU and pin them: `python benchmarks/tune_kernels.py` writes configs.json.

Each stage is timed alone, on the benchmark's inputs. Training never tunes: it reads the table.
"""

import argparse
import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import torch
import triton
from attention import Case, Stages, milliseconds

from dash_megatron.ops.kernels.configs import Config, Plan, plan, shape_key

TOKENS = 32768
STAGE_METHOD = {
    "route": "route",
    "attend": "attend",
    "queries": "backward_queries",
    "router": "backward_router",
    "keys": "backward_keys",
}


def candidates(stage: str, chunk_size: int) -> list[Config]:
    """Warps, pipeline stages, block sizes and keys a step to try."""
    tries = {
        "route": [
            (8, 3, 32),
            (8, 2, 32),
            (8, 1, 32),
            (4, 3, 32),
            (4, 2, 32),
            (4, 1, 32),
            (8, 2, 64),
            (4, 2, 64),
        ],
        "attend": [(4, 5, 2), (4, 5, 1), (4, 4, 2), (8, 3, 0), (8, 2, 0), (4, 4, 0), (4, 3, 0)],
        "queries": [(8, 3, 0), (8, 2, 0), (4, 3, 0), (4, 2, 0)],
        "router": [(4, 1, 32), (4, 1, 64), (8, 1, 32), (8, 2, 64)],
        "keys": [(4, 2, 1), (4, 2, 64), (4, 2, 32), (4, 3, 32), (4, 1, 64), (8, 2, 64), (8, 2, 128)],
    }
    return [Config(*values, chunk_size) for values in tries[stage]]


def try_time(stages: Stages, stage: str, chosen: Plan) -> float:
    """Milliseconds of one stage, infinite for a configuration that does not fit the GPU."""
    stages.plan = chosen
    try:
        if stage == "keys":
            stages.run("transpose")
        return milliseconds(lambda: stages.run(STAGE_METHOD[stage]), budget_ms=40)
    except (
        triton.runtime.errors.OutOfResources,
        triton.compiler.errors.CompilationError,
        RuntimeError,
    ) as error:
        if "CUDA error" in str(error):
            raise
        return float("inf")


def compile_one(case: Case, tile_rows: int, stage: str, config: Config) -> None:
    """Run a stage once on a few tokens, which leaves its kernel in Triton's cache for the process that times it.

    Sixteen chunks: Triton compiles anew for numbers that sixteen does not divide.
    """
    start = first_plan(case, tile_rows)
    stages = Stages(replace(case, tokens=16 * case.chunk_size), start)
    names = (*Stages.FORWARD, *Stages.BACKWARD)
    stages.run(*names[: names.index(STAGE_METHOD[stage])])
    try_time(stages, stage, start._replace(**{stage: config}))


def compile_all(case: Case, tile_rows: int, processes: int) -> None:
    """Compile every candidate, several at a time: compiling is what takes long."""
    tasks = [
        (case, tile_rows, stage, config)
        for stage in STAGE_METHOD
        for config in candidates(stage, case.chunk_size)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(compile_one, tasks, chunksize=1)


def first_plan(case: Case, tile_rows: int) -> Plan:
    group = case.heads // case.kv_heads
    start = plan(torch.device("cuda", 0), torch.bfloat16, case.head_dim, case.chunk_size, group)
    return start._replace(tile_rows=tile_rows)


def tune_tile(case: Case, tile_rows: int, verbose: bool) -> tuple[float, dict[str, list[int]]]:
    """The best configuration of every stage for one size of query tiles, and their total time."""
    best = first_plan(case, tile_rows)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    stages = Stages(case, best)
    stages.run(*Stages.FORWARD)
    total, per_multiprocessor = 0.0, 2
    for stage in STAGE_METHOD:
        timed = []
        for config in candidates(stage, case.chunk_size):
            for per in (1, 2, 3) if stage == "keys" else (per_multiprocessor,):
                trial = best._replace(**{stage: config}, parts=per * multiprocessors)
                timed.append((try_time(stages, stage, trial), config, per))
        timed.sort(key=lambda x: x[0])
        milliseconds_best, config, per_multiprocessor = timed[0]
        best = best._replace(**{stage: config}, parts=per_multiprocessor * multiprocessors)
        stages.plan = best
        stages.run(STAGE_METHOD[stage])
        total += milliseconds_best
        if verbose:
            shown = ", ".join(f"{list(c)}x{p} {ms:.2f}" for ms, c, p in timed[:5])
            print(f"  rows {tile_rows} {stage}: {shown}", flush=True)
    entry = {stage: list(getattr(best, stage)) for stage in STAGE_METHOD}
    return total, {"tile_rows": [tile_rows], **entry, "parts_per_multiprocessor": [per_multiprocessor]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", type=int, default=[16, 4, 1])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--tile-rows", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--processes", type=int, default=8, help="that compile at a time")
    parser.add_argument("--table", default="dash_megatron/ops/kernels/configs.json")
    args = parser.parse_args()
    path = Path(args.table)
    table = json.loads(path.read_text()) if path.exists() else {}
    of_gpu = table.setdefault(torch.cuda.get_device_name(), {})
    for group in args.groups:
        key = shape_key(torch.bfloat16, args.head_dim, args.chunk_size, group)
        print(key, flush=True)
        case = Case(
            key, TOKENS, heads=32, kv_heads=32 // group, chunk_size=args.chunk_size, head_dim=args.head_dim
        )
        for rows in args.tile_rows:
            compile_all(case, rows, args.processes)
        tried = [tune_tile(case, rows, verbose=True) for rows in args.tile_rows]
        total, of_gpu[key] = min(tried, key=lambda x: x[0])
        print(f"  best: {total:.2f} ms {of_gpu[key]}", flush=True)
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
