"""The top-k baselines on a GPU: what the kernels need to score chunks, and to attend to the selected ones."""

import torch
from torch import Tensor

from dash_megatron.ops.kernels.attend_lists import attend_lists
from dash_megatron.ops.kernels.chunk_scores import score_chunks
from dash_megatron.ops.kernels.configs import Launches, find_launches
from dash_megatron.ops.kernels.geometry import Lists, Sizes, check_supported, size_tiles
from dash_megatron.ops.topk.grid import Grid, selected_mask, top_chunks
from dash_megatron.topk_selection import Selection

# What a score counts in `Grid.blocks`, more than 1 because `top_chunks` keeps int64 copies of the scores.
SCORE_COST = 4


def prepare(q: Tensor, num_kv_heads: int, grid: Grid) -> tuple[Launches, Sizes]:
    """How kernels are launched for q [S, Hq, D], and the sizes that they go by."""
    check_supported(q, num_kv_heads)
    S, Hq, D = q.shape
    launches = find_launches(q.device, q.dtype, D, grid.chunk_size, Hq // num_kv_heads)
    return launches, size_tiles(
        S, (Hq, D), num_kv_heads, grid.chunk_size, grid.num_chunks, 0, launches.tile_rows
    )


def make_lists(selected_SHK: Tensor, grid: Grid, sizes: Sizes) -> Lists:
    """The lists of all query tiles from the chunks that each row of the grid selects; letters are those of `grid.py`.

    The host waits for the number of their entries.
    """
    H, T, tiles = sizes.num_kv_heads, sizes.tile_tokens, sizes.tiles_per_chunk
    counts = torch.empty(H, sizes.num_chunks, tiles, dtype=torch.int32, device=selected_SHK.device)
    offset = torch.empty(H, sizes.num_chunks, tiles, dtype=torch.int64, device=selected_SHK.device)
    chunk, log_prior, room = [], [], 0
    for block in grid.blocks(H * grid.num_chunks):
        rows = slice(block.start * sizes.chunk_size, block.end * sizes.chunk_size)
        selected_HntTc = selected_mask(selected_SHK[rows], block).view(
            H, -1, tiles, T, block.end - block.first
        )
        listed_Hntc = selected_HntTc.any(3)
        entries = listed_Hntc.nonzero(as_tuple=True)
        chunk.append((entries[-1] + block.first).int())
        tokens = selected_HntTc.transpose(3, 4)[entries]
        log_prior.append(torch.zeros(tokens.shape, device=tokens.device).masked_fill_(~tokens, -torch.inf))
        count = listed_Hntc.sum(-1)
        end = count.flatten().cumsum(0).view_as(count)
        counts[:, block.start : block.end] = count
        offset[:, block.start : block.end] = room + end - count
        room += len(tokens)
    return Lists(torch.cat(chunk), torch.cat(log_prior), offset.flatten(), counts.flatten())


def attend_selected_triton(q: Tensor, k: Tensor, v: Tensor, selected_SHK: Tensor, grid: Grid) -> Tensor:
    """As `attend_selected_reference`, for float16, bfloat16 and float32, accumulated in float32.

    Every bit is the same in every run.
    """
    launches, sizes = prepare(q, k.shape[1], grid)
    start = torch.arange(0, len(q), grid.chunk_size, device=q.device)
    chunks = torch.stack([start, start + grid.chunk_size, grid.first_c]).int()
    q = q if q.stride(-1) == 1 else q.contiguous()
    lists = make_lists(selected_SHK, grid, sizes)
    return attend_lists(q, k.contiguous(), v.contiguous(), lists, chunks, sizes, launches)


@torch.no_grad()
def select_chunks_triton(q: Tensor, pooled: Tensor, grid: Grid, selection: Selection, reduce: str) -> Tensor:
    """As `select_chunks_reference`, for float16, bfloat16 and float32; pooled keys are rounded to q's dtype.

    Probabilities are accumulated in float32. Every bit is the same in every run.
    """
    launches, sizes = prepare(q, pooled.shape[1], grid)
    q = q if q.stride(-1) == 1 else q.contiguous()
    pooled = pooled.to(q.dtype).contiguous()
    selected = []
    for block in grid.blocks(SCORE_COST * pooled.shape[1] * grid.num_chunks):
        scores = score_chunks(
            q, pooled, grid.first_c, *block, selection.kernel_size, selection.kernel_stride, reduce, sizes, launches.route
        )  # fmt: skip
        selected.append(top_chunks(scores, grid, block, selection))
    return torch.cat(selected)
