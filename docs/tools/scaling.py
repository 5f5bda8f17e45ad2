"""Fill in the tables of `docs/scaling.md` and draw its pictures: `python -m docs.tools.scaling --output docs/`.

The page is prose by hand; what stands between `<!-- begin NAME -->` and `<!-- end -->` is written here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dash_megatron.command_line import ending_with_reader
from dash_megatron.config import Config, load_config
from dash_megatron.planning.choices import Choices
from dash_megatron.planning.kernel_times import dash_seconds, dense_seconds, stage_rates
from dash_megatron.planning.routing import AssumedRouting, coverage_of_topics
from dash_megatron.planning.search import EXCHANGES, search
from dash_megatron.planning.step_time import StepEstimate
from dash_megatron.planning.table import COLUMNS, row
from dash_megatron.planning.traffic import ContextComm, ContextShape, context_exchange
from docs.tools import balance
from docs.tools import scaling_pictures as pictures
from docs.tools.kernel_rates import read_rows
from docs.tools.measured_steps import MeasuredStep, measured_layouts, measured_steps
from docs.tools.simulation import RouterInputs, simulate

CONFIG = Path(__file__).parents[2] / "configs" / "8b_128k.yaml"
LENGTHS = {"128K": (131072, 64), "512K": (524288, 16), "1M": (1048576, 8)}
"""Tokens of a sequence, and sequences of a step: 8M tokens each."""
POOLED = ("attention.query_pool=16", "attention.pool_heads=true", "attention.local_chunks=2")
"""The router of the recipe, with chunks of 64."""
ROUTERS: dict[str, tuple[tuple[str, ...], Choices]] = {
    "runs of 32": (POOLED, "runs"),
    "means of 16 queries": (POOLED, "trained"),
    "one query": ((), "trained"),
    "one query, independent": ((), "independent"),
}
"""Routers and how alike neighbours select: config keys, and choices. The page's tables have the second, and the first beside it."""
BEST_CASE, TRAINED = "runs of 32", "means of 16 queries"
SHAPE = ContextShape(context=8, tokens=16384, heads=32, kv_heads=8, head_dim=128, chunk_size=64)
"""8B at 128K over 8 context ranks."""


@dataclass(frozen=True)
class Extent:
    """How much is computed for the tables and pictures."""

    lengths: tuple[str, ...] = tuple(LENGTHS)
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    densities: tuple[float, ...] = (1.0, 0.25, 0.1, 0.05, 0.02)
    table_gpus: tuple[int, ...] = (64, 512)
    """GPUs whose best layouts are shown."""
    table_densities: tuple[float, ...] = (1.0, 0.1, 0.02)
    seeds: int = 3
    """Sequences that each simulated figure is a mean of."""
    chunks: int = 512
    """Chunks of a simulated sequence."""


WHOLE = Extent()
"""What the page has."""
SMALL = Extent(("128K",), (64,), (1.0, 0.1), (64,), (0.1,), seeds=1, chunks=128)
"""A few of its figures, in seconds."""


@lru_cache(maxsize=16)
def config_of(length: str, keys: tuple[str, ...]) -> Config:
    """The 8B config at one of `LENGTHS`, with other keys."""
    tokens, batch = LENGTHS[length]
    return load_config(CONFIG, [f"data.seq_length={tokens}", f"training.global_batch={batch}", *keys])


@lru_cache(maxsize=512)
def best(length: str, gpus: int, density: float, router: str = TRAINED) -> StepEstimate | None:
    """The fastest layout with one of `ROUTERS`, or with full attention; None where nothing fits or divides."""
    keys, choices = ROUTERS.get(router, (("attention.kind=full",), "trained"))
    try:
        return search(config_of(length, keys), gpus, AssumedRouting(density=density, choices=choices))[0]
    except ValueError:
        return None


def speed(estimate: StepEstimate | None) -> str:
    """tokens/s/GPU."""
    return f"{estimate.tokens_per_second_per_gpu:,.0f}" if estimate else "-"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def throughput_table(extent: Extent) -> str:
    """tokens/s/GPU of the best layout, in brackets in the best case."""
    rows = []
    for length in extent.lengths:
        for density in extent.densities:
            cells = []
            for gpus in extent.gpus:
                trained, runs = (
                    speed(best(length, gpus, density, router)) for router in (TRAINED, BEST_CASE)
                )
                cells.append(trained if trained == runs else f"{trained} ({runs})")
            rows.append([length, f"{density:.0%}", *cells])
    return markdown(["tokens", "density", *(f"{gpus} GPUs" for gpus in extent.gpus)], rows)


def router_table(extent: Extent) -> str:
    """tokens/s/GPU at 64 GPUs by router, and of full attention."""
    rows = []
    for length in extent.lengths:
        for density in extent.densities:
            if density < 1:
                found = [best(length, 64, density, router) for router in ("full", *ROUTERS)]
                rows.append([length, f"{density:.0%}", *map(speed, found)])
    return markdown(["tokens", "density", "full attention", *ROUTERS], rows)


def layout_table(extent: Extent) -> str:
    """The best layouts themselves, at two sizes."""
    rows = []
    for length in extent.lengths:
        for gpus in extent.table_gpus:
            for density in extent.table_densities:
                estimate = best(length, gpus, density)
                if estimate:
                    rows.append([length, str(gpus), f"{density:.0%}", *row(estimate)])
    return markdown(["tokens", "GPUs", "density", *COLUMNS], rows)


def kernel_table(_: Extent) -> str:
    """The model beside whole passes, or sums of the stages that it is fitted to where no whole was timed."""
    rows, dense = [], {}
    for case in read_rows():
        times = case.milliseconds
        # of the way that the kernels take
        measured = [times.get(rate) for rate in stage_rates(case.work).values()]
        whole, stages = case.whole, (_total(measured[:2]), _total(measured[2:]))
        forward, backward = whole if any(whole) else stages
        if forward is not None or backward is not None:
            modelled = dash_seconds(case.work)
            share = case.work.selected / case.work.pairs
            rows.append([case.name, case.routing, f"{share:.1%}", f"{case.ratio:.2f}"])
            rows[-1] += _against(forward, 1e3 * modelled.forward)
            rows[-1] += _against(backward, 1e3 * modelled.backward)
        if "dense_forward" in times:
            modelled = dense_seconds(case.work)
            # of cases that were timed with several routers, the last
            name = ", ".join(case.name.split(", ")[:3])
            dense[name] = [
                name,
                "cuDNN",
                "100%",
                "1",
                *_against(times["dense_forward"], 1e3 * modelled.forward),
            ]
            dense[name] += _against(times["dense_backward"], 1e3 * modelled.backward)
    columns = ["tokens, heads, D, C", "selected by", "pairs selected", "visited/selected"]
    return markdown(
        [*columns, "fwd ms", "model", "error", "bwd ms", "model", "error"], [*rows, *dense.values()]
    )


def _total(times: Sequence[float | None]) -> float | None:
    """The sum, if all were measured."""
    known = [time for time in times if time is not None]
    return sum(known) if len(known) == len(times) else None


def _against(measured: float | None, modelled: float, digits: int = 2) -> list[str]:
    if measured is None:
        return ["-", f"{modelled:.{digits}f}", "-"]
    return [f"{measured:.{digits}f}", f"{modelled:.{digits}f}", f"{modelled / measured - 1:+.0%}"]


def step_table(steps: Sequence[MeasuredStep]) -> str:
    """Whole steps, measured and modelled."""
    rows = []
    for step in steps:
        modelled = step.modelled
        rows.append([step.name, step.gpu, *_against(step.seconds, modelled.seconds, 3)])
        rows[-1] += _against(step.gib, modelled.memory.total / 2**30, 1)
    columns = ["step", "GPU", "s", "model", "error", "peak GiB", "model", "error"]
    return markdown(columns, rows)


def exchange_table(_: Extent) -> str:
    """MB one rank sends per layer for `SHAPE`."""
    rows = []
    for kind, coverage in [*((kind, 1.0) for kind in EXCHANGES), ("sparse", 0.5), ("sparse", 0.1)]:
        sent = coverage * SHAPE.peers * SHAPE.num_chunks * SHAPE.kv_heads
        one = context_exchange(kind, SHAPE, sent_chunks=sent)
        name = f"{kind}, {coverage:.0%} of chunks" if kind == "sparse" else kind
        rows.append([name, f"{one.forward / 1e6:.1f}", f"{one.backward / 1e6:.1f}"])
    return markdown(["exchange", "forward MB", "backward MB"], rows)


Simulated = tuple[float, float, float]
"""Density, coverage of past chunks, and imbalance of selected chunks."""


@lru_cache(maxsize=256)
def simulated(extent: Extent, context: int, topics: int, locality: float, regions: int = 1) -> Simulated:
    """Means over seeds."""
    found = [
        simulate(
            RouterInputs(
                context=context,
                chunks=extent.chunks,
                topics=topics,
                locality=locality,
                regions=regions,
                seed=seed,
            )
        )
        for seed in range(extent.seeds)
    ]
    unequal = [(s.per_rank.max() / s.per_rank.mean()).item() for s in found]
    return (
        sum(s.density for s in found) / extent.seeds,
        sum(s.coverage_of_past for s in found) / extent.seeds,
        sum(unequal) / extent.seeds,
    )


def coverage_table(extent: Extent) -> str:
    """Coverage by simulation and by formula."""
    rows = []
    for context in (8, 32):
        for topics in (4, 10, 40):
            for locality in (0.0, 0.9, 0.99, 1.0):
                density, coverage, _ = simulated(extent, context, topics, locality)
                formula = coverage_of_topics(1 / topics, locality, extent.chunks * 2 / context)
                cells = [f"{density:.1%}", f"{locality:.0%}", f"{coverage:.0%}", f"{formula:.0%}"]
                rows.append([str(context), str(topics), *cells])
    columns = ["context ranks", "topics", "density", "locality", "selected by some query", "formula"]
    return markdown(columns, rows)


def recency_table(extent: Extent) -> str:
    """Coverage where topics are found only nearby."""
    rows = []
    for regions in (1, 8, 32):
        for topics in (2, 10):
            density, coverage, unequal = simulated(extent, 8, topics, 0.0, regions)
            rows.append([str(regions), str(topics), f"{density:.1%}", f"{coverage:.0%}", f"{unequal:.2f}"])
    return markdown(["regions", "topics of each", "density", "selected by some query", "max / mean"], rows)


@lru_cache(maxsize=1)
def balance_cases() -> dict[str, list[float]]:
    """Largest over mean work of 2, 4, ... 64 ranks, by case."""
    chunks = 4096
    cases: dict[str, Callable[[], torch.Tensor]] = {
        "as many chunks for every query": lambda: balance.growing(chunks, 0.0),
        "chunks grow with position (constant density, dense)": lambda: balance.growing(chunks, 1.0),
        "chunks grow as its square root": lambda: balance.growing(chunks, 0.5),
        "chunks grow as its square": lambda: balance.growing(chunks, 2.0),
        "last eighth twice as dense": lambda: balance.denser_part(chunks, 0.875, 0.125, 2),
        "last eighth five times as dense": lambda: balance.denser_part(chunks, 0.875, 0.125, 5),
        "an eighth in the middle five times as dense": lambda: balance.denser_part(chunks, 0.4375, 0.125, 5),
    }
    results = {
        name: [balance.imbalance(make(), ranks) for ranks in pictures.RANKS] for name, make in cases.items()
    }
    for mean in (64, 512):
        generator = torch.Generator().manual_seed(0)
        drawn = [balance.packed(balance.draw_documents(chunks, mean, generator)) for _ in range(20)]
        name = f"packed documents, log-normal, {mean * 64 // 1024}K tokens on average (sequence 256K)"
        results[name] = [
            sum(balance.imbalance(work, ranks) for work in drawn) / len(drawn) for ranks in pictures.RANKS
        ]
    return results


def balance_table(_: Extent) -> str:
    """The same as a table."""
    rows = [[name, *(f"{x:.2f}" for x in values)] for name, values in balance_cases().items()]
    return markdown(["work of a query", *(f"{ranks} ranks" for ranks in pictures.RANKS)], rows)


def sparse_ratio(density: float, locality: float) -> float:
    """Bytes of `sparse` over those of `all_gather`, forward and backward, for `SHAPE`."""
    coverage = coverage_of_topics(density, locality, SHAPE.tokens / 32)
    sent = coverage * SHAPE.peers * SHAPE.num_chunks * SHAPE.kv_heads

    def total(kind: ContextComm) -> float:
        one = context_exchange(kind, SHAPE, sent_chunks=sent)
        return one.forward + one.backward

    return total("sparse") / total("all_gather")


TABLES: dict[str, Callable[[Extent], str]] = {
    "throughput": throughput_table,
    "routers": router_table,
    "layouts": layout_table,
    "steps": lambda _: step_table(measured_steps()),
    "measured_layouts": lambda _: step_table(measured_layouts()),
    "kernels": kernel_table,
    "exchanges": exchange_table,
    "coverage": coverage_table,
    "recency": recency_table,
    "balance": balance_table,
}


def fill_in(page: str, names: Iterable[str] = TABLES, extent: Extent = WHOLE) -> str:
    """The page with fresh tables between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name in names:
        marked = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(page):
            raise ValueError(f"the page has no <!-- begin {name} --> ... <!-- end -->")
        page = marked.sub(f"\\g<1>{TABLES[name](extent)}\n\\g<2>", page, count=1)
    return page


def draw(folder: Path, extent: Extent = WHOLE) -> None:
    """Write the four pictures."""
    curves = {
        length: {
            density: [(gpus, e) for gpus in extent.gpus if (e := best(length, gpus, density))]
            for density in extent.densities
        }
        for length in extent.lengths
    }
    pictures.draw_throughput(curves, folder / "scaling_throughput.png")
    bars = {
        length: [(density, e) for density in extent.densities if (e := best(length, 64, density))]
        for length in extent.lengths
    }
    pictures.draw_composition(bars, folder / "scaling_step.png")
    points = {
        topics: [(x, simulated(extent, 8, topics, x)[1]) for x in pictures.LOCALITIES]
        for topics in (4, 10, 40)
    }
    pictures.draw_sparse(points, extent.chunks * 2 / 8, sparse_ratio, folder / "scaling_sparse.png")
    pictures.draw_balance(balance_cases(), folder / "scaling_balance.png")


@ending_with_reader()
def main(arguments: list[str] | None = None) -> None:
    """Rewrite the tables of the page in the output folder, and the pictures in its `results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of scaling.md")
    parser.add_argument("--small", action="store_true", help="a few of the figures only, to try it out")
    options = parser.parse_args(arguments)
    extent = SMALL if options.small else WHOLE
    page = options.output / "scaling.md"
    page.write_text(fill_in(page.read_text(encoding="utf-8"), extent=extent), encoding="utf-8")
    (options.output / "results").mkdir(exist_ok=True)
    draw(options.output / "results", extent)
    print(page)


if __name__ == "__main__":
    main()
