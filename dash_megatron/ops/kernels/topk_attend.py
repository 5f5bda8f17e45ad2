"""Attention to chunks that were selected elsewhere, on the GPU: the list-driven kernels of DashAttention, without its router.

A selection is a list like any other, whose log priors are 0 where a token selected the chunk and -inf where it did not.
"""

from typing import Any

import torch
from torch import Tensor

from dash_megatron.ops.kernels.attend import attend
from dash_megatron.ops.kernels.backward_kv import backward_kv
from dash_megatron.ops.kernels.backward_q import backward_q
from dash_megatron.ops.kernels.configs import Plan, plan
from dash_megatron.ops.kernels.geometry import Lists, Sizes, check_supported, size_tiles
from dash_megatron.ops.kernels.transpose import divide, transpose
from dash_megatron.ops.topk.grid import Grid, selected_mask
from dash_megatron.ops.types import Router

# A prior is taken as it is, and there are no routing scores.
FLAT = Router(estimate_diagonal=False)


def _prepare(q: Tensor, k: Tensor, grid: Grid) -> tuple[Plan, Sizes, Tensor]:
    """Launches, sizes, and the table of chunks, int32 [3, c], all of which are whole on the grid."""
    S, Hq, D = q.shape
    C, nc = grid.chunk_size, grid.num_chunks
    launches = plan(q.device, q.dtype, D, C, Hq // k.shape[1])
    sizes = size_tiles(S, (Hq, D), k.shape[1], C, nc, 0, launches.tile_rows)
    start = torch.arange(0, S, C, device=q.device)
    return launches, sizes, torch.stack([start, start + C, grid.first_c]).int()


def make_lists(selected_SHK: Tensor, grid: Grid, sizes: Sizes) -> Lists:
    """The lists of all query tiles; the host waits for the number of their entries."""
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


class _AttendSelected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, selected_SHK: Tensor, grid: Grid) -> Tensor:
        launches, sizes, chunks = _prepare(q, k, grid)
        lists = make_lists(selected_SHK, grid, sizes)
        mean_log = torch.zeros(q.shape[0], k.shape[1], device=q.device)
        out, lse = attend(q, k, v, lists, mean_log, chunks, sizes, FLAT, launches.attend)
        ctx.grid = grid
        ctx.save_for_backward(q, k, v, out, lse, mean_log, *lists)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mean_log, *lists = ctx.saved_tensors
        lists = Lists(*lists)
        launches, sizes, chunks = _prepare(q, k, ctx.grid)
        d_out = gradients[0].contiguous()
        dq, d_prior, delta, centred_lse = backward_q(
            q, k, v, out, d_out, lse, lists, mean_log, chunks, sizes, FLAT, launches.queries
        )
        transposed = transpose(lists, chunks, sizes)
        division = divide(transposed, chunks, sizes, min(launches.parts, sizes.least_work))
        # there are no summaries: whatever is multiplied by their gradient of zero
        no_query = torch.zeros(k.shape[1:], dtype=torch.float32, device=k.device)
        no_gradient = torch.zeros(k.shape[1], sizes.num_chunks, k.shape[2], device=k.device)
        dk, dv, _ = backward_kv(
            q, k, v, no_query, d_out, centred_lse, delta, lse, mean_log, lse, no_gradient, no_gradient, d_prior,
            lists, transposed, division, chunks, sizes, FLAT, launches.keys, deterministic=False,
        )  # fmt: skip
        return dq, dk, dv, None, None


def attend_selected_triton(q: Tensor, k: Tensor, v: Tensor, selected_SHK: Tensor, grid: Grid) -> Tensor:
    """As `attend_selected_reference`, for float16, bfloat16 and float32, accumulated in float32.

    Every bit is the same in every run.
    """
    check_supported(q, k.shape[1])
    q = q if q.stride(-1) == 1 else q.contiguous()
    return _AttendSelected.apply(q, k.contiguous(), v.contiguous(), selected_SHK, grid)
