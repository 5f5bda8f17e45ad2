"""What the top-k baselines are made of, in plain torch: pooled keys, scores of chunks, attention to selected chunks.

Letters are those of `grid.py`. On a GPU, kernels score the chunks and attend to them (`triton.py`); the best chunks are picked
from the scores by the same code everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dash_megatron.ops.reference import upcast
from dash_megatron.ops.topk.grid import ChunkBlock, Grid, selected_mask, top_chunks
from dash_megatron.topk_selection import Selection

# Scores kept for the backward, in elements of all blocks together: above, every block is recomputed in the backward.
MAX_KEPT_SCORES = 2**25
# Finite, so that a row that sees nothing has no NaN in its gradient.
MASKED_SCORE = -1e30


def visible_kernels(grid: Grid, block: ChunkBlock, selection: Selection) -> Tensor:
    """Bool [T, J]: whether a pooled key of the chunks first <= c < end lies in a row's document and past."""
    C, device = grid.chunk_size, grid.first_c.device
    row_T = torch.arange(block.start * C, block.end * C, device=device)
    start_J = torch.arange(block.first * C, block.end * C, selection.kernel_stride, device=device)
    document_T = grid.first_c[block.start : block.end].repeat_interleave(C) * C
    return (start_J >= document_T[:, None]) & (start_J + selection.kernel_size <= row_T[:, None] + 1)


def mean_pool(x_SHD: Tensor, selection: Selection) -> Tensor:
    """Means [J, H, D] over overlapping kernels, one begins every stride; those beyond the end must not be used."""
    S, H, D = x_SHD.shape
    part_JHD = x_SHD.reshape(S // selection.kernel_stride, selection.kernel_stride, H, D).mean(1)
    parts = selection.kernel_size // selection.kernel_stride
    padded = F.pad(part_JHD, (0, 0, 0, 0, 0, parts - 1))
    return padded.unfold(0, parts, 1).mean(-1)


def kernel_weights(q_THGD: Tensor, pooled_JHD: Tensor, visible_TJ: Tensor) -> Tensor:
    """Softmax [H, G, T, J] over the visible pooled keys; zero in rows that see none. `q` comes divided by sqrt(D)."""
    scores = torch.einsum("thgd,jhd->hgtj", q_THGD, pooled_JHD).masked_fill(~visible_TJ, MASKED_SCORE)
    return scores.softmax(-1) * visible_TJ


def chunk_scores(p_HTJ: Tensor, grid: Grid, selection: Selection, reduce: str) -> Tensor:
    """Score [H, T, c] of every chunk from those of the pooled keys that overlap it: their maximum, or their sum.

    The sum is that of Native Sparse Attention: a pooled key counts once for each of its strides inside the chunk.
    """
    per_chunk, parts = (
        grid.chunk_size // selection.kernel_stride,
        selection.kernel_size // selection.kernel_stride,
    )
    window = F.pad(p_HTJ, (parts - 1, 0)).unfold(-1, per_chunk + parts - 1, per_chunk)
    if reduce == "max":
        return window.amax(-1)
    place = torch.arange(1, per_chunk + parts, device=p_HTJ.device)
    overlap = torch.minimum(place, place.flip(0)).clamp_max(min(parts, per_chunk))
    return window @ overlap.to(p_HTJ.dtype)


@torch.no_grad()
def select_chunks_reference(
    q: Tensor, pooled: Tensor, grid: Grid, selection: Selection, reduce: str
) -> Tensor:
    """Past chunks that every row of the grid selects: int64 [S, H, K], -1 in slots without one.

    Args:
        q: [S, Hq, D] on the grid.
        pooled: pooled keys [J, H, D], one begins every stride.
        grid: where the rows are.
        selection: kernels and numbers of chunks.
        reduce: "max" or "sum", as in `chunk_scores`.
    """
    C, per_chunk = grid.chunk_size, grid.chunk_size // selection.kernel_stride
    q, pooled = upcast(q, pooled)
    selected = []
    for block in grid.blocks(q.shape[1] * len(pooled)):
        q_TD = q[block.start * C : block.end * C] * q.shape[-1] ** -0.5
        pooled_JHD = pooled[block.first * per_chunk : block.end * per_chunk]
        visible = visible_kernels(grid, block, selection)
        p_HTJ = kernel_weights(q_TD.unflatten(1, (pooled.shape[1], -1)), pooled_JHD, visible).sum(1)
        selected.append(top_chunks(chunk_scores(p_HTJ, grid, selection, reduce), grid, block, selection))
    return torch.cat(selected)


def _attend_block(
    q_THGD: Tensor, k_UHD: Tensor, v_UHD: Tensor, selected_THK: Tensor, grid: Grid, block: ChunkBlock
) -> Tensor:
    """[T, H, G, D]; k and v are the U rows of the chunks first <= c < end."""
    C, device = grid.chunk_size, q_THGD.device
    row_T = torch.arange(block.start * C, block.end * C, device=device)
    row_U = torch.arange(block.first * C, block.end * C, device=device)
    own_TU = (row_U // C == row_T[:, None] // C) & (row_U <= row_T[:, None])
    seen_HTU = selected_mask(selected_THK, block).repeat_interleave(C, dim=-1) | own_TU
    scores = torch.einsum("thgd,uhd->hgtu", q_THGD, k_UHD).masked_fill(~seen_HTU[:, None], -torch.inf)
    return torch.einsum("hgtu,uhd->thgd", scores.softmax(-1), v_UHD)


def attend_selected_reference(q: Tensor, k: Tensor, v: Tensor, selected_SHK: Tensor, grid: Grid) -> Tensor:
    """Softmax attention of every row to the chunks selected and, causally, to its own: [S, Hq, D] of q's shape.

    Differentiable; works block by block over queries, and recomputes blocks in the backward where their scores would
    be too many to keep.

    Args:
        q: [S, Hq, D] on the grid.
        k, v: [S, Hkv, D].
        selected_SHK: past chunks of each row and head, -1 for none.
        grid: where the rows are.
    """
    C, dtype = grid.chunk_size, q.dtype
    q, k, v = upcast(q, k, v)
    q_SHGD = q.mul(q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))
    outputs = []
    for block in grid.blocks(q.shape[1] * grid.num_rows):
        rows, seen = slice(block.start * C, block.end * C), slice(block.first * C, block.end * C)
        outputs.append(
            call_block(
                _attend_block, q.shape[1] * grid.num_rows**2, q_SHGD[rows], k[seen], v[seen], selected_SHK[rows], grid, block
            )
        )  # fmt: skip
    return torch.cat(outputs).flatten(1, 2).to(dtype)


def call_block(function: Callable[..., Any], all_scores: int, *args: Any) -> Any:
    """Call a block's function, so that the backward runs it again if the scores of all blocks are too many to keep."""
    if torch.is_grad_enabled() and all_scores > MAX_KEPT_SCORES:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
