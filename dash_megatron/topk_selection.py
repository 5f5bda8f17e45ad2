"""Which chunks the top-k baselines select, and the rules of its numbers: the same for the config and for `ops/topk`.

This module imports nothing, so that a config is read without torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """The numbers of a top-k selection; the config's `attention.infllmv2` and `attention.nsa` have the same names."""

    kernel_size: int = 32
    """Tokens whose keys are averaged into one pooled key."""
    kernel_stride: int = 16
    """Tokens between the beginnings of two pooled keys."""
    top_k: int = 16
    """Chunks selected by their scores, besides those that are always on."""
    initial_blocks: int = 1
    """First chunks of the document that are always on."""
    local_blocks: int = 2
    """Last chunks that are always on, the token's own included."""

    @property
    def slots(self) -> int:
        """Past chunks that a token selects at most."""
        return self.initial_blocks + self.local_blocks - 1 + self.top_k

    def check(self, chunk_size: int, section: str = "") -> None:
        """Refuse numbers that do not fit the chunks.

        Args:
            chunk_size: tokens of a chunk.
            section: what messages write before the names, such as "attention.nsa."; "" for arguments of a function.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        bounds = {"kernel_size": 1, "kernel_stride": 1, "top_k": 0, "initial_blocks": 0, "local_blocks": 1}
        for name, least in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{section}{name}={value!r} must be an int of at least {least}; try {max(least, 1)}"
                )
        size, stride, chunk = self.kernel_size, self.kernel_stride, _chunk(chunk_size, section)
        if chunk_size % stride:
            raise ValueError(
                f"{section}kernel_stride={stride} must divide {chunk}, so that pooled keys begin alike in every chunk; "
                f"try {max(1, chunk_size // 4)}"
            )
        if size % stride or size > chunk_size:
            raise ValueError(
                f"{section}kernel_size={size} must be a multiple of {section}kernel_stride={stride} and at most {chunk}; "
                f"try {min(chunk_size, 2 * stride)}"
            )


def check_window(window: int, chunk_size: int, section: str = "") -> None:
    """Refuse a sliding window that is not made of whole chunks; arguments and errors are those of `Selection.check`."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 0 or window % chunk_size:
        chunks = max(1, round(window / chunk_size)) if isinstance(window, int) else 1
        raise ValueError(
            f"{section}window={window!r} must be a multiple of {_chunk(chunk_size, section)}; try {chunks * chunk_size}"
        )


def _chunk(chunk_size: int, section: str) -> str:
    return f"{'attention.' if section else ''}chunk_size={chunk_size}"
