"""InfLLM v2, a top-k baseline: attention to a fixed number of chunks, selected by scores that get no gradient.

Papers: MiniCPM4 (arXiv 2506.07900), InfLLM-V2 (arXiv 2509.24663).
"""

import torch
from torch import Tensor

from dash_megatron.ops.checks import check_chunk_size, check_cu_seqlens, check_tensors
from dash_megatron.ops.chunk_grid import routing_of
from dash_megatron.ops.reference import upcast
from dash_megatron.ops.topk.backend import count_selected, find_backend
from dash_megatron.ops.topk.grid import make_grid
from dash_megatron.ops.topk.reference import mean_pool
from dash_megatron.ops.types import Routing
from dash_megatron.topk_selection import Selection


def infllmv2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Routing]:
    """Causal attention to a fixed number of chunks (arXiv 2506.07900, arXiv 2509.24663).

    Keys are averaged over overlapping kernels. A token's softmax over the kernels that lie wholly in its past, summed
    over the heads of its group, scores them, and a chunk's score is that of the best kernel that overlaps it. Every token
    attends to its own chunk, the `local_blocks - 1` before it, the first `initial_blocks` of its document, and the
    `top_k` best of the others. No gradient passes through the selection: nothing of it is learned.

    Args:
        q: queries after RoPE, [B, N, Hq, D]; float16, bfloat16, float32 or float64.
        k: keys after RoPE, [B, N, Hkv, D], q's dtype; Hkv divides Hq.
        v: values, [B, N, Hkv, D], q's dtype.
        selection: kernels and numbers of chunks.
        chunk_size: tokens per chunk, a power of two up to 128 (16 or more for Triton).
        cu_seqlens: boundaries of packed documents, int32 [documents + 1], then B == 1; they are read by the host.
        backend: as in `dash_attention`. Triton rounds averaged keys to q's dtype before it scores them.

    Returns:
        Output [B, N, Hq, D] in q's dtype, accumulated in float32 or better, and a `Routing`.

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    check_tensors(q, k, v)
    check_chunk_size(chunk_size)
    check_cu_seqlens(cu_seqlens, q)
    selection.check(chunk_size)
    attend, select, _ = find_backend(backend, q, chunk_size)
    B, N, _, _ = q.shape
    grid = make_grid(B, N, chunk_size, cu_seqlens, q.device)
    # autocast would run the matrix products in half precision behind our back
    with torch.autocast(q.device.type, enabled=False):
        rows_q, rows_k, rows_v = (grid.spread(x.flatten(0, 1)) for x in (q, k, v))
        pooled = mean_pool(upcast(rows_k.detach())[0], selection)
        selected = select(rows_q, pooled, grid, selection, "max")
        out = grid.gather(attend(rows_q, rows_k, rows_v, selected, grid)).view(q.shape)
    count = grid.gather(count_selected(selected)).view(B, N, -1)
    return out, routing_of(count, chunk_size, cu_seqlens)
