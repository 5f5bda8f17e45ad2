"""DashAttention of whole sequences in plain torch: the CPU path of training, and what the kernels must equal.

Queries are taken block by block, so that scores of later chunks are never made; where the scores of all blocks would be too
many to keep for the backward, every block is recomputed there. Letters are those of `reference.py`, with B batch and N tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dash_megatron.ops.chunk_grid import ChunkGrid, document_positions
from dash_megatron.ops.pooling import pool_queries_reference
from dash_megatron.ops.reference import MAX_BLOCK_SCORES, QueryPositions, attend, route, summarize
from dash_megatron.ops.types import Router

# Most tokens in a query block: enough rows for the matrix products, few enough to skip most of the causal triangle.
MAX_BLOCK_TOKENS = 128
MIN_BLOCK_TOKENS = 16
# Scores kept for the backward, in elements of all blocks together: above, every block is recomputed in the backward.
MAX_KEPT_SCORES = 2**25


class QueryBlock(NamedTuple):
    """Consecutive queries and the chunks that they may need."""

    start: int
    """First token."""
    end: int
    """One past the last token."""
    first_chunk: int
    """First chunk of the first token's document."""
    own_chunk: int
    """The first token's own chunk: causal masking inside a chunk starts here."""
    end_chunk: int
    """One past the last token's own chunk."""


def query_blocks(grid: ChunkGrid, num_tokens: int, rows_per_token: int) -> tuple[list[QueryBlock], int]:
    """Cut the tokens into blocks; returns them and the number of scores of all blocks together."""
    size = MAX_BLOCK_TOKENS
    while True:
        start = torch.arange(0, num_tokens, size, device=grid.chunk_N.device)
        end = (start + size).clamp_max(num_tokens)
        first_chunk, end_chunk = grid.first_chunk_N[start], grid.chunk_N[end - 1] + 1
        scores = (end - start) * (end_chunk - first_chunk) * grid.num_slots * rows_per_token
        most, total = torch.stack([scores.max(), scores.sum()]).tolist()
        if most <= MAX_BLOCK_SCORES or size <= MIN_BLOCK_TOKENS:
            blocks = torch.stack([start, end, first_chunk, grid.chunk_N[start], end_chunk], dim=1)
            return [QueryBlock(*block) for block in blocks.tolist()], total
        size //= 2


def _attend_block(
    q_BHGTD: Tensor,
    routing_q_BHGTD: Tensor,
    k_BHcCD: Tensor,
    v_BHcCD: Tensor,
    summary_BHcD: Tensor,
    places: QueryPositions,
    block: QueryBlock,
    router: Router,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, G, T, D] and chunks selected [B, H, T] of one block, given the chunks that it may need."""
    chunk_c = torch.arange(block.first_chunk, block.end_chunk, device=q_BHGTD.device)
    masks = places.masks(chunk_c, router.local_chunks)
    bias_BHTc, count_BHT = route(routing_q_BHGTD, summary_BHcD, *masks, router)
    # past chunks of a document are full, so what is hidden in the own chunk covers the empty slots too
    hidden_TcC = places.hidden(chunk_c[block.own_chunk - block.first_chunk :], k_BHcCD.shape[-2])
    return attend(q_BHGTD, k_BHcCD, v_BHcCD, bias_BHTc, hidden_TcC), count_BHT


def _attend_sequence(
    q: Tensor,
    routing_q: Tensor | None,
    k: Tensor,
    routing_k: Tensor | None,
    v: Tensor,
    summary_query: Tensor,
    grid: ChunkGrid,
    router: Router,
) -> tuple[Tensor, Tensor]:
    """What `dash_attention_reference` returns, in the dtype of the inputs; `routing_q` and `routing_k` are None where they are
    `q` and `k`."""
    B, N, Hq, D = q.shape
    Hkv = k.shape[2]
    # one tensor where attention's queries route
    queries = [q] if routing_q is None else [q, routing_q]
    queries_BHGND = [x.mul(D**-0.5).unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4) for x in queries]
    k_BHSD, v_BHSD = grid.spread(k), grid.spread(v)
    summarized_BHSD = k_BHSD if routing_k is None else grid.spread(routing_k)
    summary_BHcD = summarize(grid.by_chunk(summarized_BHSD), grid.filled(), summary_query)

    blocks, num_scores = query_blocks(grid, N, rows_per_token=B * Hq)
    recompute = torch.is_grad_enabled() and len(blocks) > 1 and num_scores > MAX_KEPT_SCORES
    outputs, counts = [], []
    for block in blocks:
        tokens, chunks = slice(block.start, block.end), slice(block.first_chunk, block.end_chunk)
        slots = slice(block.first_chunk * grid.num_slots, block.end_chunk * grid.num_slots)
        queries_BHGTD = [x[:, :, :, tokens] for x in queries_BHGND]
        args = (
            queries_BHGTD[0],
            queries_BHGTD[-1],
            grid.by_chunk(k_BHSD[:, :, slots]),
            grid.by_chunk(v_BHSD[:, :, slots]),
            summary_BHcD[:, :, chunks],
            QueryPositions(grid.chunk_N[tokens], grid.slot_N[tokens], grid.first_chunk_N[tokens]),
            block,
            router,
        )
        if recompute:
            out, count = checkpoint(_attend_block, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            out, count = _attend_block(*args)
        outputs.append(out)
        counts.append(count)
    out_BNHGD = torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4)
    return out_BNHGD.reshape(B, N, Hq, D), torch.cat(counts, dim=2).transpose(1, 2).contiguous()


def dash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    router: Router,
    cu_seqlens: Tensor | None,
    routing_q: Tensor | None = None,
    routing_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the chunks an entmax router selects, with its log probabilities as a prior (arXiv 2605.18753).

    Differentiable in all tensors, the router's scaling factor included. Arguments are those of `dash_attention`, which checks
    them.

    Args:
        q: queries after RoPE [B, N, Hq, D]; computed in float64 if float64, otherwise in float32.
        k, v: keys after RoPE, and values [B, N, Hkv, D].
        summary_query: [Hkv, D].
        router: its constants.
        cu_seqlens: [documents + 1] (then B == 1), or None for one document per batch row.
        routing_q, routing_k: [B, N, Hkv, D], or None both: the router's own queries and keys, beside `pool_heads`.

    Returns:
        Output [B, N, Hq, D] in q's dtype, and the number of chunks selected, the own one included, int32 [B, N, Hkv].
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_tokens = q.shape[1]
    grid = ChunkGrid.of(num_tokens, router.chunk_size, cu_seqlens, q.device)
    if router.query_pool > 1:
        position_N = document_positions(num_tokens, cu_seqlens, q.device)
        routing_q = pool_queries_reference(
            q if routing_q is None else routing_q, position_N, router.query_pool
        )
    routing_q, routing_k = (None if x is None else x.to(dtype) for x in (routing_q, routing_k))
    # autocast would run the matrix products in half precision behind our back
    with torch.autocast(q.device.type, enabled=False):
        out, chunks_selected = _attend_sequence(
            q.to(dtype), routing_q, k.to(dtype), routing_k, v.to(dtype), summary_query.to(dtype), grid, router
        )
    return out.to(q.dtype), chunks_selected
