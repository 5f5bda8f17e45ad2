"""The grid of whole chunks on which the top-k baselines stand, and what is selected on it.

Batch rows and packed documents are concatenated on the grid, each padded to whole chunks, so that a row of the grid tells
chunk and place, and a document is an interval of chunks.

Letters: S rows of the grid, T rows of one query block, H key/value heads, G query heads per key/value head, c chunks,
J pooled keys, K slots of a selection, C tokens per chunk, D head dim.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dash_megatron.ops.tensor_cache import cached
from dash_megatron.topk_selection import Selection

# Scores alive at once, in elements: fewer skip more of the causal triangle, more keep a GPU busy.
MAX_BLOCK_SCORES = {"cpu": 2**22, "cuda": 2**27}


class ChunkBlock(NamedTuple):
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
        """Chunks of all documents, c."""
        return len(self.firsts)

    @property
    def num_rows(self) -> int:
        """Rows of the grid, S."""
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

    def blocks(self, scores_per_row: int, most_rows: int | None = None) -> Iterator[ChunkBlock]:
        """Cut the chunks into query blocks with at most as many scores as may be alive, at least a chunk each.

        A document that would reach beyond the end of a block begins the next block instead, unless less than half of this
        one would be left: its rows see no chunk of earlier documents, but a block has scores for them all the same.
        """
        rows = MAX_BLOCK_SCORES["cuda" if self.first_c.is_cuda else "cpu"] // max(1, scores_per_row)
        size = max(1, min(rows, most_rows or rows) // self.chunk_size)
        start = 0
        while start < self.num_chunks:
            end = min(start + size, self.num_chunks)
            if end < self.num_chunks and start + (size + 1) // 2 <= self.firsts[end] < end:
                end = self.firsts[end]
            yield ChunkBlock(self.firsts[start], start, end)
            start = end


def make_grid(batch: int, num_tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: Any) -> Grid:
    """The grid of `batch` rows of `num_tokens` tokens, or of packed documents.

    Waits for the device if packed, once for all layers that get the same `cu_seqlens`.
    """
    key = ("grid", batch, num_tokens, chunk_size, str(device))
    return cached(cu_seqlens, key, lambda: _make_grid(batch, num_tokens, chunk_size, cu_seqlens, device))


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


def top_chunks(scores_HTc: Tensor, grid: Grid, block: ChunkBlock, selection: Selection) -> Tensor:
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
    # A pooled key that overlaps two chunks makes ties, which topk may break in any way. So an int64 key has the score's bits
    # above, whose order is that of the scores because none is negative, and below them a number that falls with the chunk's.
    later_c = block.end - 1 - chunk_c
    key = torch.add(later_c, scores_HTc.float().view(torch.int32), alpha=2**32).masked_fill_(~free_Tc, -1)
    key = key.topk(min(selection.top_k, len(chunk_c))).values
    best = (block.end - 1 - (key & 0xFFFFFFFF)).masked_fill_(key < 0, -1)
    H, T, _ = scores_HTc.shape
    best = F.pad(best, (0, selection.top_k - best.shape[-1]), value=-1).transpose(0, 1)
    return torch.cat([fixed[:, None].expand(T, H, -1), best], dim=-1)


def selected_mask(selected_THK: Tensor, block: ChunkBlock) -> Tensor:
    """Whether a row selected each of the chunks first <= c < end: bool [H, T, c]."""
    T, H, _ = selected_THK.shape
    num = block.end - block.first
    # slots without a chunk mark one that is cut off
    place = torch.where(selected_THK < 0, num, selected_THK - block.first)
    marked = torch.zeros(T, H, num + 1, dtype=torch.bool, device=selected_THK.device).scatter_(
        -1, place, True
    )
    return marked[..., :num].transpose(0, 1)
