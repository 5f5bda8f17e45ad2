"""Buckets of positions that losses are averaged over."""

FIRST_BUCKET = 64


def buckets(length: int) -> list[int]:
    """The positions at which buckets end: 64, then each twice the one before, the last `length`."""
    ends = [FIRST_BUCKET]
    while ends[-1] * 2 <= length:
        ends.append(ends[-1] * 2)
    return [end for end in ends if end < length] + [length]
