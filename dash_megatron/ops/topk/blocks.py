"""What the top-k baselines share: scores of chunks from pooled keys, a fixed choice of chunks, attention to them.

Everything stands on a grid of whole chunks: batch rows and packed documents one after another, each padded to whole
chunks, so that a row of the grid tells chunk and place, and a document is an interval of chunks. Letters: S rows of the
grid, T rows of one query block, H key/value heads, G query heads per key/value head, c chunks, J pooled keys, K slots of
a selection, C tokens per chunk, D head dim.

The reference is plain torch. On a GPU kernels score the chunks and attend to them (`kernels/pooled.py` and
`kernels/chosen.py`); which are the best is told by the same code everywhere.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dash_megatron.ops.attention import (
    CHUNK_SIZES,
    DTYPES,
    TRITON_CHUNK_SIZES,
    _check_cu_seqlens,
    _check_heads,
    _resolve_backend,
)
from dash_megatron.ops.derived import derived
from dash_megatron.ops.reference import wide

# Scores alive at once, in elements: fewer skip more of the causal triangle, more keep a GPU busy.
MAX_BLOCK_SCORES = {"cpu": 2**22, "cuda": 2**27}
# Scores kept for the backward, in elements of all blocks together: above, every block is recomputed in the backward.
MAX_KEPT_SCORES = 2**25
# Finite, so that a row that sees nothing has no NaN in its gradient.
HIDDEN = -1e30


@dataclass(frozen=True)
class Selection:
    """Which chunks a token attends to; the names are those of the config, whose docstrings say what they mean."""

    kernel_size: int = 32
    kernel_stride: int = 16
    top_k: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2

    def check(self, chunk_size: int) -> None:
        """Refuse what makes no sense with a chunk size.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        bounds = {"kernel_size": 1, "kernel_stride": 1, "top_k": 0, "initial_blocks": 0, "local_blocks": 1}
        for name, least in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an int of at least {least}; try {max(least, 1)}")
        if chunk_size % self.kernel_stride:
            raise ValueError(
                f"kernel_stride={self.kernel_stride} must divide chunk_size={chunk_size}, so that pooled keys start alike "
                f"in every chunk; try {max(1, chunk_size // 4)}"
            )
        if self.kernel_size % self.kernel_stride or self.kernel_size > chunk_size:
            raise ValueError(
                f"kernel_size={self.kernel_size} must be a multiple of kernel_stride={self.kernel_stride} and at most "
                f"chunk_size={chunk_size}; try {min(chunk_size, 2 * self.kernel_stride)}"
            )

    @property
    def slots(self) -> int:
        """Past chunks a token selects at most."""
        return self.initial_blocks + self.local_blocks - 1 + self.top_k


class Block(NamedTuple):
    """Chunks start <= c < end, whose rows are queries, and the first chunk that any of them may see."""

    first: int
    start: int
    end: int


@dataclass(frozen=True)
class Grid:
    """Where tokens lie on the grid."""

    chunk_size: int
    row_N: Tensor | None
    """int64: the row of every token; None: the rows are the tokens."""
    first_c: Tensor
    """int64: the first chunk of each chunk's document."""
    firsts: tuple[int, ...]
    """The same on the host."""
    _shared: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_chunks(self) -> int:
        return len(self.firsts)

    @property
    def num_rows(self) -> int:
        return self.num_chunks * self.chunk_size

    def spread(self, x: Tensor) -> Tensor:
        """[N, ...] as [S, ...]; rows without a token are zero."""
        if self.row_N is None:
            return x
        return x.new_zeros(self.num_rows, *x.shape[1:]).index_copy(0, self.row_N, x)

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave for this key before: for what layers with the same documents need alike."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def gather(self, x: Tensor) -> Tensor:
        """[S, ...] as [N, ...]."""
        return x if self.row_N is None else x.index_select(0, self.row_N)

    def blocks(self, scores_per_row: int, most_rows: int | None = None) -> Iterator[Block]:
        """Cut the chunks into query blocks with at most as many scores as may be alive, at least a chunk each.

        A document that would go on behind a block begins the next one instead, unless that leaves less than half of the
        block: what comes before a document is nothing to its rows, and yet in the way.
        """
        rows = MAX_BLOCK_SCORES["cuda" if self.first_c.is_cuda else "cpu"] // max(1, scores_per_row)
        size = max(1, min(rows, most_rows or rows) // self.chunk_size)
        start = 0
        while start < self.num_chunks:
            end = min(start + size, self.num_chunks)
            if end < self.num_chunks and start + (size + 1) // 2 <= self.firsts[end] < end:
                end = self.firsts[end]
            yield Block(self.firsts[start], start, end)
            start = end


def make_grid(batch: int, num_tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: Any) -> Grid:
    """The grid of `batch` rows of `num_tokens` tokens, or of packed documents.

    Waits for the device if packed, once for all layers that get the same `cu_seqlens`.
    """
    key = ("grid", batch, num_tokens, chunk_size, str(device))
    return derived(cu_seqlens, key, lambda: _make_grid(batch, num_tokens, chunk_size, cu_seqlens, device))


def _make_grid(batch: int, num_tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: Any) -> Grid:
    bounds = [row * num_tokens for row in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    firsts: list[int] = []
    rows: list[Tensor] = []
    for begin, end in itertools.pairwise(bounds):
        first = len(firsts)
        rows.append(torch.arange(end - begin) + first * chunk_size)
        firsts += [first] * -(-(end - begin) // chunk_size)
    row_N = torch.cat(rows)
    whole = len(row_N) == len(firsts) * chunk_size
    return Grid(
        chunk_size, None if whole else row_N.to(device), torch.tensor(firsts, device=device), tuple(firsts)
    )


def visible_kernels(grid: Grid, block: Block, selection: Selection) -> Tensor:
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
    scores = torch.einsum("thgd,jhd->hgtj", q_THGD, pooled_JHD).masked_fill(~visible_TJ, HIDDEN)
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


def choose(scores_HTc: Tensor, grid: Grid, block: Block, selection: Selection) -> Tensor:
    """Past chunks that every row selects: int64 [T, H, K] of global numbers, -1 in slots without one.

    The first chunks of the document and those just before the own one always, and of the rest the best, best first.
    Scores of the rest must not be negative; they are compared in float32, and of equal ones the earlier chunk wins.
    """
    C, device = grid.chunk_size, scores_HTc.device
    own_T = torch.arange(block.start, block.end, device=device).repeat_interleave(C)
    first_T = grid.first_c[own_T]
    local_T = torch.maximum(own_T - selection.local_blocks + 1, first_T)
    initial = first_T[:, None] + torch.arange(selection.initial_blocks, device=device)
    initial = initial.masked_fill(initial >= local_T[:, None], -1)
    local = own_T[:, None] - 1 - torch.arange(selection.local_blocks - 1, device=device)
    local = local.masked_fill(local < local_T[:, None], -1)
    fixed = torch.cat([initial, local], dim=1)

    chunk_c = torch.arange(block.first, block.end, device=device)
    free_Tc = (chunk_c >= first_T[:, None] + selection.initial_blocks) & (chunk_c < local_T[:, None])
    # A pooled key that overlaps two chunks makes ties, which topk would break as it likes: so the chunk's number, turned
    # round, stands below the score's bits, whose order is that of the numbers because none is negative.
    later_c = block.end - 1 - chunk_c
    key = torch.add(later_c, scores_HTc.float().view(torch.int32), alpha=2**32).masked_fill_(~free_Tc, -1)
    key = key.topk(min(selection.top_k, len(chunk_c))).values
    best = (block.end - 1 - (key & 0xFFFFFFFF)).masked_fill_(key < 0, -1)
    H, T, _ = scores_HTc.shape
    best = F.pad(best, (0, selection.top_k - best.shape[-1]), value=-1).transpose(0, 1)
    return torch.cat([fixed[:, None].expand(T, H, -1), best], dim=-1)


@torch.no_grad()
def choose_chunks_reference(
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
    q, pooled = wide(q, pooled)
    chosen = []
    for block in grid.blocks(q.shape[1] * len(pooled)):
        q_TD = q[block.start * C : block.end * C] * q.shape[-1] ** -0.5
        pooled_JHD = pooled[block.first * per_chunk : block.end * per_chunk]
        visible = visible_kernels(grid, block, selection)
        p_HTJ = kernel_weights(q_TD.unflatten(1, (pooled.shape[1], -1)), pooled_JHD, visible).sum(1)
        chosen.append(choose(chunk_scores(p_HTJ, grid, selection, reduce), grid, block, selection))
    return torch.cat(chosen)


def allowed_chunks(chosen_THK: Tensor, block: Block) -> Tensor:
    """Bool [H, T, c] of the chunks first <= c < end: chosen."""
    T, H, _ = chosen_THK.shape
    num = block.end - block.first
    # slots without a chunk mark one that is cut off
    place = torch.where(chosen_THK < 0, num, chosen_THK - block.first)
    marked = torch.zeros(T, H, num + 1, dtype=torch.bool, device=chosen_THK.device).scatter_(-1, place, True)
    return marked[..., :num].transpose(0, 1)


def _attend_block(
    q_THGD: Tensor, k_UHD: Tensor, v_UHD: Tensor, chosen_THK: Tensor, grid: Grid, block: Block
) -> Tensor:
    """[T, H, G, D]; k and v are the U rows of the chunks first <= c < end."""
    C, device = grid.chunk_size, q_THGD.device
    row_T = torch.arange(block.start * C, block.end * C, device=device)
    row_U = torch.arange(block.first * C, block.end * C, device=device)
    own_TU = (row_U // C == row_T[:, None] // C) & (row_U <= row_T[:, None])
    seen_HTU = allowed_chunks(chosen_THK, block).repeat_interleave(C, dim=-1) | own_TU
    scores = torch.einsum("thgd,uhd->hgtu", q_THGD, k_UHD).masked_fill(~seen_HTU[:, None], -torch.inf)
    return torch.einsum("hgtu,uhd->thgd", scores.softmax(-1), v_UHD)


def attend_chosen_reference(q: Tensor, k: Tensor, v: Tensor, chosen_SHK: Tensor, grid: Grid) -> Tensor:
    """Softmax attention of every row to the chunks chosen and, causally, to its own: [S, Hq, D] of q's shape.

    Differentiable; works block by block over queries, and recomputes blocks in the backward where their scores would
    be too many to keep.

    Args:
        q: [S, Hq, D] on the grid.
        k, v: [S, Hkv, D].
        chosen_SHK: past chunks of each row and head, -1 for none.
        grid: where the rows are.
    """
    C, dtype = grid.chunk_size, q.dtype
    q, k, v = wide(q, k, v)
    q_SHGD = q.mul(q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))
    outputs = []
    for block in grid.blocks(q.shape[1] * grid.num_rows):
        rows, seen = slice(block.start * C, block.end * C), slice(block.first * C, block.end * C)
        outputs.append(
            in_pieces(
                _attend_block, q.shape[1] * grid.num_rows**2, q_SHGD[rows], k[seen], v[seen], chosen_SHK[rows], grid, block
            )
        )  # fmt: skip
    return torch.cat(outputs).flatten(1, 2).to(dtype)


def in_pieces(function: Callable[..., Any], all_scores: int, *args: Any) -> Any:
    """Call a block's function, so that the backward runs it again if the scores of all blocks are too many to keep."""
    if torch.is_grad_enabled() and all_scores > MAX_KEPT_SCORES:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


class Backend(NamedTuple):
    """What a baseline's attention is made of; kernels take the same arguments as the reference."""

    attend: Callable[..., Tensor]
    """`attend_chosen_reference` or the kernels."""
    choose: Callable[..., Tensor]
    """`choose_chunks_reference` or the kernels."""
    dtype: torch.dtype
    """Of operands of matrix products."""


def find_backend(backend: str, q: Tensor, chunk_size: int) -> Backend:
    """The backend of this name, or the one that suits the tensors if it is "auto".

    Raises:
        ValueError: the backend cannot run here.
    """
    if _resolve_backend(backend, q)[0] == "reference":
        return Backend(attend_chosen_reference, choose_chunks_reference, wide(q.new_empty(0))[0].dtype)
    if chunk_size not in TRITON_CHUNK_SIZES:
        raise ValueError(
            f"chunk_size={chunk_size} must be one of {list(TRITON_CHUNK_SIZES)} for the Triton backend; "
            "try 64, or pass backend='reference'"
        )
    from dash_megatron.ops.kernels.chosen import attend_chosen_triton
    from dash_megatron.ops.kernels.pooled import choose_chunks_triton

    return Backend(attend_chosen_triton, choose_chunks_triton, q.dtype)


def count_selected(chosen_SHK: Tensor) -> Tensor:
    """int32 [S, H]: chunks attended to, the own one included."""
    return ((chosen_SHK >= 0).sum(-1) + 1).int()


def check_tensors(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> None:
    """Refuse what no baseline takes.

    Raises:
        ValueError: naming the argument, its value, the rule and the remedy.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not isinstance(x, Tensor) or x.ndim != 4 or x.numel() == 0:
            seen = f"{name}.shape={list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x!r}"
            raise ValueError(f"{seen} must be a tensor [B, N, heads, D] that is not empty; reshape {name}")
        if x.dtype not in DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} and must be of one type with q, {q.dtype} on {q.device}, one of "
                f"{[str(d) for d in DTYPES]}; cast or move {name}"
            )
    _check_heads(q, k, v)
    if isinstance(chunk_size, bool) or chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size={chunk_size!r} must be a power of two from 1 to 128, as an int; try 64")
    _check_cu_seqlens(cu_seqlens, q)
