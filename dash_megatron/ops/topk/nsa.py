"""Native Sparse Attention (NSA, arXiv 2502.11089), a top-k baseline: compressed, selected and recent keys, with gates.

Two things differ from the paper, so that the baseline fits where every other attention stands and twins keep their sizes:
the branches share keys and values, and the window is made of whole chunks. How keys are compressed is said at `compress`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_megatron.ops.checks import check_chunk_size, check_cu_seqlens, check_tensors
from dash_megatron.ops.chunk_grid import routing_of
from dash_megatron.ops.reference import upcast
from dash_megatron.ops.topk.backend import Backend, find_backend
from dash_megatron.ops.topk.grid import ChunkBlock, Grid, make_grid
from dash_megatron.ops.topk.reference import call_block, visible_kernels
from dash_megatron.ops.types import Routing
from dash_megatron.topk_selection import Selection, check_window

# Query rows of one block of the attention to compressed keys: fewer skip more of the causal triangle, more keep a GPU busy.
BRANCH_ROWS = 4096
# Elements of all blocks' bias that layers with the same documents share: above, each makes its own, in the backward again.
MAX_SHARED_BIAS = 2**28


class Compression(NamedTuple):
    """Weights that compress the keys, or the values, of a kernel; all zero means their mean. l tokens make a kernel."""

    pool: Tensor
    """[Hkv, l, D]: what the place in the kernel adds to the weight of a token, in units of the mean's."""
    mlp_in: Tensor
    """[Hkv, D, D]."""
    mlp_out: Tensor
    """[Hkv, D, D]."""


def compress(x_SHD: Tensor, weights: Compression, selection: Selection) -> Tensor:
    """Compressed keys or values [J, H, D], one begins every stride; those beyond the end must not be used.

    A weighted mean, whose weights are learned for every place and channel, plus a two-layer perceptron of it. The
    paper's perceptron reads all tokens of a kernel with a position embedding: l times the weights, which would make the
    twin a larger model.
    """
    size, stride = selection.kernel_size, selection.kernel_stride
    _, H, D = x_SHD.shape
    # elementwise, once for every place of a stride in a kernel: there are no channels to multiply as matrices
    place_HplD = ((1 + weights.pool) / size).unflatten(1, (size // stride, stride))
    part_JpHD = (x_SHD.reshape(-1, 1, stride, H, D) * place_HplD.permute(1, 2, 0, 3)).sum(2)
    padded = F.pad(part_JpHD, (0, 0, 0, 0, 0, 0, 0, size // stride - 1))
    shifted = [padded[part : part + len(part_JpHD), part] for part in range(size // stride)]
    mean = sum(shifted[1:], shifted[0])
    inner = F.silu(torch.einsum("jhd,hde->jhe", mean, weights.mlp_in))
    return mean + torch.einsum("jhe,hed->jhd", inner, weights.mlp_out)


def _bias(grid: Grid, block: ChunkBlock, selection: Selection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What hides compressed keys from a block's rows, [T, J] to add to scores, and which rows see none, bool [T]."""
    visible_TJ = visible_kernels(grid, block, selection)
    blind_T = ~visible_TJ.any(-1)
    # nothing to see would make NaN: let them see something
    visible_TJ[:, 0] |= blind_T
    # in rows of whole 32 bytes, or torch's attention would copy it
    wider = F.pad(visible_TJ, (0, -visible_TJ.shape[1] % 16))
    bias = torch.zeros(wider.shape, dtype=dtype, device=wider.device).masked_fill_(~wider, -torch.inf)
    return bias[:, : visible_TJ.shape[1]], blind_T


def _compressed_block(
    q_THGD: Tensor, k_JHD: Tensor, v_JHD: Tensor, make_bias: Callable[[], tuple[Tensor, Tensor]]
) -> Tensor:
    """Softmax attention [T, H, G, D] to the visible compressed keys; zero in rows that see none."""
    bias_TJ, blind_T = make_bias()
    # heads of a group as a batch share keys and values
    q_GHTD = q_THGD.permute(2, 1, 0, 3)
    k, v = (x.transpose(0, 1).expand(len(q_GHTD), -1, -1, -1) for x in (k_JHD, v_JHD))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out_GHTD = F.scaled_dot_product_attention(q_GHTD, k, v, attn_mask=bias_TJ)
    return out_GHTD.masked_fill(blind_T[:, None], 0).permute(2, 1, 0, 3)


def _compressed_branch(operands: Sequence[Tensor], grid: Grid, selection: Selection) -> Tensor:
    """Output [S, Hq, D] of q [S, Hq, D] and compressed k and v [J, H, D], block by block over queries."""
    q, k_JHD, v_JHD = operands
    C, per_chunk = grid.chunk_size, grid.chunk_size // selection.kernel_stride
    # on a GPU torch's attention holds a bias for all heads and no scores
    heads = 1 if q.is_cuda else q.shape[1]
    blocks = list(grid.blocks(heads * len(k_JHD), BRANCH_ROWS))
    pairs = sum((block.end - block.start) * (block.end - block.first) for block in blocks) * C * per_chunk
    shared = pairs <= MAX_SHARED_BIAS
    kept = heads * pairs * (not shared or not q.is_cuda)
    # one split: slices would each get a gradient of the whole
    parts = q.unflatten(1, (k_JHD.shape[1], -1)).split([(block.end - block.start) * C for block in blocks])
    outputs = []
    for block, part in zip(blocks, parts, strict=True):
        seen = slice(block.first * per_chunk, block.end * per_chunk)
        make = functools.partial(_bias, grid, block, selection, q.dtype)
        if shared:
            make = functools.partial(grid.shared, ("bias", block, selection, q.dtype), make)
        outputs.append(call_block(_compressed_block, kept, part, k_JHD[seen], v_JHD[seen], make))
    return torch.cat(outputs).flatten(1, 2)


def _recent_chunks(grid: Grid, num_heads: int, num_recent: int) -> Tensor:
    """The chunks before its own that every row's window holds: int64 [S, H, num_recent], -1 where the document begins."""
    own_c = torch.arange(grid.num_chunks, device=grid.first_c.device)
    recent = own_c[:, None] - 1 - torch.arange(num_recent, device=own_c.device)
    recent = recent.masked_fill(recent < grid.first_c[:, None], -1)
    return recent.repeat_interleave(grid.chunk_size, dim=0)[:, None].expand(-1, num_heads, -1)


def _count_either(selected_SHK: Tensor, recent_SHW: Tensor, grid: Grid) -> Tensor:
    """int32 [S, H]: chunks that were selected, or are in the window, or the own one."""
    num_recent = (recent_SHW >= 0).sum(-1)
    own_S = torch.arange(grid.num_rows, device=selected_SHK.device) // grid.chunk_size
    before_SH = own_S[:, None] - num_recent
    selected_before = (selected_SHK >= 0) & (selected_SHK < before_SH[..., None])
    return (1 + num_recent + selected_before.sum(-1)).int()


def _attend_branches(
    rows: Sequence[Tensor],
    compress_k: Compression,
    compress_v: Compression,
    selection: Selection,
    window: int,
    grid: Grid,
    functions: Backend,
) -> tuple[list[Tensor], Tensor]:
    """Outputs [S, Hq, D] of the three attentions for q, k and v on the grid, and the counts of `_count_either`."""
    q, k, v = rows
    keys, values = (
        compress(upcast(x)[0], Compression(*upcast(*learned)), selection)
        for x, learned in ((k, compress_k), (v, compress_v))
    )
    selected = functions.select(q, keys.detach(), grid, selection, "sum")
    compressed = _compressed_branch([x.to(functions.dtype) for x in (q, keys, values)], grid, selection)
    recent = _recent_chunks(grid, k.shape[1], window // grid.chunk_size)
    outputs = [compressed, functions.attend(*rows, selected, grid), functions.attend(*rows, recent, grid)]
    return outputs, _count_either(selected, recent, grid)


def _gated_sum(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Sum of outputs [B, N, Hq, D], each times its gate [B, N, Hq, branches], in float32 or better."""
    parts = [upcast(x)[0] for x in outputs]
    gated = zip(parts, gates.unbind(-1), strict=True)
    return sum((part * gate.to(part.dtype)[..., None] for part, gate in gated), torch.zeros_like(parts[0]))


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    compress_k: Compression,
    compress_v: Compression,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    window: int = 512,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Routing]:
    """Native Sparse Attention (arXiv 2502.11089): a gated sum of three causal attentions.

    The first attends to compressed keys and values of overlapping kernels, those that lie wholly in the token's past.
    Its weights, summed over the heads of a group and over the kernels that overlap a chunk, score the chunks. The second
    attends to a token's own chunk, the `local_blocks - 1` before it, the first `initial_blocks` of its document, and the
    `top_k` best of the others; the selection passes no gradient on. The third attends to the token's own chunk and the
    `window` tokens before it. A token whose past has no whole kernel gets 0 from the first.

    Args:
        q: queries after RoPE, [B, N, Hq, D]; float16, bfloat16, float32 or float64.
        k: keys after RoPE, [B, N, Hkv, D], q's dtype; Hkv divides Hq.
        v: values, [B, N, Hkv, D], q's dtype.
        gates: factors of the three, [B, N, Hq, 3].
        compress_k, compress_v: how keys and values are compressed.
        selection: kernels and numbers of chunks.
        window: past tokens of the third, a multiple of `chunk_size`.
        chunk_size: tokens per chunk, a power of two up to 128 (16 or more for Triton).
        cu_seqlens: boundaries of packed documents, int32 [documents + 1], then B == 1; they are read by the host.
        backend: as in `dash_attention`. Triton rounds compressed keys and values, which are computed in float32, to q's
            dtype; torch attends to them, and on a GPU the last bits of gradients may differ from run to run.

    Returns:
        Output [B, N, Hq, D] in q's dtype, accumulated in float32 or better, and a `Routing` of the chunks that the second or the
        third attends to.

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    check_tensors(q, k, v)
    check_chunk_size(chunk_size)
    check_cu_seqlens(cu_seqlens, q)
    selection.check(chunk_size)
    _check_own(q, k, gates, (compress_k, compress_v), selection, window, chunk_size)
    functions = find_backend(backend, q, chunk_size)
    B, N, _, _ = q.shape
    grid = make_grid(B, N, chunk_size, cu_seqlens, q.device)
    # autocast would run the matrix products in half precision behind our back
    with torch.autocast(q.device.type, enabled=False):
        rows = [grid.spread(x.flatten(0, 1)) for x in (q, k, v)]
        outputs, count = _attend_branches(rows, compress_k, compress_v, selection, window, grid, functions)
        out = _gated_sum([grid.gather(x).view(q.shape) for x in outputs], gates).to(q.dtype)
    return out, routing_of(grid.gather(count).view(B, N, -1), chunk_size, cu_seqlens)


def _check_own(
    q: Tensor,
    k: Tensor,
    gates: Tensor,
    compressions: tuple[Compression, Compression],
    selection: Selection,
    window: int,
    chunk_size: int,
) -> None:
    """What only this attention takes."""
    check_window(window, chunk_size)
    H, D = k.shape[2:]
    named = {"gates": (gates, [*q.shape[:3], 3])}
    for which, weights in zip("kv", compressions, strict=True):
        named[f"compress_{which}.pool"] = weights.pool, [H, selection.kernel_size, D]
        named[f"compress_{which}.mlp_in"] = weights.mlp_in, [H, D, D]
        named[f"compress_{which}.mlp_out"] = weights.mlp_out, [H, D, D]
    for name, (x, shape) in named.items():
        if list(x.shape) != shape:
            raise ValueError(f"{name}.shape={list(x.shape)} must be {shape}; reshape {name}")
