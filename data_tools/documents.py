"""What readers give: documents and bad lines; and the parts of files that they are asked for."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text, and where it is from: a path, or path:line."""

    text: str
    source: str


@dataclass(frozen=True)
class BadLine:
    """A place that holds no document: line counts from 1 (in a .parquet file: the row)."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class TooManyBadLines(ValueError):
    """More lines were bad than --max-bad-lines allows."""


class BadLineCounter:
    """Report bad lines on stderr, and fail past the limit.

    Args:
        limit: bad lines that are tolerated, --max-bad-lines.

    Raises:
        ValueError: the limit is below 0.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"--max-bad-lines={limit} must be at least 0, which tolerates none")
        self.limit = limit
        self.count = 0

    def add(self, bad: object) -> None:
        """Report one, a `BadLine` or its text.

        Raises:
            TooManyBadLines: there are now more than the limit.
        """
        self.count += 1
        print(f"bad line: {bad}", file=sys.stderr)
        if self.count > self.limit:
            raise TooManyBadLines(
                f"--max-bad-lines={self.limit} must not be exceeded, and {bad} is bad line {self.count}; "
                "mend the input or raise --max-bad-lines"
            )


@dataclass(frozen=True)
class Piece:
    """A part of an input file: [start, stop) counts bytes in .jsonl and row groups in .parquet.

    In a compressed file, which can be read from its beginning only, it is part `start` of `stop` that take
    turns. A text file is always whole. stop == -1: the whole file.
    """

    path: str
    start: int = 0
    stop: int = -1
    num_bytes: int = 0
    """About how much of the file it is, for progress and for a fair division of work."""
