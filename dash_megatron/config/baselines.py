"""Sections of the top-k baselines, `attention.infllmv2` and `attention.nsa`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dash_megatron.config.section import Section


class InfLLMv2Config(Section):
    """InfLLM v2 (arXiv 2506.07900, 2509.24663), for `attention.kind: infllmv2`. The chunks that it chooses have
    `attention.chunk_size` tokens, and a token attends to at most `initial_blocks + local_blocks + top_k` of them."""

    kernel_size: int = Field(default=32, gt=0)
    """Tokens whose keys are averaged into one pooled key; a multiple of `kernel_stride`, at most
    `attention.chunk_size`."""
    kernel_stride: int = Field(default=16, gt=0)
    """Tokens between the beginnings of pooled keys; divides `attention.chunk_size`."""
    top_k: int = Field(default=16, ge=0)
    """Chunks chosen by their scores, besides those that are always on."""
    initial_blocks: int = Field(default=1, ge=0)
    """First chunks of the document that are always on."""
    local_blocks: int = Field(default=8, gt=0)
    """Last chunks that are always on, the token's own included."""

    def selection(self) -> dict[str, Any]:
        """The arguments of `dash_megatron.ops.topk.selection.Selection`."""
        names = ("kernel_size", "kernel_stride", "top_k", "initial_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}


class NSAConfig(InfLLMv2Config):
    """Native Sparse Attention (arXiv 2502.11089), for `attention.kind: nsa`: compressed keys, chosen chunks of
    `attention.chunk_size` tokens, and a sliding window, each with a gate."""

    local_blocks: int = Field(default=2, gt=0)
    """Last chunks that are always on, the token's own included."""
    window: int = Field(default=512, ge=0)
    """Past tokens of the sliding window, besides the token's own chunk; a multiple of `attention.chunk_size`."""


def check_baseline(kind: str, section: InfLLMv2Config, chunk_size: int) -> None:
    """Refuse what the baseline cannot compute.

    Raises:
        ValueError: naming field, value, rule and remedy.
    """
    name, size, stride = f"attention.{kind}", section.kernel_size, section.kernel_stride
    if chunk_size % stride:
        raise ValueError(
            f"{name}.kernel_stride={stride} must divide attention.chunk_size={chunk_size}, so that pooled keys begin "
            f"alike in every chunk; try {max(1, chunk_size // 4)}"
        )
    if size % stride or size > chunk_size:
        raise ValueError(
            f"{name}.kernel_size={size} must be a multiple of {name}.kernel_stride={stride} and at most "
            f"attention.chunk_size={chunk_size}; try {min(chunk_size, 2 * stride)}"
        )
    window = getattr(section, "window", 0)
    if window % chunk_size:
        raise ValueError(
            f"{name}.window={window} must be a multiple of attention.chunk_size={chunk_size}; "
            f"try {max(1, round(window / chunk_size)) * chunk_size}"
        )
