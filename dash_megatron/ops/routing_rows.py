"""Queries of a row of tokens and what its routers make of them, block by block: what `diagnostics.py` measures.

Letters are as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.chunk_grid import ChunkGrid, document_positions
from dash_megatron.ops.pooling import pool_queries_reference
from dash_megatron.ops.reference import MAX_BLOCK_SCORES, QueryPositions, probabilities, summarize
from dash_megatron.ops.types import Router


class Head(NamedTuple):
    """One key/value head of a row of tokens."""

    q_NGD: Tensor
    routing_q_NGD: Tensor
    """The router's queries."""
    k_cCD: Tensor
    """Keys on the grid, float32."""
    summary_cD: Tensor
    router: Router
    grid: ChunkGrid

    def queries(self, tokens: Tensor | slice) -> Tensor:
        """Queries [S, G, D] of these tokens divided by sqrt(D), float32."""
        return self.q_NGD[tokens].float() * self.q_NGD.shape[-1] ** -0.5

    def probabilities(self, tokens: Tensor | slice, routed_Sc: Tensor, chunks: slice) -> Tensor:
        """Group mean [S, c] of the entmax over routed chunks, for the queries of these tokens."""
        q_SGD = self.routing_q_NGD[tokens].float() * self.q_NGD.shape[-1] ** -0.5
        scores = q_SGD @ self.summary_cD[chunks].mT
        z_SGc = (self.router.factors(q_SGD.dtype) * scores).view_as(scores)
        if self.router.pool_heads:
            z_SGc = z_SGc.mean(1, keepdim=True)
        # the queries as a batch, with one query each
        return probabilities(z_SGc[:, :, None], routed_Sc[:, None, None], self.router.alpha)[:, 0]


class Row(NamedTuple):
    """Tokens of all rows of a batch, concatenated."""

    q_NHGD: Tensor
    routing_q_NHGD: Tensor
    k_NHD: Tensor
    routing_k_NHD: Tensor
    position_N: Tensor
    grid: ChunkGrid

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        cu_seqlens: Tensor | None,
        router: Router,
        routing_q: Tensor | None = None,
        routing_k: Tensor | None = None,
    ) -> Row:
        """The tokens of q [B, N, Hq, D] and k [B, N, Hkv, D]; arguments are those of `diagnostics.sample_routing`.

        Rows of a batch count as documents. Waits for the device where there are several.
        """
        B, N, Hq, D = q.shape
        if cu_seqlens is None and B > 1:
            cu_seqlens = torch.arange(0, (B + 1) * N, N, dtype=torch.int32, device=q.device)
        Hkv, q_NHD = k.shape[2], q.reshape(B * N, Hq, D)
        position_N = document_positions(B * N, cu_seqlens, q.device)
        k_NHD = k.reshape(B * N, Hkv, D)
        pooled_NHD = q_NHD if routing_q is None else routing_q.flatten(0, 1)
        if router.query_pool > 1:
            pooled_NHD = pool_queries_reference(pooled_NHD[None], position_N, router.query_pool)[0]
        return cls(
            q_NHD.unflatten(1, (Hkv, -1)),
            pooled_NHD.unflatten(1, (Hkv, -1)),
            k_NHD,
            k_NHD if routing_k is None else routing_k.reshape(B * N, Hkv, D),
            position_N,
            ChunkGrid.of(B * N, router.chunk_size, cu_seqlens, q.device),
        )

    def heads(self, summary_query: Tensor, router: Router) -> Iterator[Head]:
        """The key/value heads one by one, for memory."""
        for head in range(self.k_NHD.shape[1]):
            only = slice(head, head + 1)
            k_1HcCD = routing_k_1HcCD = self._by_chunk(self.k_NHD[:, only])
            if self.routing_k_NHD is not self.k_NHD:
                routing_k_1HcCD = self._by_chunk(self.routing_k_NHD[:, only])
            summary_1HcD = summarize(routing_k_1HcCD, self.grid.filled(), summary_query[only].float())
            queries = self.q_NHGD[:, head], self.routing_q_NHGD[:, head]
            yield Head(*queries, k_1HcCD[0, 0], summary_1HcD[0, 0], router.of_heads(only), self.grid)

    def _by_chunk(self, k_NHD: Tensor) -> Tensor:
        return self.grid.by_chunk(self.grid.spread(k_NHD[None].float()))

    def places(self, token_S: Tensor) -> QueryPositions:
        """Where tokens stand."""
        grid = self.grid
        return QueryPositions(grid.chunk_N[token_S], grid.slot_N[token_S], grid.first_chunk_N[token_S])


class SampleBlock(NamedTuple):
    """Sampled queries, rising, and the chunks that they may need."""

    token_S: Tensor
    places: QueryPositions
    first: int
    end: int
    """One past the last chunk."""

    @property
    def chunks(self) -> slice:
        """Where they lie among all chunks of the row."""
        return slice(self.first, self.end)

    @property
    def chunk_c(self) -> Tensor:
        """Numbers of the chunks."""
        return torch.arange(self.first, self.end, device=self.token_S.device)


def sample_blocks(row: Row, token_S: Tensor, scores_per_chunk: int) -> Iterator[SampleBlock]:
    """Cut rising tokens into blocks with at most as many scores as may be alive."""
    rows = max(1, MAX_BLOCK_SCORES // (row.grid.num_chunks * scores_per_chunk))
    for part in token_S.split(rows):
        places = row.places(part)
        first, end = torch.stack([places.first_chunk_T.min(), places.chunk_T.max() + 1]).tolist()
        yield SampleBlock(part, places, first, end)


@torch.no_grad()
def selected_chunks(
    q: Tensor, k: Tensor, summary_query: Tensor, router: Router,
    routing_q: Tensor | None = None, routing_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The past chunks that every token of one document selects; local chunks count as selected, the own one does not.

    Probabilities are computed in float32 from what is given; kernels in half precision may differ on chunks within a
    rounding of the threshold.

    Args:
        q: queries after RoPE [1, N, Hq, D].
        k: keys after RoPE [1, N, Hkv, D].
        summary_query: [Hkv, D].
        router: as `dash_attention` was given it.
        routing_q, routing_k: the router's own queries and keys [1, N, Hkv, D], if it was given such.

    Returns:
        Bool [Hkv, N, chunks], on the CPU.
    """
    with torch.autocast(q.device.type, enabled=False):
        row = Row.of(q, k, None, router, routing_q, routing_k)
        N, H, G, _ = row.q_NHGD.shape
        selected_HNc = torch.zeros(H, N, row.grid.num_chunks, dtype=torch.bool)
        parts = list(sample_blocks(row, torch.arange(N, device=q.device), G))
        for head, selected_Nc in zip(row.heads(summary_query, router), selected_HNc, strict=True):
            for block in parts:
                routed_Sc, always_Sc = block.places.masks(block.chunk_c, router.local_chunks)
                p_Sc = head.probabilities(block.token_S, routed_Sc, block.chunks)
                past_Sc = ((p_Sc > 0) | always_Sc) & ~block.places.own(block.chunk_c)
                selected_Nc[block.token_S.cpu(), block.chunks] = past_Sc.cpu()
    return selected_HNc
