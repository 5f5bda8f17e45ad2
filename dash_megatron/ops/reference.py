"""DashAttention (arXiv 2605.18753) in plain torch: what every faster implementation must equal, and the CPU path.

Letters: B batch, N tokens, T tokens of one query block, H key/value heads, G query heads per key/value head, c chunks,
W slots per chunk, D head dim. Chunks are numbered through the whole packed sequence, and keys are laid out on the grid
of chunks x slots: a document's last chunk may leave slots empty.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dash_megatron.ops.entmax import entmax
from dash_megatron.ops.types import Router

# Most tokens in a query block: enough rows for the matrix products, few enough to skip most of the causal triangle.
MAX_BLOCK_TOKENS = 128
MIN_BLOCK_TOKENS = 16
# Scores alive at once, in elements: blocks shrink to stay below.
MAX_BLOCK_SCORES = 2**24
# Scores kept for the backward, in elements of all blocks together: above, every block is recomputed in the backward.
MAX_KEPT_SCORES = 2**25
LOG2_E = math.log2(math.e)


def wide(*tensors: Tensor) -> list[Tensor]:
    """In float64 if float64, otherwise in float32."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


@dataclass(frozen=True)
class _Grid:
    """Which chunk and slot every token occupies."""

    chunk_N: Tensor
    """Global number of the token's chunk."""
    slot_N: Tensor
    """The token's place inside its chunk."""
    first_chunk_N: Tensor
    """Global number of the first chunk of the token's document."""
    num_chunks: int
    num_slots: int
    """Slots per chunk: the chunk size, or less where no document fills a chunk."""
    packed: bool


class _Block(NamedTuple):
    """Where the T consecutive tokens of a query block stand; chunks are global numbers."""

    chunk_T: Tensor
    slot_T: Tensor
    first_chunk_T: Tensor
    first_chunk: int
    """First chunk of the first token's document: the keys given start here."""
    own_chunk: int
    """The first token's own chunk: causal masking inside a chunk starts here."""


def document_positions(num_tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position [N] (int64) of every token inside its own document; never waits for the device."""
    index_N = torch.arange(num_tokens, device=device)
    if cu_seqlens is None:
        return index_N
    ends = cu_seqlens[1:].to(device=device, dtype=torch.int64)
    starts = cu_seqlens[:-1].to(device=device, dtype=torch.int64)
    return index_N - starts[torch.searchsorted(ends, index_N, right=True)]


def _make_grid(num_tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: torch.device) -> _Grid:
    position_N = document_positions(num_tokens, cu_seqlens, device)
    if cu_seqlens is None:
        chunk_N = position_N // chunk_size
        first_chunk_N = torch.zeros_like(chunk_N)
        num_chunks, longest = math.ceil(num_tokens / chunk_size), num_tokens
    else:
        # a chunk opens wherever the position inside the document is a multiple of the chunk size
        chunk_N = (position_N % chunk_size == 0).cumsum(0) - 1
        first_chunk_N = chunk_N - position_N // chunk_size
        num_chunks, longest = (torch.stack([chunk_N[-1], position_N.max()]) + 1).tolist()
    return _Grid(
        chunk_N=chunk_N,
        slot_N=position_N % chunk_size,
        first_chunk_N=first_chunk_N,
        num_chunks=num_chunks,
        num_slots=min(chunk_size, longest),
        packed=cu_seqlens is not None,
    )


def _filled_slots(grid: _Grid) -> Tensor:
    """Bool [c, W]: the slots that hold a token."""
    filled = torch.zeros(grid.num_chunks * grid.num_slots, dtype=torch.bool, device=grid.chunk_N.device)
    filled[grid.chunk_N * grid.num_slots + grid.slot_N] = True
    return filled.view(grid.num_chunks, grid.num_slots)


def _to_grid(x_BNHD: Tensor, grid: _Grid) -> Tensor:
    """Lay tokens out on the grid: [B, H, c * W, D]. What empty slots hold is finite and must be masked by the reader."""
    B, N, H, D = x_BNHD.shape
    slots = grid.num_chunks * grid.num_slots
    if grid.packed:
        token_of_slot = torch.zeros(slots, dtype=torch.int64, device=x_BNHD.device)
        token_of_slot[grid.chunk_N * grid.num_slots + grid.slot_N] = torch.arange(N, device=x_BNHD.device)
        # an embedding is a row gather whose backward is quick on CPU too; documents are only packed with B == 1
        x_BNHD = F.embedding(token_of_slot, x_BNHD.reshape(N, H * D)).view(B, slots, H, D)
    elif slots > N:
        x_BNHD = F.pad(x_BNHD, (0, 0, 0, 0, 0, slots - N))
    return x_BNHD.transpose(1, 2).contiguous()


def _summarize(k_BHSD: Tensor, summary_query_HD: Tensor, grid: _Grid) -> Tensor:
    """Local chunk summaries [B, H, c, D]: keys averaged with softmax weights over the tokens of each chunk."""
    B, H, _, D = k_BHSD.shape
    k_BHcWD = k_BHSD.view(B, H, grid.num_chunks, grid.num_slots, D)
    score_BHcW = torch.einsum("bhcwd,hd->bhcw", k_BHcWD, summary_query_HD * D**-0.5)
    weight_BHcW = score_BHcW.masked_fill(~_filled_slots(grid), -math.inf).softmax(-1)
    return (weight_BHcW.unsqueeze(-2) @ k_BHcWD).squeeze(-2)


def _mean_log_p(log_p_BHTc: Tensor, num_past_BHT: Tensor) -> Tensor:
    """Mean [B, H, T, 1] over the selected past chunks of a log probability that is zero for all others."""
    # no gradient through the mean: it is unbounded where a chunk is about to leave the support
    return log_p_BHTc.detach().sum(-1, keepdim=True) / num_past_BHT.clamp_min(1).unsqueeze(-1)


def _log_prior(p_BHTc: Tensor, own_Tc: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Bias [B, H, T, c] on the scores of every chunk (-inf: not selected) and the number [B, H, T] selected."""
    selected_BHTc = p_BHTc > 0
    # mask before the logarithm: the gradient of log(0) would turn the masked zeros into NaN
    log_p_BHTc = torch.where(selected_BHTc, p_BHTc, 1).log()
    num_past_BHT = selected_BHTc.sum(-1)
    if router.estimate_diagonal:
        log_p_BHTc = (log_p_BHTc - _mean_log_p(log_p_BHTc, num_past_BHT)) / router.sigma
    bias_BHTc = log_p_BHTc.masked_fill(~selected_BHTc, -math.inf).masked_fill(own_Tc, 0)
    return bias_BHTc, (num_past_BHT + 1).int()


def _attend_block(
    q_BHGTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, summary_BHcD: Tensor, block: _Block, router: Router
) -> tuple[Tensor, Tensor]:
    """Route and attend the tokens of one block, given the keys, values and summaries of the chunks it may need.

    `q_BHGTD` comes divided by sqrt(D). Returns the output [B, H, G, T, D] and the chunks selected [B, H, T].
    """
    B, H, G, T, D = q_BHGTD.shape
    num_chunks = summary_BHcD.shape[2]
    num_slots = k_BHSD.shape[2] // num_chunks
    chunk_c = torch.arange(block.first_chunk, block.first_chunk + num_chunks, device=q_BHGTD.device)
    past_Tc = (chunk_c >= block.first_chunk_T[:, None]) & (chunk_c < block.chunk_T[:, None])
    own_Tc = chunk_c == block.chunk_T[:, None]

    # the G heads of a group stand as rows of one matrix, so K and V are never repeated
    rows_BHRD = q_BHGTD.reshape(B, H, G * T, D)
    factor = router.score_factors(block.chunk_T - block.first_chunk_T, H, q_BHGTD.dtype)
    if isinstance(factor, Tensor):
        factor = factor.repeat(1, G)[..., None]
    z_BHGTc = (factor * (rows_BHRD @ summary_BHcD.mT)).view(B, H, G, T, num_chunks)
    p_BHGTc = entmax(z_BHGTc.masked_fill(~past_Tc, -math.inf), router.alpha)
    bias_BHTc, num_selected_BHT = _log_prior(p_BHGTc.mean(2), own_Tc, router)

    scores = (rows_BHRD @ k_BHSD.mT).view(B, H, G, T, num_chunks, num_slots)
    scores = scores + bias_BHTc[:, :, None, :, :, None]
    # Past chunks of a document are full, so the causal mask inside the token's own chunk covers the empty slots too.
    # Its gradient is zero by itself (the weight is zero), so autograd need not see it.
    with torch.no_grad():
        own_from = block.own_chunk - block.first_chunk
        late_TW = torch.arange(num_slots, device=q_BHGTD.device) > block.slot_T[:, None]
        hidden = own_Tc[:, own_from:, None] & late_TW[:, None, :]
        scores[..., own_from:, :].masked_fill_(hidden, -math.inf)
    weights = scores.view(B, H, G * T, num_chunks * num_slots).softmax(-1)
    return (weights @ v_BHSD).view(B, H, G, T, D), num_selected_BHT


def _query_blocks(grid: _Grid, num_tokens: int, rows_per_token: int) -> tuple[list[list[int]], int]:
    """Cut the tokens into blocks.

    Returns, of every block, [first token, one past the last, first chunk needed, the first token's own chunk, one past
    the last chunk needed], and the number of scores of all blocks together.
    """
    size = MAX_BLOCK_TOKENS
    while True:
        start = torch.arange(0, num_tokens, size, device=grid.chunk_N.device)
        end = (start + size).clamp_max(num_tokens)
        first_chunk, end_chunk = grid.first_chunk_N[start], grid.chunk_N[end - 1] + 1
        scores = (end - start) * (end_chunk - first_chunk) * grid.num_slots * rows_per_token
        most, total = torch.stack([scores.max(), scores.sum()]).tolist()
        if most <= MAX_BLOCK_SCORES or size <= MIN_BLOCK_TOKENS:
            blocks = torch.stack([start, end, first_chunk, grid.chunk_N[start], end_chunk], dim=1)
            return blocks.tolist(), total
        size //= 2


def _attend(
    q: Tensor, k: Tensor, v: Tensor, summary_query: Tensor, grid: _Grid, router: Router
) -> tuple[Tensor, Tensor]:
    """The whole sequence, block by block, in the dtype of the inputs; returns as `dash_attention_reference`."""
    B, N, Hq, D = q.shape
    Hkv = k.shape[2]
    q_BHGND = q.mul(D**-0.5).view(B, N, Hkv, Hq // Hkv, D).permute(0, 2, 3, 1, 4)
    k_BHSD, v_BHSD = _to_grid(k, grid), _to_grid(v, grid)
    summary_BHcD = _summarize(k_BHSD, summary_query, grid)

    blocks, num_scores = _query_blocks(grid, N, rows_per_token=B * Hq)
    recompute = torch.is_grad_enabled() and len(blocks) > 1 and num_scores > MAX_KEPT_SCORES
    outputs, counts = [], []
    for start, end, first_chunk, own_chunk, end_chunk in blocks:
        tokens, chunks = slice(start, end), slice(first_chunk, end_chunk)
        slots = slice(first_chunk * grid.num_slots, end_chunk * grid.num_slots)
        places = grid.chunk_N[tokens], grid.slot_N[tokens], grid.first_chunk_N[tokens]
        args = (
            q_BHGND[:, :, :, tokens],
            k_BHSD[:, :, slots],
            v_BHSD[:, :, slots],
            summary_BHcD[:, :, chunks],
            _Block(*places, first_chunk, own_chunk),
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
) -> tuple[Tensor, Tensor]:
    """Attend to the chunks an entmax router selects, with its log probabilities as a prior (arXiv 2605.18753).

    Differentiable in all tensors. Works block by block over queries; where the scores of all blocks would be too
    many to keep, each block is recomputed in the backward. Arguments are those of `dash_attention`, which checks them.

    Args:
        q: queries after RoPE [B, N, Hq, D]; computed in float64 if float64, otherwise in float32.
        k, v: keys after RoPE, and values [B, N, Hkv, D].
        summary_query: [Hkv, D].
        router: its constants.
        cu_seqlens: [documents + 1] (then B == 1), or None for one document per batch row.

    Returns:
        Output [B, N, Hq, D] in q's dtype, and the number of chunks selected, the own one included, int32 [B, N, Hkv].
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grid = _make_grid(q.shape[1], router.chunk_size, cu_seqlens, q.device)
    # autocast would run the matrix products in half precision behind our back
    with torch.autocast(q.device.type, enabled=False):
        out, chunks_selected = _attend(
            q.to(dtype), k.to(dtype), v.to(dtype), summary_query.to(dtype), grid, router
        )
    return out.to(q.dtype), chunks_selected
