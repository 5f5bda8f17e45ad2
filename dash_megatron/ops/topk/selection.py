"""Which chunks a token of a top-k baseline attends to, as numbers, and the rules between them; no torch is needed."""

from dataclasses import dataclass


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
