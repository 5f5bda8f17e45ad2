"""Every kind of input as one stream of documents and bad lines.

Text files (one document each), .jsonl, .jsonl.gz, .jsonl.zst (one document a line) and .parquet (one a row).
"""

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dash_megatron.files import told

_PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".html")
_CODE = (
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".cuh",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".sh",
)
_SETTINGS = (".toml", ".yaml", ".yml")
TEXT_SUFFIXES = frozenset(_PROSE + _CODE + _SETTINGS)
COMPRESSED_SUFFIXES = (".jsonl.gz", ".jsonl.zst")
SUPPORTED = "text files (" + " ".join(sorted(TEXT_SUFFIXES)) + "), .jsonl, .jsonl.gz, .jsonl.zst, .parquet"

# In a corpus folder from the first shard that is written to the manifest.
UNFINISHED = ".unfinished"
# How many consecutive lines of a compressed file go to the same part.
_LINES_PER_TURN = 256


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
    """

    def __init__(self, limit: int) -> None:
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


def kind_of(path: str) -> str | None:
    """Name the reader of a file: jsonl, compressed, parquet, text; None where there is none."""
    name = os.path.basename(path).lower()
    if name.endswith(".jsonl"):
        return "jsonl"
    if name.endswith(COMPRESSED_SUFFIXES):
        return "compressed"
    if name.endswith(".parquet"):
        return "parquet"
    return "text" if os.path.splitext(name)[1] in TEXT_SUFFIXES else None


def find_inputs(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """List the files of each input in order: a file itself, a folder's supported files, sorted by path.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: an input is a file of no supported kind, a folder without a single supported file, or an
            unfinished corpus.
    """
    found: list[str] = []
    for entry in inputs:
        path = Path(entry)
        if path.is_dir():
            if (path / UNFINISHED).exists():
                raise ValueError(
                    f"--input={entry} must be a whole corpus, but make_corpus was interrupted or failed "
                    "while writing it; run `python -m data_tools.make_corpus` again"
                )
            inside = sorted(
                str(file)
                for file in path.rglob("*")
                if kind_of(file.name)
                and file.is_file()
                and not any(
                    part.startswith(".") or part == "__pycache__" for part in file.relative_to(path).parts
                )
            )
            if not inside:
                raise ValueError(f"--input={entry} must hold files to read, but has no {SUPPORTED}")
            found.extend(inside)
        elif not path.exists():
            raise FileNotFoundError(f"--input={told(entry)} does not exist; give a file or a folder")
        elif kind_of(path.name) is None:
            raise ValueError(
                f"--input={entry} must be of a kind that can be read: {SUPPORTED}; rename or convert it"
            )
        else:
            found.append(str(path))
    # the same file named twice would put its documents in twice
    return list(dict.fromkeys(found))


def split_into_pieces(path: str, piece_bytes: int) -> list[Piece]:
    """Cut a file into parts of about `piece_bytes` that can be read independently."""
    size = os.path.getsize(path)
    count = max(1, -(-size // piece_bytes))
    kind = kind_of(path)
    if count == 1 or kind == "text":
        return [Piece(path, num_bytes=size)]
    if kind == "compressed":
        # each part decompresses the whole file, which is far quicker than tokenising it
        count = min(count, 16)
        return [Piece(path, part, count, size // count) for part in range(count)]
    total = size if kind == "jsonl" else _parquet_file(path).num_row_groups
    count = min(count, max(1, total))
    bounds = [total * part // count for part in range(count + 1)]
    return [Piece(path, start, stop, size // count) for start, stop in pairwise(bounds)]


def read_piece(piece: Piece, text_key: str = "text") -> Iterator[Document | BadLine]:
    """Read a part of a file, a document at a time; documents without any text are skipped.

    Raises:
        ValueError: the file as a whole is damaged: cut short, not what its name says, or without the text
            column.
    """
    readers = {
        "jsonl": _read_jsonl,
        "compressed": _read_compressed,
        "parquet": _read_parquet,
        "text": _read_text,
    }
    for item in readers[kind_of(piece.path) or "text"](piece, text_key):
        if isinstance(item, BadLine) or item.text:
            yield item


def read_inputs(
    inputs: Sequence[str | os.PathLike[str]], text_key: str, bad_lines: BadLineCounter
) -> Iterator[Document]:
    """Read all inputs one after another; bad lines are counted."""
    for path in find_inputs(inputs):
        for item in read_piece(Piece(path), text_key):
            if isinstance(item, BadLine):
                bad_lines.add(item)
            else:
                yield item


def read_folders(
    inputs: Sequence[str | os.PathLike[str]], text_key: str, bad_lines: BadLineCounter
) -> Iterator[Document]:
    """As `read_inputs`, but the text files that lie in the same folder are one document, each under its name."""
    folders: dict[Path, list[Path]] = {}
    for path in map(Path, find_inputs(inputs)):
        if kind_of(path.name) == "text":
            folders.setdefault(path.parent, []).append(path)
        else:
            yield from read_inputs([path], text_key, bad_lines)
    for folder, paths in folders.items():
        # a bad file costs itself, not its folder
        files = [
            (path.name, document.text)
            for path in paths
            for document in read_inputs([path], text_key, bad_lines)
        ]
        if files:
            yield Document("\n".join(f"{name}\n\n{text}" for name, text in files), str(folder))


def parse_line(line: bytes, text_key: str) -> tuple[str, str]:
    """Take the text out of a JSON line; returns (text, "") or ("", why not)."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start} of the line)"
    except (json.JSONDecodeError, RecursionError) as error:
        return "", f"not JSON ({error})"
    if not isinstance(value, dict):
        return "", f"not a JSON object but {type(value).__name__}"
    if text_key not in value:
        return "", f"no key {text_key!r} (it has {', '.join(map(repr, list(value)[:5])) or 'none'})"
    text = value[text_key]
    if not isinstance(text, str):
        return "", f"{text_key!r} is not a string but {type(text).__name__}"
    return _check_text(text)


def _check_text(text: str) -> tuple[str, str]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f"lone surrogate at character {error.start}, which no UTF-8 text can hold"
    return text, ""


def _from_line(path: str, number: int, line: bytes, text_key: str) -> Document | BadLine | None:
    if not line.strip():
        return None
    text, reason = parse_line(line, text_key)
    return BadLine(path, number, reason) if reason else Document(text, f"{path}:{number}")


def _read_jsonl(piece: Piece, text_key: str) -> Iterator[Document | BadLine]:
    """Read the lines that begin in [start, stop)."""
    with open(piece.path, "rb") as file:
        stop = piece.stop if piece.stop >= 0 else os.path.getsize(piece.path)
        # line numbers are those of the whole file, lest a reported line be searched in vain
        number = _count_newlines(file, piece.start)
        file.seek(max(0, piece.start - 1))
        if piece.start and file.read(1) != b"\n":
            # the line under way belongs to the piece before
            file.readline()
            number += 1
        while file.tell() < stop and (line := file.readline()):
            number += 1
            item = _from_line(piece.path, number, line, text_key)
            if item is not None:
                yield item


def _count_newlines(file: Any, stop: int) -> int:
    count = 0
    while stop > 0:
        block = file.read(min(stop, 1 << 22))
        if not block:
            break
        count += block.count(b"\n")
        stop -= len(block)
    return count


def _read_compressed(piece: Piece, text_key: str) -> Iterator[Document | BadLine]:
    parts = max(1, piece.stop)
    try:
        for index, line in enumerate(_decompressed_lines(piece.path)):
            if (index // _LINES_PER_TURN) % parts == piece.start:
                item = _from_line(piece.path, index + 1, line, text_key)
                if item is not None:
                    yield item
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{piece.path} must be a whole compressed file ({error}); copy it again") from error


def _decompressed_lines(path: str) -> Iterator[bytes]:
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield from file
        return
    rest: list[bytes] = []
    for block in _zstd_blocks(path):
        *lines, tail = block.split(b"\n")
        for line in lines:
            yield b"".join([*rest, line])
            rest = []
        rest.append(tail)
    if any(rest):
        yield b"".join(rest)


def _zstd_blocks(path: str) -> Iterator[bytes]:
    """Decompress frame after frame; unlike zstandard's stream reader this notices a file cut short."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    with open(path, "rb") as file:
        while data := file.read(1 << 17):
            while data:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends within a frame")


def _parquet_file(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} must be a whole .parquet file ({error}); copy it again") from error


def _read_parquet(piece: Piece, text_key: str) -> Iterator[Document | BadLine]:
    file = _parquet_file(piece.path)
    if text_key not in file.schema_arrow.names:
        raise ValueError(
            f"{piece.path} has no column {text_key!r} (it has {', '.join(file.schema_arrow.names)}); set "
            "--text-key"
        )
    stop = piece.stop if piece.stop >= 0 else file.num_row_groups
    row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    groups = list(range(piece.start, stop))
    for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_key]):
        # one value at a time: a row that is not UTF-8 then harms no other
        for value in batch.column(0):
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                yield BadLine(piece.path, row, f"not UTF-8 (byte {error.start} of the value)")
                continue
            if isinstance(text, str):
                yield Document(text, f"{piece.path}:{row}")
            else:
                yield BadLine(piece.path, row, f"{text_key!r} is not a string but {type(text).__name__}")


def _read_text(piece: Piece, text_key: str) -> Iterator[Document | BadLine]:
    data = Path(piece.path).read_bytes()
    try:
        yield Document(data.decode("utf-8"), piece.path)
    except UnicodeDecodeError as error:
        yield BadLine(piece.path, data.count(b"\n", 0, error.start) + 1, f"not UTF-8 (byte {error.start})")
