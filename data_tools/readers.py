"""Every kind of input as one stream of documents and bad lines.

Text files (one document each), .jsonl (one a line), .json (the same, or one array of records), all of them also compressed,
.parquet and Arrow files (one a row). A byte order mark (BOM) at the beginning of a file is no part of its text.
"""

import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dash_megatron.files import path_for_message
from data_tools.compressed import read_lines, read_whole
from data_tools.documents import BadLine, BadLineCounter, Document, Piece, TooManyBadLines
from data_tools.kinds import SUPPORTED, kind_of
from data_tools.records import keys_of, text_of
from data_tools.tables import count_parts, read_table

__all__ = [
    "UNFINISHED",
    "BadLine",
    "BadLineCounter",
    "Document",
    "Piece",
    "TooManyBadLines",
    "find_inputs",
    "read_folders",
    "read_inputs",
    "read_piece",
    "split_into_pieces",
    "warn_of_unread_files",
]

# In a corpus folder from the first shard that is written to the manifest.
UNFINISHED = ".unfinished"
# How many consecutive lines of a compressed file go to the same part.
_LINES_PER_TURN = 256
# of a .json file in a folder, how much is searched for the key of the text
_PEEK_BYTES = 1 << 20
# what make_corpus, and `save_to_disk` of Hugging Face's datasets, write beside the data
_ABOUT_DATA = ("manifest.json", "dataset_info.json", "state.json", "dataset_dict.json")


def find_inputs(inputs: Sequence[str | os.PathLike[str]], text_key: str | None = "text") -> list[str]:
    """List the files of each input in order: a file itself, a folder's supported files, sorted by path.

    A .json file of a folder counts where it has a key that is read, see `text_of`; source folders hold others. Conversations
    are in no text files.

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
            inside = [str(file) for file in _files_of(path) if _is_input(file, text_key)]
            if not inside:
                raise ValueError(f"--input={entry} must hold files to read, but has no {SUPPORTED}")
            found.extend(inside)
        elif not path.exists():
            raise FileNotFoundError(
                f"--input={path_for_message(entry)} does not exist; give a file or a folder"
            )
        elif (kind := kind_of(path.name)) is None or (kind.format == "text" and text_key is None):
            kinds = SUPPORTED if text_key is not None else "JSONL, JSON, parquet or Arrow with conversations"
            raise ValueError(
                f"--input={entry} must be of a kind that can be read: {kinds}; rename or convert it"
            )
        else:
            found.append(str(path))
    # the same file named twice would put its documents in twice
    return list({os.path.abspath(path): path for path in found}.values())


def warn_of_unread_files(inputs: Sequence[str | os.PathLike[str]], text_key: str | None = "text") -> None:
    """Print on standard error how many files of the input folders are not read, by suffix, with the first of each."""
    for entry in inputs:
        path = Path(entry)
        unread: dict[str, list[Path]] = {}
        for file in _files_of(path) if path.is_dir() else ():
            if file.name not in _ABOUT_DATA and not _is_input(file, text_key):
                suffix = "".join(file.suffixes[-2:]) or "no suffix"
                unread.setdefault(suffix if file.is_file() else "links to no file", []).append(file)
        if unread:
            count = sum(map(len, unread.values()))
            each = ", ".join(f"{len(files)} {suffix} ({files[0]})" for suffix, files in unread.items())
            files_are = "file is" if count == 1 else "files are"
            print(f"{entry}: {count} {files_are} not read: {each}", file=sys.stderr)
        if (path / "dataset_dict.json").is_file():
            print(
                f"{entry}: a saved data set of several splits, all of which are read; name the folder of one to read that",
                file=sys.stderr,
            )


def _files_of(folder: Path) -> list[Path]:
    """A folder's files, sorted by path, without hidden ones and Python's compiled ones; and its links to folders or to nothing."""

    def refuse(error: OSError) -> None:
        raise error  # a folder that may not be read, whose files would be missing without a word

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(parent, name) for name in (*folders, *names) if not name.startswith(".")]
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def _is_input(file: Path, text_key: str | None) -> bool:
    kind = kind_of(file.name)
    if kind is None or file.name in _ABOUT_DATA or not file.is_file():
        return False
    if kind.format == "text" and text_key is None:
        return False
    if kind != ("json", ""):
        return True
    with file.open("rb") as opened:
        begin = opened.read(_PEEK_BYTES)
    return any(json.dumps(key).encode() in begin for key in keys_of(text_key))


def split_into_pieces(path: str, piece_bytes: int) -> list[Piece]:
    """Cut a file into parts of about `piece_bytes` that can be read independently."""
    size = os.path.getsize(path)
    count = max(1, -(-size // piece_bytes))
    kind = kind_of(path)
    assert kind is not None
    if count == 1 or kind.format in ("text", "json"):
        return [Piece(path, num_bytes=size)]
    if kind.compression:
        # each part decompresses the whole file, which is far quicker than tokenising it
        count = min(count, 16)
        return [Piece(path, part, count, size // count) for part in range(count)]
    total = size if kind.format == "jsonl" else count_parts(path)
    count = min(count, max(1, total))
    bounds = [total * part // count for part in range(count + 1)]
    return [Piece(path, start, stop, size // count) for start, stop in pairwise(bounds)]


def read_piece(piece: Piece, text_key: str | None = "text") -> Iterator[Document | BadLine]:
    """Read a part of a file, a document at a time; documents without any text are skipped.

    Args:
        piece: what to read.
        text_key: see `text_of`; None reads conversations.

    Raises:
        ValueError: the file as a whole is damaged: cut short, not what its name says, or without the text
            column.
    """
    kind = kind_of(piece.path)
    assert kind is not None
    readers = {"text": _read_text, "json": _read_json, "parquet": read_table, "arrow": read_table}
    lines = _read_compressed if kind.compression else _read_jsonl
    for item in readers.get(kind.format, lines)(piece, text_key):
        if isinstance(item, BadLine) or item.text:
            yield item


def read_inputs(
    inputs: Sequence[str | os.PathLike[str]], text_key: str | None, bad_lines: BadLineCounter
) -> Iterator[Document]:
    """Read all inputs one after another; bad lines are counted."""
    for path in find_inputs(inputs, text_key):
        for item in read_piece(Piece(path), text_key):
            if isinstance(item, BadLine):
                bad_lines.add(item)
            else:
                yield item


def read_folders(
    inputs: Sequence[str | os.PathLike[str]], text_key: str | None, bad_lines: BadLineCounter
) -> Iterator[Document]:
    """As `read_inputs`, but the text files that lie in the same folder are one document, each under its name."""
    folders: dict[Path, list[Path]] = {}
    for path in map(Path, find_inputs(inputs, text_key)):
        if (kind := kind_of(path.name)) is not None and kind.format == "text":
            folders.setdefault(path.parent, []).append(path)
        else:
            yield from read_inputs([path], text_key, bad_lines)
    for folder, paths in folders.items():
        # a bad file costs itself, not its folder
        files = [
            (os.fsencode(path.name).decode("utf-8", "replace"), document.text)
            for path in paths
            for document in read_inputs([path], text_key, bad_lines)
        ]
        if files:
            yield Document("\n".join(f"{name}\n\n{text}" for name, text in files), str(folder))


def parse_line(line: bytes, text_key: str | None) -> tuple[str, str]:
    """Take the text out of a JSON line; returns (text, "") or ("", why not)."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start} of the line)"
    # RecursionError, and ValueError of numbers with thousands of digits, which JSON allows and Python does not
    except (ValueError, RecursionError) as error:
        return "", f"not JSON ({error})"
    return text_of(value, text_key)


def _from_line(path: str, number: int, line: bytes, text_key: str | None) -> Document | BadLine | None:
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return None
    text, reason = parse_line(line, text_key)
    return BadLine(path, number, reason) if reason else Document(text, f"{path}:{number}")


def _read_jsonl(piece: Piece, text_key: str | None) -> Iterator[Document | BadLine]:
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


def _read_compressed(piece: Piece, text_key: str | None) -> Iterator[Document | BadLine]:
    parts = max(1, piece.stop)
    for index, line in enumerate(read_lines(piece.path)):
        if (index // _LINES_PER_TURN) % parts == piece.start:
            item = _from_line(piece.path, index + 1, line, text_key)
            if item is not None:
                yield item


def _read_json(piece: Piece, text_key: str | None) -> Iterator[Document | BadLine]:
    """Read one array of records, or one record, or a record a line, which many call .json too."""
    data = read_whole(piece.path).removeprefix(codecs.BOM_UTF8)
    if not data.lstrip().startswith(b"["):
        first = next((line for line in data.splitlines() if line.strip()), b"")
        one_record = first.strip() != data.strip() and not _is_json(first) and _is_json(data)
        lines = [data] if one_record else data.split(b"\n")
        for number, line in enumerate(lines, 1):
            item = _from_line(piece.path, number, line, text_key)
            if item is not None:
                yield item
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadLine(piece.path, data.count(b"\n", 0, error.start) + 1, f"not UTF-8 (byte {error.start})")
        return
    yield from _read_array(piece.path, text, text_key)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_array(path: str, text: str, text_key: str | None) -> Iterator[Document | BadLine]:
    strict, lenient = json.JSONDecoder(), json.JSONDecoder(parse_int=len)
    place = _skip(text, text.index("[") + 1, "")
    counted, line = 0, 1
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            try:
                value, end = strict.raw_decode(text, place)
                found, reason = text_of(value, text_key)
            except json.JSONDecodeError:
                raise
            except ValueError as error:  # of a number with thousands of digits
                end = lenient.raw_decode(text, place)[1]
                found, reason = "", f"not JSON ({error})"
        except (ValueError, RecursionError) as error:
            yield BadLine(path, line, f"not JSON ({error}); what follows in this file is not read")
            return
        yield BadLine(path, line, reason) if reason else Document(found, f"{path}:{line}")
        place = _skip(text, end, ",")


def _skip(text: str, place: int, sign: str) -> int:
    """The place after white space, one sign if it is there, and white space."""
    while text[place : place + 1].isspace():
        place += 1
    if sign and text.startswith(sign, place):
        return _skip(text, place + 1, "")
    return place


def _read_text(piece: Piece, text_key: str | None) -> Iterator[Document | BadLine]:
    data = read_whole(piece.path).removeprefix(codecs.BOM_UTF8)
    try:
        yield Document(data.decode("utf-8"), piece.path)
    except UnicodeDecodeError as error:
        yield BadLine(piece.path, data.count(b"\n", 0, error.start) + 1, f"not UTF-8 (byte {error.start})")
