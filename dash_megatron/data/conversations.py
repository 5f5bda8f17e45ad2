"""Rows of whole conversations, of which only the answers are learnt."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dash_megatron.data.bin_reader import BinReader
from dash_megatron.data.index_file import check_lengths, read_lengths
from dash_megatron.data.sidecar import answers_path

logger = logging.getLogger(__name__)


class ConversationRows(torch.utils.data.Dataset[Mapping[str, Tensor]]):
    """One pass over documents with marked answers, in random order, packed into rows by best fit.

    No document goes on in another row. One that is longer than a row is cut at the row's end, and left out where no answer
    begins before that.

    Each row has tokens and labels (int64 [seq_length]), starts (bool [seq_length], where documents start) and loss_mask
    (float32 [seq_length], 1 where the label belongs to an answer). What documents leave empty is filled with `eod`.

    Args:
        prefix: of .bin, .idx and .answers.bin, see `answers_path`.
        seq_length: tokens of a row.
        seed: fixes which documents share a row, and the order of rows.
        eod: fills rows.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ValueError: no document has an answer within a row, or the .idx is damaged.
    """

    def __init__(self, prefix: str, seq_length: int, seed: int, eod: int) -> None:
        self.prefix = prefix
        self.seq_length = seq_length
        self.eod = eod
        check_lengths(prefix)
        lengths, self.dtype, _ = read_lengths(prefix)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.bin_reader = BinReader(f"{prefix}.bin")
        self.answers_reader = BinReader(str(answers_path(prefix)))
        generator = np.random.default_rng(seed)
        documents = generator.permutation(self._with_answers())
        row_of = _best_fit(np.minimum(self.lengths[documents], seq_length).tolist(), seq_length)
        rows = generator.permutation(row_of.max() + 1)[row_of]
        by_row = np.argsort(rows, kind="stable")
        self._documents = documents[by_row]
        self._first = np.searchsorted(rows[by_row], np.arange(rows.max() + 2))

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
            length, offset = int(self.lengths[document]), int(self.offsets[document])
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

    def _with_answers(self) -> np.ndarray:
        """The documents with an answer in a row, telling how many are cut or left out."""
        keep = self.lengths > 1
        long = np.flatnonzero(self.lengths > self.seq_length + 1)
        for document in long:
            marks = self.answers_reader.read(np.uint8, self.seq_length + 1, int(self.offsets[document]))
            keep[document] = marks[1:].any()
        if len(long):
            logger.warning(
                "%s: %d of %d conversations are longer than data.seq_length=%d: %d are cut there, and %d are left out, whose "
                "answers begin behind it",
                self.prefix,
                len(long),
                len(keep),
                self.seq_length,
                keep[long].sum(),
                (~keep[long]).sum(),
            )
        if not keep.any():
            raise ValueError(
                f"{self.prefix} has no conversation with an answer in its first data.seq_length={self.seq_length} tokens; "
                "raise data.seq_length"
            )
        return np.flatnonzero(keep)


def _best_fit(lengths: list[int], seq_length: int) -> np.ndarray:
    """Give each document, in order, the row that it fills best, or a new one; int64 [documents]."""
    shortest = min(lengths)
    rooms: list[int] = []  # of rows with room for a document, ascending, and which rows these are
    open_rows: list[int] = []
    row_of, count = np.empty(len(lengths), dtype=np.int64), 0
    for document, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room, row = rooms.pop(place), open_rows.pop(place)
        else:
            room, row, count = seq_length, count, count + 1
        row_of[document] = row
        if room - length >= shortest:
            place = bisect_left(rooms, room - length)
            rooms.insert(place, room - length)
            open_rows.insert(place, row)
    return row_of
