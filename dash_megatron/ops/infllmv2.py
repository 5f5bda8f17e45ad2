"""InfLLM v2, a top-k baseline: attention to a fixed number of chunks, chosen by scores that get no gradient.

Papers: MiniCPM4 (arXiv 2506.07900), InfLLM-V2 (arXiv 2509.24663).
"""

from typing import Literal, overload

import torch
from torch import Tensor

from dash_megatron.ops.attention import Routing, _density
from dash_megatron.ops.blocks import (
    Grid,
    Selection,
    attention_to_chosen,
    check_tensors,
    choose,
    chunk_scores,
    count_selected,
    kernel_weights,
    make_grid,
    mean_pool,
    visible_kernels,
)
from dash_megatron.ops.reference import wide


@torch.no_grad()
def choose_chunks(q_SHGD: Tensor, k_SHD: Tensor, grid: Grid, selection: Selection) -> Tensor:
    """Past chunks that every row of the grid selects: int64 [S, H, K], -1 in slots without one."""
    C, per_chunk = grid.chunk_size, grid.chunk_size // selection.kernel_stride
    q_SHGD, k_SHD = wide(q_SHGD, k_SHD)
    pooled = mean_pool(k_SHD, selection)
    chosen = []
    for block in grid.blocks(q_SHGD.shape[1] * q_SHGD.shape[2] * len(pooled)):
        q_THGD = q_SHGD[block.start * C : block.end * C] * q_SHGD.shape[-1] ** -0.5
        visible = visible_kernels(grid, block, selection)
        pooled_JHD = pooled[block.first * per_chunk : block.end * per_chunk]
        p_HTJ = kernel_weights(q_THGD, pooled_JHD, visible).sum(1)
        chosen.append(choose(chunk_scores(p_HTJ, grid, selection, "max"), grid, block, selection))
    return torch.cat(chosen)


@overload
def infllmv2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection = ...,
    chunk_size: int = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
    return_routing: Literal[False] = ...,
) -> Tensor: ...


@overload
def infllmv2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection = ...,
    chunk_size: int = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
    *,
    return_routing: Literal[True],
) -> tuple[Tensor, Routing]: ...


def infllmv2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_routing: bool = False,
) -> Tensor | tuple[Tensor, Routing]:
    """Causal attention to a fixed number of chunks (arXiv 2506.07900, arXiv 2509.24663).

    Keys are averaged over overlapping kernels. A token's softmax over the kernels that lie wholly in its past, summed
    over the heads of its group, scores them, and a chunk's score is that of the best kernel that overlaps it. Every token
    attends to its own chunk, the `local_blocks - 1` before it, the first `initial_blocks` of its document, and the
    `top_k` best of the others. Nothing is learned by the choice: no gradient passes through it.

    Args:
        q: queries after RoPE, [B, N, Hq, D]; float16, bfloat16, float32 or float64.
        k: keys after RoPE, [B, N, Hkv, D], q's dtype; Hkv divides Hq.
        v: values, [B, N, Hkv, D], q's dtype.
        selection: kernels and numbers of chunks.
        chunk_size: tokens per chunk, a power of two up to 128 (16 or more for Triton).
        cu_seqlens: boundaries of packed documents, int32 [documents + 1], then B == 1; they are read by the host.
        backend: of the attention to the chunks chosen, as in `dash_attention`.
        return_routing: also return how many chunks were chosen.

    Returns:
        Output [B, N, Hq, D] in q's dtype, accumulated in float32 or better; with `return_routing`, also a `Routing`.

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    check_tensors(q, k, v, chunk_size, cu_seqlens)
    selection.check(chunk_size)
    attend = attention_to_chosen(backend, q, chunk_size)
    B, N, _, _ = q.shape
    grid = make_grid(B, N, chunk_size, cu_seqlens, q.device)
    # autocast would run the matrix products in half precision behind our back
    with torch.autocast(q.device.type, enabled=False):
        rows_q, rows_k, rows_v = (grid.spread(x.flatten(0, 1)) for x in (q, k, v))
        chosen = choose_chunks(rows_q.unflatten(1, (k.shape[2], -1)), rows_k, grid, selection)
        out = grid.gather(attend(rows_q, rows_k, rows_v, chosen, grid)).view(q.shape)
    if not return_routing:
        return out
    selected = grid.gather(count_selected(chosen)).view(B, N, -1)
    return out, Routing(chunks_selected=selected, density=_density(selected, chunk_size, cu_seqlens))
