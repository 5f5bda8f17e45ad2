"""How long attention kernels take, by what they have to do: pairs scored, visited and selected, and rows.

`RATES` is fitted by `python -m docs.tools.kernel_rates` to every stage timed in docs/results/kernel_stages.csv: NVIDIA H200,
bf16, heads of 64 and 128, chunks of 32 and 64, groups of 1 to 16 heads, 16K to 128K tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dash_megatron.gpus import GPUS
from dash_megatron.planning.choices import tile_tokens

RECOUNTED = 1.4
"""Time of scoring where lists are counted before they are written, over that where they have room for all: the last of the
passes over the scores, 381 of about 1000 instructions, is made twice."""
PAIRS_ABOVE = {"attend": {1: 3.0, 4: 3.9, 16: 3.8}, "queries": {1: 2.6, 4: 2.0, 16: 1.9}}
"""By stage and query heads of a group: pairs are taken where tiles visit more than so many times what was selected. Queries then
have keys and values with them.

Those of the table of launches. With groups of 1, 4 and 16 both ways took as long on an H200 where tiles visit 2.92, 3.82 and 3.71 times
what was selected, 2.55, 1.95 and 1.82 times with gradients; these were raised by 1% and rounded up to a tenth, so that in doubt tiles are
gone over, as everywhere else."""
TIMED_GPU = "H200"
"""GPUs of its compute capability take its entries of the table of launches. On no others attend and queries go over pairs."""


def pairs_above(stage: str, group: int, head_dim: int, chunk_size: int, gpu: str) -> float:
    """Ratio of pairs that tiles visit to pairs selected above which a stage ("attend" or "queries") goes over pairs; infinite: never."""
    capability = GPUS[TIMED_GPU].compute_capability
    timed = (head_dim, chunk_size) == (128, 64) and GPUS[gpu].compute_capability == capability
    return PAIRS_ABOVE[stage].get(group, math.inf) if timed else math.inf


def keys_by_pair(head_dim: int, chunk_size: int) -> bool:
    """Whether the pass to keys and values goes over pairs in half precision."""
    return head_dim <= 128 and (head_dim > 64 or chunk_size < 64)


@dataclass(frozen=True)
class AttentionWork:
    """One rank's share of one layer's attention."""

    rows: float
    """Query tokens of this rank."""
    heads: float
    """Query heads of this rank."""
    kv_heads: float
    """Key/value heads of this rank."""
    pairs: float
    """Causal (query, key) token pairs of one head on this rank: tokens**2 / 2 on one GPU."""
    selected: float
    """Pairs in chunks that their query selected, the whole of its own included."""
    visited: float
    """Pairs in chunks that any token of the query's tile selected."""
    chunk_size: int = 64
    head_dim: int = 128
    pool_heads: bool = False
    """The router has one query a group."""
    counted: bool = False
    """Lists are too long to have room for all chunks, so that they are counted first."""
    passes: int = 1
    """Times that queries meet a part of the keys: the steps of a ring, each with its own launches."""
    sharded: bool = False
    """Keys come from other ranks. Attend and queries are then taken to go over tiles: over pairs they were not timed with such keys."""
    gpu: str = TIMED_GPU
    """One of `GPUS`. On one of another compute capability than `TIMED_GPU` attend and queries go over tiles."""

    def units(self, stage: str) -> dict[str, float]:
        """What a stage has to do: 10**6 rows, 10**9 chunks scored or listed, and 10**12 pairs of tokens."""
        routes = stage in ROUTER
        heads = self.heads
        if routes and self.pool_heads:
            # as few rows as a product takes
            heads = self.kv_heads * max(1, 16 // self.tile_tokens)
        # the router sees all summaries at once; the other stages begin anew at every pass
        passes = 1 if routes or stage.startswith("dense") else self.passes
        return {
            "launch": passes,
            "rows": passes * self.rows * heads / 1e6,
            "scored": self.pairs / self.chunk_size * heads / 1e9 * (RECOUNTED if self.counted else 1),
            "listed": self.visited / self.chunk_size * self.kv_heads / 1e9,
            "visited": self.visited * heads / 1e12,
            "sorted": self.selected / self.chunk_size * self.kv_heads / 1e9,
            "selected": self.selected * heads / 1e12,
            "pairs": self.pairs * heads / 1e12,
        }

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return max(1, round(self.heads / self.kv_heads))

    @property
    def tile_tokens(self) -> int:
        """Tokens of a query tile."""
        return tile_tokens(self.group, self.chunk_size)

    def tile_rows(self, stage: str) -> int:
        """Rows of a query tile as a stage sees it."""
        if self.pool_heads and stage in ROUTER:
            return max(16, self.tile_tokens)
        return self.tile_tokens * self.group

    def by_pair(self, stage: str) -> bool:
        """Whether a stage (attend, queries or keys) goes over selected pairs rather than over what tiles visit, as the table
        and the rule of `dash_megatron.ops.kernels.configs` decide in half precision on the GPU, but for `sharded` work."""
        if stage == "keys":
            return keys_by_pair(self.head_dim, self.chunk_size)
        shape = self.group, self.head_dim, self.chunk_size, self.gpu
        above = math.inf if self.sharded else pairs_above(stage, *shape)
        return self.visited > above * self.selected


@dataclass(frozen=True)
class Rate:
    """How a stage's time follows from its work."""

    launch: float
    """Milliseconds whatever the work."""
    work: dict[str, float]
    """Milliseconds of each unit of work (`AttentionWork.units`), at heads of 128, chunks of 64 and tiles of 128 rows."""
    head_dim: float = 0.0
    """The time of work grows as this power of the head dim,"""
    chunk: float = 0.0
    """falls as this power of the chunk size,"""
    tile: float = 0.0
    """and falls as this power of a tile's rows."""

    def milliseconds(self, work: AttentionWork, stage: str) -> float:
        """Time of the stage named so."""
        units = work.units(stage)
        shape = (work.head_dim / 128) ** self.head_dim * (64 / work.chunk_size) ** self.chunk
        shape *= (128 / work.tile_rows(stage)) ** self.tile
        return self.launch * units["launch"] + shape * sum(
            rate * units[unit] for unit, rate in self.work.items()
        )


RATES = {
    "route": Rate(
        0.07, {"rows": 0.321, "scored": 3.52, "listed": 3.31}, head_dim=0.44, chunk=0.24, tile=0.58
    ),
    "attend_by_tile": Rate(0.088, {"rows": 0.222, "visited": 937}, head_dim=0.59, chunk=0.14, tile=0.65),
    "queries_by_tile": Rate(0.087, {"rows": 0.508, "visited": 1590}, head_dim=1.02, chunk=-0.03, tile=0.11),
    "attend_by_pair": Rate(0.0, {"rows": 3.51, "sorted": 108, "selected": 2350}),
    "queries_by_pair": Rate(0.0, {"rows": 4.68, "sorted": 248, "selected": 3930}),
    "router_backward": Rate(
        0.064, {"rows": 0.359, "listed": 2.63, "visited": 87.9}, head_dim=0.85, chunk=0.68, tile=0.36
    ),
    "keys_by_tile": Rate(0.78, {"rows": 0.167, "visited": 2800}, head_dim=1.02, chunk=1.18, tile=1.36),
    "keys_by_pair": Rate(0.98, {"sorted": 115, "selected": 2610}, head_dim=0.84, chunk=-0.03),
    "dense_forward": Rate(0.1, {"pairs": 854}, head_dim=0.68),
    "dense_backward": Rate(0.00054, {"pairs": 2430}, head_dim=0.67),
}
"""Stages of the kernels, with transposing, or sorting of pairs, in those that need it, and cuDNN's dense attention. Queries by pair
have keys and values with them."""
STAGES = ("route", "attend", "queries", "router_backward", "keys")
ROUTER = ("route", "router_backward")
"""Stages of the kernels, and those of them that score chunks."""


@dataclass(frozen=True)
class AttentionSeconds:
    """Time of one layer's attention."""

    forward: float
    backward: float


def stage_rates(work: AttentionWork) -> dict[str, str]:
    """Which of `RATES` each of `STAGES` runs at; queries by pair have keys and values with them, which are left out then."""
    stages = [stage for stage in STAGES if not (stage == "keys" and work.by_pair("queries"))]
    return {
        stage: stage if stage in ROUTER else f"{stage}_by_{'pair' if work.by_pair(stage) else 'tile'}"
        for stage in stages
    }


def dash_stages(work: AttentionWork) -> dict[str, float]:
    """Milliseconds of every stage of DashAttention on one rank, in order; the first two are the forward."""
    return {stage: RATES[rate].milliseconds(work, rate) for stage, rate in stage_rates(work).items()}


def dash_seconds(work: AttentionWork, routes: bool = True) -> AttentionSeconds:
    """Time of DashAttention on one rank or, unless it `routes`, of attention to lists that are given.

    Nothing is added for layout and summaries (0.15 ms at most, 0.3 with 32 key/value heads): the whole took less than the
    sum of the stages timed apart.
    """
    stages = dash_stages(work)
    if not routes:
        stages |= dict.fromkeys(ROUTER, 0.0)
    forward = stages["route"] + stages["attend"]
    return AttentionSeconds(forward / 1e3, (sum(stages.values()) - forward) / 1e3)


def dense_seconds(work: AttentionWork) -> AttentionSeconds:
    """Time of causal full attention by cuDNN on one rank; all pairs count."""
    forward, backward = (
        RATES[stage].milliseconds(work, stage) / 1e3 for stage in ("dense_forward", "dense_backward")
    )
    return AttentionSeconds(forward, backward)
