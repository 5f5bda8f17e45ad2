"""Rows of whole conversations, of which only the answers are learnt."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dash_megatron.data.bin_reader import BinReader
from dash_megatron.data.index_file import check_lengths, read_arrays, read_lengths
from dash_megatron.data.sidecar import answers_path

logger = logging.getLogger(__name__)


CONVERSATION_ARRAYS = ("documents", "first", "counts")
"""Of `order_of_conversations`."""


def order_of_conversations(prefix: str, seq_length: int, seed: int) -> dict[str, np.ndarray]:
    """Put documents with marked answers in random order, and pack them into rows by best fit.

    No document goes on in another row. One that is longer than a row is cut at the row's end, and left out where no answer
    begins before that.

    Args:
        prefix: of .bin, .idx and .answers.bin, see `answers_path`.
        seq_length: tokens of a row.
        seed: fixes which documents share a row, and the order of rows.

    Returns:
        `documents` int32 [those not left out], row after row; `first` int64 [rows + 1], where in it each row begins; `counts` int64
        [3], of documents that are longer than a row, of those of them that are cut, and of all.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ValueError: no document has an answer within a row, or the .idx is damaged.
    """
    check_lengths(prefix)
    lengths = np.array(read_lengths(prefix)[0])
    keep = _with_answers(prefix, lengths, seq_length)
    is_long = lengths > seq_length + 1
    generator = np.random.default_rng(seed)
    documents = generator.permutation(np.flatnonzero(keep))
    row_of = _best_fit(np.minimum(lengths[documents], seq_length).tolist(), seq_length)
    rows = generator.permutation(row_of.max() + 1)[row_of]
    by_row = np.argsort(rows, kind="stable")
    counts = is_long.sum(), (is_long & keep).sum(), len(lengths)
    arrays = (
        documents[by_row].astype(np.int32),
        np.searchsorted(rows[by_row], np.arange(rows.max() + 2)),
        np.array(counts, dtype=np.int64),
    )
    return dict(zip(CONVERSATION_ARRAYS, arrays, strict=True))


def _with_answers(prefix: str, lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Which documents have an answer in a row, bool [documents]."""
    keep = lengths > 1
    arrays = read_arrays(prefix)
    reader = BinReader(str(answers_path(prefix)))
    for document in np.flatnonzero(lengths > seq_length + 1):
        marks = reader.read(np.uint8, seq_length + 1, int(arrays.places[document]) // arrays.dtype.itemsize)
        keep[document] = marks[1:].any()
    if not keep.any():
        raise ValueError(
            f"{prefix} has no conversation with an answer in its first data.seq_length={seq_length} tokens; "
            "raise data.seq_length"
        )
    return keep


class ConversationRows(torch.utils.data.Dataset[Mapping[str, Tensor]]):
    """One pass over documents with marked answers, in an order that is made already; warns of those that are cut or left out.

    Each row has tokens and labels (int64 [seq_length]), starts (bool [seq_length], where documents start) and loss_mask
    (float32 [seq_length], 1 where the label belongs to an answer). What documents leave empty is filled with `eod`.

    Args:
        prefix, seq_length: as of `order_of_conversations`.
        eod: fills rows.
        order: the arrays of `order_of_conversations`.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
    """

    def __init__(self, prefix: str, seq_length: int, eod: int, order: list[np.ndarray]) -> None:
        self.prefix = prefix
        self.seq_length = seq_length
        self.eod = eod
        self.lengths, self.places, self.dtype, _ = read_arrays(prefix)
        self.bin_reader = BinReader(f"{prefix}.bin")
        self.answers_reader = BinReader(str(answers_path(prefix)))
        self._documents, self._first, counts = order
        long, cut, total = counts.tolist()
        if long:
            logger.warning(
                "%s: %d of %d conversations are longer than data.seq_length=%d: %d are cut there, and %d are left out, whose "
                "answers begin behind it",
                prefix,
                long,
                total,
                seq_length,
                cut,
                long - cut,
            )

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """Read a row.

        Raises:
            OSError: a file cannot be read, even after minutes, or ends too early.
        """
        tokens, labels = np.full((2, self.seq_length), self.eod, dtype=np.int64)
        starts, answers = np.zeros((2, self.seq_length), dtype=bool)
        place = 0
        for document in self._documents[self._first[index] : self._first[index + 1]]:
            length, offset = int(self.lengths[document]), int(self.places[document]) // self.dtype.itemsize
            # one more than finds room: it is the last label
            count = min(length, self.seq_length + 1)
            ids = self.bin_reader.read(self.dtype, count, offset * self.dtype.itemsize)
            marks = self.answers_reader.read(np.uint8, count, offset)
            end = min(place + length, self.seq_length)
            tokens[place:end] = ids[: end - place]
            labels[place : place + count - 1] = ids[1:]
            answers[place : place + count - 1] = marks[1:]
            starts[place] = True
            place = end
        # the filling is one document of its own
        starts[place : place + 1] = True
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "starts": torch.from_numpy(starts),
            "loss_mask": torch.from_numpy(answers).float(),
        }

    def open(self) -> None:
        """Open the files, so that how many a process has open is known.

        Raises:
            OSError: one cannot be opened.
        """
        self.bin_reader.open()
        self.answers_reader.open()


def _best_fit(lengths: list[int], seq_length: int) -> np.ndarray:
    """Give each document, in order, the row that it fills best, of such the last that got one, or a new one; int64 [documents]."""
    shortest = min(lengths)
    rooms: list[int] = []  # that rows have for a document, each once, ascending
    rows_with: dict[int, list[int]] = {}  # each of these rooms
    row_of, count = np.empty(len(lengths), dtype=np.int64), 0
    for document, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[rooms.pop(place)]
        else:
            room, row, count = seq_length, count, count + 1
        row_of[document] = row
        left = room - length
        if left >= shortest:
            if left not in rows_with:
                rows_with[left] = []
                insort(rooms, left)
            rows_with[left].append(row)
    return row_of
