"""Which remote chunks the queries of one context rank select: what `sparse` must send, simulated with the real router.

Inputs are the benchmarks': chunks and runs of queries draw topics. Two dials make routing local. With probability
`locality` a run wants what the run before it wanted, so that a rank's queries want few topics. And with `regions` the
sequence has stretches with topics of their own, and queries want what was said not long ago.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_megatron.ops import entmax


@dataclass(frozen=True)
class RouterInputs:
    """A sequence on which the router is simulated: one key/value head, by chunk and by run of queries."""

    context: int = 4
    """Context ranks."""
    chunks: int = 256
    """Chunks of the sequence; a multiple of 2 x context."""
    chunk_size: int = 64
    run_tokens: int = 32
    """Consecutive queries that want the same topic; divides the chunk size."""
    topics: int = 10
    """Of each region; with one region 1 / topics is about the density."""
    locality: float = 0.0
    """Probability that a run wants the topic of the run before it."""
    regions: int = 1
    """Stretches of the sequence with topics of their own; above 1 a new topic is that of one of the last
    chunks / regions chunks, otherwise any."""
    group: int = 4
    """Query heads that share a choice."""
    head_dim: int = 128
    queries_per_run: int = 2
    """Queries of each run that are simulated; the others want the same."""
    seed: int = 0


@dataclass(frozen=True)
class Selection:
    """What the router selected."""

    density: float
    """Selected over available chunks, summed over queries."""
    needed: Tensor
    """Bool [ranks, chunks]: some query of the rank selects the past chunk."""
    owner: Tensor
    """int64 [chunks]: rank that holds the chunk."""
    per_rank: Tensor
    """float [ranks]: mean chunks selected by the rank's queries."""

    @property
    def coverage(self) -> float:
        """Share of remote chunks, past ones of the rank's last query or not, that ranks select."""
        remote = self.owner[None] != torch.arange(len(self.needed))[:, None]
        return (self.needed & remote).sum().item() / remote.sum().item()

    @property
    def coverage_of_past(self) -> float:
        """The same over those remote chunks that lie before the rank's last query."""
        ranks, chunks = self.needed.shape
        last = chunks - torch.arange(ranks) * (chunks // (2 * ranks))
        remote = self.owner[None] != torch.arange(ranks)[:, None]
        remote &= torch.arange(chunks)[None] < last[:, None]
        return (self.needed & remote).sum().item() / remote.sum().item()


def zigzag_owner(chunks: int, context: int) -> Tensor:
    """int64 [chunks]: rank of each chunk; rank r holds pieces r and 2 x context - 1 - r."""
    if chunks % (2 * context):
        raise ValueError(f"chunks={chunks} must be a multiple of {2 * context} = 2 x context={context}")
    piece = torch.arange(chunks) // (chunks // (2 * context))
    return torch.minimum(piece, 2 * context - 1 - piece)


@torch.no_grad()
def simulate(inputs: RouterInputs) -> Selection:
    """Draw one sequence and route every run of queries by entmax of its scores against chunk summaries.

    Summaries are means of the chunk's keys, as with a zero summary query; scores have scaling factor 1 and heads of a
    group choose together.
    """
    generator = torch.Generator().manual_seed(inputs.seed)
    D, G, chunks = inputs.head_dim, inputs.group, inputs.chunks
    topics_KD = torch.randn(inputs.topics * inputs.regions, D, generator=generator)
    own_chunk_R = torch.arange(chunks * inputs.chunk_size // inputs.run_tokens)
    own_chunk_R //= inputs.chunk_size // inputs.run_tokens
    chunk_topic, topic_R = _topics(inputs, own_chunk_R, generator)
    # the mean of chunk_size keys of unit variance around the topic
    noise_cD = torch.randn(chunks, D, generator=generator) / math.sqrt(inputs.chunk_size)
    summary_cD = topics_KD[chunk_topic] + noise_cD

    owner_c = zigzag_owner(chunks, inputs.context)
    needed = torch.zeros(inputs.context, chunks, dtype=torch.bool)
    counts, available, num_queries = torch.zeros(3, inputs.context)
    for start in range(0, len(own_chunk_R), 256):  # a few runs at once bounds the scores in memory
        rows = slice(start, start + 256)
        R = len(own_chunk_R[rows])
        q_RQGD = topics_KD[topic_R[rows]][:, None, None] + 0.35 * torch.randn(
            R, inputs.queries_per_run, G, D, generator=generator
        )
        scores = q_RQGD @ summary_cD.T / math.sqrt(D)
        past_Rc = torch.arange(chunks) < own_chunk_R[rows, None]
        p = entmax(scores.masked_fill(~past_Rc[:, None, None], -math.inf)).mean(2)
        selected_RQc = p > 0
        rank_R = owner_c[own_chunk_R[rows]]
        for rank in rank_R.unique().tolist():
            of_rank = rank_R == rank
            needed[rank] |= selected_RQc[of_rank].any(1).any(0)
            # the own chunk is selected too
            counts[rank] += selected_RQc[of_rank].sum() + of_rank.sum() * inputs.queries_per_run
            available[rank] += (past_Rc[of_rank].sum() + of_rank.sum()) * inputs.queries_per_run
            num_queries[rank] += of_rank.sum() * inputs.queries_per_run
    density = (counts.sum() / available.sum()).item()
    return Selection(density, needed, owner_c, counts / num_queries)


def _topics(inputs: RouterInputs, own_chunk_R: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The topic of every chunk, and the one that every run of queries wants."""
    region = -(-inputs.chunks // inputs.regions)
    chunk_topic = torch.randint(inputs.topics, (inputs.chunks,), generator=generator)
    chunk_topic += torch.arange(inputs.chunks) // region * inputs.topics
    runs = own_chunk_R.shape
    if inputs.regions == 1:
        new_R = torch.randint(inputs.topics, runs, generator=generator)
    else:
        back_R = 1 + (torch.rand(runs, generator=generator) * own_chunk_R.clamp_max(region)).long()
        new_R = chunk_topic[(own_chunk_R - back_R).clamp_min(0)]
    changes_R = torch.rand(runs, generator=generator) >= inputs.locality
    changes_R[0] = True
    last_change_R = torch.where(changes_R, torch.arange(len(own_chunk_R)), 0).cummax(0).values
    return chunk_topic, new_R[last_change_R]
