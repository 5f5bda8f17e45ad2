"""The rules of `data.seq_length_curriculum`."""

from __future__ import annotations

import bisect


def context_length_at(curriculum: dict[int, int] | None, seq_length: int, step: int) -> int:
    """Most tokens of context of the step after `step` finished ones."""
    if curriculum is None:
        return seq_length
    begins = sorted(curriculum)
    return curriculum[begins[bisect.bisect_right(begins, step) - 1]]


def check_curriculum(curriculum: dict[int, int], seq_length: int, steps: int, chunk_size: int) -> None:
    """Refuse lengths that do not fit rows, chunks or the run.

    Args:
        curriculum: length by the step that it begins at.
        seq_length: tokens of a row.
        steps: of the run.
        chunk_size: that a length is to be a multiple of; 1 where no layer has chunks.

    Raises:
        ValueError: naming field, value, rule and remedy.
    """
    name = f"data.seq_length_curriculum={curriculum}"
    example = f"such as {{0: {max(chunk_size, seq_length // 4)}, {max(1, steps // 10)}: {seq_length}}}"
    if not curriculum or min(curriculum) != 0:
        raise ValueError(f"{name} must say which length the run begins with, at step 0, {example}")
    for length in curriculum.values():
        if length < 2 or seq_length % length:
            raise ValueError(
                f"{name}: {length} must divide data.seq_length={seq_length}, so that rows are cut into equal pieces, "
                f"{example}"
            )
        if length % chunk_size:
            raise ValueError(
                f"{name}: {length} must be a multiple of attention.chunk_size={chunk_size}, so that no cut shortens a "
                f"chunk, {example}"
            )
    last = max(curriculum)
    if curriculum[last] != seq_length:
        raise ValueError(
            f"{name} must end with data.seq_length={seq_length}: rows and memory are of that length from the first step "
            f"on, and the model is evaluated with it; set data.seq_length={curriculum[last]}, or {example}"
        )
    if last >= steps:
        raise ValueError(
            f"{name} reaches data.seq_length at step {last}, but training.steps={steps}: the run would never see it; "
            "switch earlier or train longer"
        )
