"""The order of rows, number for number as Megatron-core makes it, in less than half of its time and memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

with warnings.catch_warnings():
    # Apex and Transformer Engine speed up GPU training; no dataset needs them
    warnings.filterwarnings("ignore", message=".*Transformer Engine.*", category=UserWarning)
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import normalize

PASS_ARRAYS = ("document_index", "sample_index", "shuffle_index")
"""Of `order_of_pass`."""
BLEND_ARRAYS = ("parts", "rows")
"""Of `order_of_blend`."""


def order_of_pass(lengths: np.ndarray, seq_length: int, seed: int) -> dict[str, np.ndarray]:
    """Concatenate documents in random order, cut rows out of them, and put the rows in random order.

    Bit for bit what Megatron-core's `GPTDataset` of one epoch makes, and runs go on with.

    Args:
        lengths: int32 [documents], tokens in each.
        seq_length: tokens of a row, which shares its last label with the next row's first token.
        seed: of both orders.

    Returns:
        `document_index` int32 [documents]; `sample_index` int32 [rows + 1, 2], where in it each row begins: place and token of the
        document; `shuffle_index` uint32 [rows], or int64 where these are too few.
    """
    random = np.random.RandomState(seed)
    documents = _shuffled(random, len(lengths)).astype(np.int32)
    samples = helpers.build_sample_idx(
        np.array(lengths),  # a copy in memory, of large pages, as it is read in random order
        documents,
        seq_length,
        1,
        int(np.sum(lengths, dtype=np.int64)),
        True,
        True,
    )
    rows = len(samples) - 1
    shuffled = _shuffled(random, rows).astype(np.uint32 if rows < np.iinfo(np.uint32).max - 1 else np.int64)
    return dict(zip(PASS_ARRAYS, (documents, samples, shuffled), strict=True))


def _shuffled(random: np.random.RandomState, count: int) -> np.ndarray:
    """The numbers below `count` in random order, int64: numpy takes twice as long to shuffle numbers of another size."""
    numbers = np.arange(count, dtype=np.int64)
    random.shuffle(numbers)
    return numbers


def order_of_blend(
    lengths: Sequence[int], weights: Sequence[float] | None, num_samples: int
) -> dict[str, np.ndarray]:
    """Draw rows from several data sets, so that each has its share everywhere in the order.

    Args:
        lengths: rows of a pass over each.
        weights: of each; None: every row is drawn once.
        num_samples: how many are drawn.

    Returns:
        `parts` int16 [num_samples], the data set of each, and `rows` int64 [num_samples], its number among those drawn from there.
    """
    parts, rows = np.zeros(num_samples, dtype=np.int16), np.zeros(num_samples, dtype=np.int64)
    if weights is None:
        helpers.build_exhaustive_blending_indices(parts, rows, lengths, len(lengths))
    else:
        shares = normalize([weight / sum(weights) for weight in weights])
        helpers.build_blending_indices(parts, rows, shares, len(lengths), num_samples, False)
    return dict(zip(BLEND_ARRAYS, (parts, rows), strict=True))
