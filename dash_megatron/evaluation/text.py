"""The local text that is scored and that needles are hidden in: a text file, or documents of `.bin/.idx` pairs."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dash_megatron.data.index_file import read_arrays
from dash_megatron.data.sidecar import check_data
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.samples import LengthError
from dash_megatron.files import path_for_message

# tokens of text to hide needles in, at least: enough for many different stretches
MIN_TEXT_TOKENS = 1 << 18
# Lines longer than so many words are broken: needles stand between lines.
_LINE_WORDS = 40


def tokens_for_lines(longest: int) -> int:
    """How many tokens of text samples of up to `longest` tokens are made from.

    In powers of two, so that not every longest length makes other samples of the shorter ones.
    """
    return max(MIN_TEXT_TOKENS, 1 << (4 * longest - 1).bit_length())


class LocalText:
    """Documents as tokens, and their beginning as lines of text.

    Args:
        documents: int [tokens] each.
        tokenizer: what made them.
        num_tokens: how many tokens the lines are to have, at least; all, where there are fewer.
        digest: says which text it is.
        name: for messages.
    """

    def __init__(
        self, documents: Sequence[np.ndarray], tokenizer: Tokenizer, num_tokens: int, digest: str, name: str
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.digest = digest
        self.name = name

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Tokenizer, num_tokens: int) -> LocalText:
        """Read a file of plain text as one document.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is empty, not UTF-8, or JSONL.
        """
        if Path(path).suffix == ".jsonl":
            raise ValueError(
                f"--text {path} must be plain text, read as one document, and not JSONL; make .bin and .idx of its "
                "documents with `python -m data_tools.tokenize_corpus`, and give them as --data"
            )
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"--text {path_for_message(path)} does not exist") from None
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--text {path} must be UTF-8 text, which its byte {error.start} is not; decompress it, or convert it"
            ) from None
        ids = np.array(tokenizer.encode(data), dtype=np.int64)
        if not ids.size:
            raise ValueError(f"--text {path} is empty; give a file with text")
        return cls([ids], tokenizer, num_tokens, hashlib.sha256(data).hexdigest(), str(path))

    @classmethod
    def from_data(cls, prefixes: Sequence[str], tokenizer: Tokenizer, num_tokens: int) -> LocalText:
        """Open tokenized data.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the data is damaged, empty, or of another tokenizer; see `check_data`.
        """
        digest = hashlib.sha256()
        for prefix in prefixes:
            sidecar = check_data(prefix, tokenizer, seq_length=1)
            digest.update((sidecar.idx_digest + sidecar.bin_digest).encode())
        documents = _Documents(prefixes)
        return cls(documents, tokenizer, num_tokens, digest.hexdigest(), ", ".join(prefixes))

    @functools.cached_property
    def _head(self) -> list[np.ndarray]:
        total, head = 0, []
        for document in self.documents:
            head.append(document[: self.num_tokens - total])
            total += len(head[-1])
            if total >= self.num_tokens:
                break
        return head

    @functools.cached_property
    def lines(self) -> list[str]:
        """Lines with something in them, none of them long."""
        return [
            line
            for ids in self._head
            for line in break_lines(self.tokenizer.decode([int(token) for token in ids]))
        ]

    @functools.cached_property
    def vocabulary(self) -> list[int]:
        """The token ids of the lines, each once, without the end of document."""
        ids = np.unique(np.concatenate(self._head))
        return [int(token) for token in ids if token != self.tokenizer.eod]

    def windows(self, length: int, count: int, seed: int) -> list[tuple[int, np.ndarray]]:
        """Draw different stretches of `length + 1` tokens, int64, none across two documents, each with its document's number.

        Args:
            length: tokens that are predicted.
            count: how many; fewer where there are fewer.
            seed: fixes which.

        Raises:
            LengthError: no document is that long.
        """
        places = [
            (number, start)
            for number, document in enumerate(self.documents)
            for start in range(0, len(document) - length, length)
        ]
        if not places:
            longest = max(len(document) for document in self.documents)
            raise LengthError(
                f"task perplexity: --lengths {length} needs documents of {length + 1} tokens, and the longest of "
                f"{self.name} has {longest}; give a longer --text, smaller lengths, or other --tasks"
            )
        random.Random(seed).shuffle(places)
        return [
            (number, np.asarray(self.documents[number][start : start + length + 1], dtype=np.int64))
            for number, start in places[:count]
        ]


class _Documents(Sequence[np.ndarray]):
    """The documents of tokenized data that have tokens, each mapped into memory when it is asked for.

    Of 3 billion documents 60 million may be for validation; a list of them took every process 7 minutes and 30 GB.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        # of each prefix: tokens, where documents begin in bytes, and how many tokens they have
        self._files: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # which documents of each prefix have tokens; None: all
        self._filled: list[np.ndarray | None] = []
        self._ends: list[int] = []
        for prefix in prefixes:
            lengths, places, dtype, _ = read_arrays(prefix)
            tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
            # some tasks go over all documents, which takes slices of a `memmap` four times as long
            self._files.append((np.asarray(tokens), np.asarray(places), np.asarray(lengths)))
            count = int(np.count_nonzero(lengths))
            self._filled.append(None if count == len(lengths) else np.flatnonzero(lengths))
            self._ends.append(len(self) + count)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]
        index = range(len(self))[number]
        part = bisect_right(self._ends, index)
        index -= self._ends[part - 1] if part else 0
        filled = self._filled[part]
        index = index if filled is None else int(filled[index])
        tokens, places, lengths = self._files[part]
        begin = int(places[index]) // tokens.itemsize
        return tokens[begin : begin + int(lengths[index])]


def break_lines(text: str) -> Iterator[str]:
    """Lines with something in them; long ones in pieces."""
    for line in text.splitlines():
        pieces = line.split(" ")
        if not line.strip():
            continue
        if len(pieces) <= _LINE_WORDS:
            yield line
        else:
            for first in range(0, len(pieces), _LINE_WORDS):
                yield " ".join(itertools.islice(pieces, first, first + _LINE_WORDS))
