"""When zigzag balances attention over context ranks: the busiest rank's work over the mean.

Rank r holds pieces r and 2P - 1 - r, so work that is any straight line in position is the same for all ranks: dense
attention, a constant density, and a constant number of selected chunks alike. Everything else is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from docs.tools.simulation import zigzag_owner


def imbalance(work_c: Tensor, context: int) -> float:
    """Largest over mean work of a rank, given the work of every chunk's queries, under zigzag."""
    per_rank = torch.zeros(context, dtype=torch.float64)
    per_rank.index_add_(0, zigzag_owner(len(work_c), context), work_c.double())
    return (per_rank.max() / per_rank.mean()).item()


def growing(chunks: int, power: float) -> Tensor:
    """Work of each chunk where the number of selected chunks grows as position ** power: 0 constant, 1 proportional."""
    position = (torch.arange(chunks) + 0.5) / chunks
    return position**power


def denser_part(chunks: int, start: float, length: float, ratio: float) -> Tensor:
    """Proportional work, but `ratio` times as dense for queries from `start` on, over `length` (of the sequence)."""
    work = growing(chunks, 1.0)
    position = (torch.arange(chunks) + 0.5) / chunks
    return torch.where((position >= start) & (position < start + length), ratio * work, work)


def packed(lengths: Tensor) -> Tensor:
    """Work of each chunk where documents of `lengths` chunks are packed one behind another: the place in its own."""
    ends = lengths.cumsum(0)
    index = torch.arange(int(ends[-1]))
    start = (ends - lengths)[torch.searchsorted(ends, index, right=True)]
    return (index - start + 0.5).double()


def draw_documents(chunks: int, mean: float, generator: torch.Generator) -> Tensor:
    """int64 lengths in chunks of log-normal documents (σ = 1) that fill `chunks` exactly, the last one cut."""
    lengths: list[int] = []
    location = torch.tensor(mean).log() - 0.5
    while (left := chunks - sum(lengths)) > 0:
        length = (torch.randn((), generator=generator) + location).exp()
        lengths.append(min(left, max(1, round(length.item()))))
    return torch.tensor(lengths)
