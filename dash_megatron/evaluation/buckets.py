"""Buckets of positions that losses are averaged over."""

from itertools import pairwise

FIRST_BUCKET = 64


def buckets(length: int) -> list[tuple[int, int]]:
    """Where each bucket begins and ends: they end at 64, then each at twice the one before, the last at `length`."""
    borders = [0]
    while (end := max(FIRST_BUCKET, 2 * borders[-1])) < length:
        borders.append(end)
    return list(pairwise([*borders, length]))
