"""Sections of the top-k baselines, `attention.infllmv2` and `attention.nsa`."""

from __future__ import annotations

from pydantic import Field

from dash_megatron.config.section import Section
from dash_megatron.topk_selection import Selection, check_window


class InfLLMv2Config(Section):
    """InfLLM v2 (arXiv 2506.07900, 2509.24663), for `attention.kind: infllmv2`. It selects chunks of `attention.chunk_size`
    tokens; a token attends to at most `initial_blocks + local_blocks + top_k` of them. With `top_k: 0` that is
    a sliding window with sinks, in whole chunks."""

    kernel_size: int = Field(default=32, gt=0)
    """Tokens whose keys are averaged into one pooled key; a multiple of `kernel_stride`, at most
    `attention.chunk_size`."""
    kernel_stride: int = Field(default=16, gt=0)
    """Tokens between the beginnings of two pooled keys; divides `attention.chunk_size`."""
    top_k: int = Field(default=16, ge=0)
    """Chunks selected by their scores, besides those that are always on."""
    initial_blocks: int = Field(default=1, ge=0)
    """First chunks of the document that are always on."""
    local_blocks: int = Field(default=8, gt=0)
    """Last chunks that are always on, the token's own included."""

    def selection(self) -> Selection:
        """The same numbers as an argument of `ops`."""
        return Selection(
            self.kernel_size, self.kernel_stride, self.top_k, self.initial_blocks, self.local_blocks
        )

    def check_chunks(self, chunk_size: int, section: str) -> None:
        """Refuse what does not fit chunks of `chunk_size` tokens; `section` is what messages write before a field.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        self.selection().check(chunk_size, section)


class NSAConfig(InfLLMv2Config):
    """Native Sparse Attention (arXiv 2502.11089), for `attention.kind: nsa`: compressed keys, selected chunks of
    `attention.chunk_size` tokens and a sliding window, each with a gate."""

    local_blocks: int = Field(default=2, gt=0)
    """Last chunks that are always on, the token's own included."""
    window: int = Field(default=512, ge=0)
    """Past tokens of the sliding window, besides the token's own chunk; a multiple of `attention.chunk_size`."""

    def check_chunks(self, chunk_size: int, section: str) -> None:
        """Refuse what does not fit chunks, the window included; see `InfLLMv2Config.check_chunks`."""
        super().check_chunks(chunk_size, section)
        check_window(self.window, chunk_size, section)
