"""Made choices that persist from token to token as those of a trained router do, for lengths and heads that no dump has.

A routed chunk is selected steadily or in flickers. Steady chunks are kept from one token to the next, but for a small share
that is drawn anew. Flickering ones belong to a set that is kept in the same way, of which each token selects some at random.
Neighbouring chunks are selected together: some are selected by just those tokens that selected the chunk before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.choices import TILES, load_selected, router_of, visited_over_selected

# Chunks made at a time: each of their random numbers is eight bytes for every token.
BLOCK = 64
# Tokens for which the same chunks are alike: no tile of the kernels is longer.
RUN = 64


class Persistence(NamedTuple):
    """How tokens keep what they selected; what a fit compares are tensors of candidates."""

    density: float
    """Routed chunks selected over those available."""
    steady: float | Tensor
    """Share of the selected chunks that is steady."""
    redrawn: float | Tensor
    """Share of the steady chunks that is drawn anew at each token; of the flickering set, `flicker` times as much."""
    flicker: float | Tensor
    """Probability that a token selects a chunk of the flickering set."""
    alike: float = 0.0
    """Probability that a chunk is selected by the same tokens as the one before it."""

    @property
    def flickering_set(self) -> float | Tensor:
        """Share of the routed chunks that is in the flickering set, so that the density is met."""
        rest = 1 - (1 - self.density) / (1 - self.steady * self.density)
        return rest / self.flicker

    def union_curve(self, tiles: tuple[int, ...] = TILES) -> list[float | Tensor]:
        """Expected visited over selected routed chunks, for each number of tokens in a tile."""
        share, steady = self.flickering_set, self.steady * self.density
        # probabilities that no token selected the chunk: steadily; in flickers, in the set and outside it
        none, inside, outside = 1 - steady, share * (1 - self.flicker), 1 - share
        curve = []
        for tokens in range(1, max(tiles) + 1):
            if tokens in tiles:
                curve.append((1 - none * (inside + outside)) / self.density)
            none *= 1 - self.redrawn * steady
            anew = self.redrawn * self.flicker
            both = anew * (inside + outside)
            inside = ((1 - anew) * inside + share * both) * (1 - self.flicker)
            outside = (1 - anew) * outside + (1 - share) * both
        return curve


def routed_available(
    tokens: int, chunks: int, local_chunks: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Which chunks the router may select for each token: bool [tokens, chunks]."""
    own_N = torch.arange(tokens, device=device) // (tokens // chunks)
    return torch.arange(chunks, device=device) < own_N[:, None] - local_chunks


def selected_side_by_side(selected_HNc: Tensor, width: int) -> float:
    """Pairs of a token and a group of `width` neighbouring chunks, any of which it selected, over pairs of a token and a chunk.

    Chunks are grouped from the first; `width` divides their number.
    """
    groups = selected_HNc.unflatten(2, (-1, width)).any(3)
    return groups.count_nonzero().item() / selected_HNc.count_nonzero().item()


@lru_cache(maxsize=32)
def fit_persistence(model: str, layer: int) -> Persistence:
    """The persistence whose union curve is nearest to that of the routed chunks in a file of `benchmarks/choices`.

    Nearest is the least greatest ratio over 1 to 32 tokens, among a grid of candidates. Of two neighbouring chunks tokens select
    both as often as in the file.
    """
    selected_HNc = load_selected(model, layer)
    heads, tokens, chunks = selected_HNc.shape
    available_Nc = routed_available(tokens, chunks, router_of(model).local_chunks)
    routed_HNc = selected_HNc & available_Nc
    steady, redrawn, flicker = torch.meshgrid(
        torch.linspace(0, 0.99, 34), torch.logspace(-3, -1, 41), torch.linspace(0.04, 1, 25), indexing="ij"
    )
    density = routed_HNc.count_nonzero().item() / (heads * available_Nc.count_nonzero().item())
    candidates = Persistence(density, steady, redrawn, flicker)
    measured = visited_over_selected(routed_HNc).values()
    error = torch.zeros_like(steady)
    for value, found in zip(candidates.union_curve(), measured, strict=True):
        error = torch.maximum(error, (torch.as_tensor(value) / found).log().abs())
    error[torch.as_tensor(candidates.flickering_set) > 1] = torch.inf
    best = error.argmin()
    # of two that are alike a token selects either as often as one, of two that are not 2 - density times as often
    alike = 1 - (2 * selected_side_by_side(routed_HNc, 2) - 1) / (1 - density)
    kept = (x.flatten()[best].item() for x in (steady, redrawn, flicker))
    return Persistence(density, *kept)._replace(alike=alike)


def make_selected(
    model: str,
    layer: int,
    heads: int,
    tokens: int,
    chunk_size: int,
    device: torch.device | str,
    seed: int = 0,
) -> Tensor:
    """Past chunks selected as persistently as in a layer of `benchmarks/choices`, local chunks included.

    Args:
        model, layer: whose density, persistence and local chunks are taken.
        heads: key/value heads, which select independently of each other.
        tokens: a multiple of `chunk_size`.

    Returns:
        Bool [heads, tokens, chunks], as `load_selected` does.
    """
    like, local_chunks, chunks = (
        fit_persistence(model, layer),
        router_of(model).local_chunks,
        tokens // chunk_size,
    )
    generator = torch.Generator(device).manual_seed(seed)
    token_N = torch.arange(tokens, device=device)

    def happens(probability: float | Tensor) -> Tensor:
        return torch.rand(BLOCK, tokens, device=device, generator=generator) < probability

    def kept(share: float | Tensor, redrawn: float | Tensor) -> Tensor:
        """A share of all, kept from token to token where it is not drawn anew."""
        # tokens come last: there a GPU scans them in parallel
        drawn_at = torch.where(happens(redrawn), token_N, 0).cummax(1).values
        return happens(share).gather(1, drawn_at)

    selected_HNc = torch.empty(heads, tokens, chunks, dtype=torch.bool, device=device)
    for head_Nc in selected_HNc:
        for block_Nc in head_Nc.split(BLOCK, dim=1):
            steady = kept(like.steady * like.density, like.redrawn)
            flickering = kept(like.flickering_set, like.redrawn * like.flicker) & happens(like.flicker)
            differs = torch.rand(-(-tokens // RUN), BLOCK, device=device, generator=generator) >= like.alike
            # the nearest chunk before that is drawn for itself, or the first
            source = torch.where(differs, torch.arange(BLOCK, device=device), 0).cummax(1).values
            source_Nc = source.repeat_interleave(RUN, 0)[:tokens]
            made_Nc = (steady | flickering).T.gather(1, source_Nc)
            block_Nc.copy_(made_Nc[:, : block_Nc.shape[1]])
    available_Nc = routed_available(tokens, chunks, local_chunks, device)
    past_Nc = routed_available(tokens, chunks, 0, device)
    return (selected_HNc & available_Nc) | (past_Nc & ~available_Nc)
