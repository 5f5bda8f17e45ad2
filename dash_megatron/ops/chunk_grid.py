"""Which chunk and slot every token of a packed sequence occupies: chunks begin anew with every document.

Chunks are numbered through the whole sequence, and a document's last chunk may leave slots empty. Letters: B batch, N tokens,
H heads, c chunks, C slots per chunk, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dash_megatron.ops.tensor_cache import cached
from dash_megatron.ops.types import Routing


def document_positions(num_tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position [N] (int64) of every token inside its own document; never waits for the device."""
    index_N = torch.arange(num_tokens, device=device)
    if cu_seqlens is None:
        return index_N
    ends = cu_seqlens[1:].to(device=device, dtype=torch.int64)
    starts = cu_seqlens[:-1].to(device=device, dtype=torch.int64)
    return index_N - starts[torch.searchsorted(ends, index_N, right=True)]


def routing_of(chunks_selected: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Routing:
    """A `Routing` of the chunks selected, int32 [B, N, Hkv]; the other arguments are those of `dash_attention`."""
    num_tokens, device = chunks_selected.shape[1], chunks_selected.device
    available = cached(
        cu_seqlens,
        ("mean of available chunks", num_tokens, chunk_size, device),
        lambda: (document_positions(num_tokens, cu_seqlens, device) // chunk_size + 1).float().mean(),
    )
    return Routing(chunks_selected, available)


@dataclass(frozen=True)
class ChunkGrid:
    """Which chunk and slot every token occupies."""

    chunk_N: Tensor
    """int64: number of the token's chunk."""
    slot_N: Tensor
    """int64: the token's place inside its chunk."""
    first_chunk_N: Tensor
    """int64: number of the first chunk of the token's document."""
    num_chunks: int
    num_slots: int
    """Slots per chunk: the chunk size, or less where no document fills a chunk."""
    packed: bool
    """Whether there are several documents, so that slots may be empty in the middle."""

    @classmethod
    def of(
        cls, num_tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: torch.device
    ) -> ChunkGrid:
        """The grid of one document, or of packed documents; waits for the device if packed."""
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
        return cls(
            chunk_N=chunk_N,
            slot_N=position_N % chunk_size,
            first_chunk_N=first_chunk_N,
            num_chunks=num_chunks,
            num_slots=min(chunk_size, longest),
            packed=cu_seqlens is not None,
        )

    def filled(self) -> Tensor:
        """Bool [c, C]: the slots that hold a token."""
        filled = torch.zeros(self.num_chunks * self.num_slots, dtype=torch.bool, device=self.chunk_N.device)
        filled[self.chunk_N * self.num_slots + self.slot_N] = True
        return filled.view(self.num_chunks, self.num_slots)

    def spread(self, x_BNHD: Tensor) -> Tensor:
        """Lay tokens out slot by slot, [B, H, c * C, D]. Empty slots hold something finite, which readers must mask."""
        B, N, H, D = x_BNHD.shape
        slots = self.num_chunks * self.num_slots
        if self.packed:
            token_of_slot = torch.zeros(slots, dtype=torch.int64, device=x_BNHD.device)
            token_of_slot[self.chunk_N * self.num_slots + self.slot_N] = torch.arange(N, device=x_BNHD.device)
            # an embedding is a row gather whose backward is quick on CPU too; documents are only packed with B == 1
            x_BNHD = F.embedding(token_of_slot, x_BNHD.reshape(N, H * D)).view(B, slots, H, D)
        elif slots > N:
            x_BNHD = F.pad(x_BNHD, (0, 0, 0, 0, 0, slots - N))
        return x_BNHD.transpose(1, 2).contiguous()

    def by_chunk(self, x_BHSD: Tensor) -> Tensor:
        """Slots of whole chunks [B, H, chunks * C, D] as [B, H, chunks, C, D]."""
        return x_BHSD.unflatten(2, (-1, self.num_slots))
