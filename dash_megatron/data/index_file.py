"""Megatron's .idx format, read and written without torch and without a Python object for each document.

PREFIX.bin holds the tokens of all documents, concatenated; PREFIX.idx holds their type and the length of each
document. Megatron's own builder keeps a list entry for each document and imports torch,
which is slow to start in every tokenising process; the files are equal byte for byte.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dash_megatron.files import path_for_message

_MAGIC = b"MMIDIDX\x00\x00"
# after the magic: version, dtype code, sequences, document boundaries
_HEADER = struct.Struct("<QBQQ")
_HEADER_BYTES = len(_MAGIC) + _HEADER.size
# Megatron's codes for the integer types that can hold token ids
_DTYPES: dict[int, np.dtype] = {4: np.dtype(np.int32), 5: np.dtype(np.int64), 8: np.dtype(np.uint16)}
_EDGE_BYTES = 1 << 20
_DOCUMENTS_AT_ONCE = 1 << 20
"""Of billions, places of so many are in memory."""


@dataclass(frozen=True)
class IndexSummary:
    """The facts in PREFIX.idx about PREFIX.bin."""

    dtype: np.dtype
    documents: int
    tokens: int
    bin_bytes: int
    """Size that PREFIX.bin must have."""


def edges_digest(path: str | os.PathLike[str]) -> str:
    """Hash a file's size, first and last MiB: cheap, and enough to tell that a file was replaced."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer type that holds the ids of a vocabulary: uint16, or int32 from 65537 ids on."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def write_index(path: str | os.PathLike[str], lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write an .idx file in which each sequence is a document.

    Args:
        path: the file to write. The write is not atomic: a caller that needs that renames the file afterwards.
        lengths: int [documents], tokens in each document.
        dtype: type of a token in the .bin file.
    """
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    with open(path, "wb") as file:
        file.write(_MAGIC + _HEADER.pack(1, code, len(lengths), len(lengths) + 1))
        # no `tofile`, which tells nothing of a disk that is full at its last bytes
        file.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        begin = 0
        for first in range(0, len(lengths), _DOCUMENTS_AT_ONCE):
            sizes = lengths[first : first + _DOCUMENTS_AT_ONCE].astype(np.int64) * dtype.itemsize
            ends = begin + np.cumsum(sizes)
            file.write((ends - sizes).data)
            begin = int(ends[-1])
        for first in range(0, len(lengths) + 1, _DOCUMENTS_AT_ONCE):
            file.write(
                np.arange(first, min(first + _DOCUMENTS_AT_ONCE, len(lengths) + 1), dtype=np.int64).data
            )


class IndexArrays(NamedTuple):
    """What an .idx holds, its arrays mapped into memory."""

    lengths: np.ndarray
    """int32 [sequences], in tokens."""
    places: np.ndarray
    """int64 [sequences]: where each begins in the .bin, in bytes."""
    dtype: np.dtype
    """Of a token."""
    documents: int


def read_arrays(prefix: str | os.PathLike[str]) -> IndexArrays:
    """Map PREFIX.idx into memory, checking that it is whole.

    Raises:
        FileNotFoundError: PREFIX.idx is missing.
        ValueError: it is no Megatron index, or cut short.
    """
    path = Path(f"{os.fspath(prefix)}.idx")
    if not path.is_file():
        raise FileNotFoundError(f"{path_for_message(path)} does not exist; {_remedy(Path(prefix))}")
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise ValueError(
            f"{path} must be a Megatron index, but has no such header; tokenize the corpus again"
        )
    version, code, sequences, boundaries = _HEADER.unpack(header[len(_MAGIC) :])
    if version != 1 or code not in _DTYPES:
        raise ValueError(
            f"{path} has version {version} and dtype code {code}; the version must be 1 and the code one of "
            f"{sorted(_DTYPES)}, the integers; tokenize the corpus again"
        )
    size, needed = path.stat().st_size, _HEADER_BYTES + sequences * (4 + 8) + boundaries * 8
    if size < needed:
        raise ValueError(
            f"{path} has {size} bytes and must have {needed} for its {sequences} sequences: it is truncated; "
            "copy it again or tokenize the corpus again"
        )
    if not sequences:
        return IndexArrays(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64), _DTYPES[code], 0)
    arrays = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEADER_BYTES)
    lengths, places, _ = np.split(arrays, [sequences * 4, sequences * (4 + 8)])
    return IndexArrays(lengths.view(np.int32), places.view(np.int64), _DTYPES[code], boundaries - 1)


def read_lengths(prefix: str | os.PathLike[str]) -> tuple[np.ndarray, np.dtype, int]:
    """Lengths, the type of a token and the number of documents of `read_arrays`; errors as there."""
    lengths, _, dtype, documents = read_arrays(prefix)
    return lengths, dtype, documents


def read_index(prefix: str | os.PathLike[str]) -> IndexSummary:
    """The facts in PREFIX.idx; errors as in `read_arrays`.

    Tokens are where the last document ends. Lengths are not added up: those of 3 billion documents are 12 GB.
    """
    return _summary(read_arrays(prefix))


def _summary(arrays: IndexArrays) -> IndexSummary:
    lengths, places, dtype, documents = arrays
    bin_bytes = int(places[-1]) + int(lengths[-1]) * dtype.itemsize if len(lengths) else 0
    return IndexSummary(
        dtype=dtype, documents=documents, tokens=bin_bytes // dtype.itemsize, bin_bytes=bin_bytes
    )


def check_lengths(prefix: str | os.PathLike[str]) -> None:
    """Read all lengths in PREFIX.idx, which finds damage that `read_index` does not.

    Raises:
        FileNotFoundError: as `read_arrays`.
        ValueError: as `read_arrays`, or they do not add up to where the last document ends.
    """
    arrays = read_arrays(prefix)
    tokens, total = _summary(arrays).tokens, int(np.sum(arrays.lengths, dtype=np.int64))
    if total != tokens:
        raise ValueError(
            f"{os.fspath(prefix)}.idx is damaged: the lengths of its documents add up to {total} tokens, and must to {tokens}, where "
            "the last one ends; copy it again or tokenize the corpus again"
        )


def check_bin_size(prefix: str | os.PathLike[str], index: IndexSummary) -> None:
    """Raise where PREFIX.bin is missing (FileNotFoundError) or not as long as its index says (ValueError)."""
    path = Path(f"{os.fspath(prefix)}.bin")
    if not path.is_file():
        raise FileNotFoundError(f"{path_for_message(path)} does not exist; {_remedy(Path(prefix))}")
    size = path.stat().st_size
    if size != index.bin_bytes:
        state = "truncated" if size < index.bin_bytes else "longer than its index"
        raise ValueError(
            f"{path} has {size} bytes and must have {index.bin_bytes} ({index.tokens} tokens of "
            f"{index.dtype.itemsize} bytes, as its .idx says): it is {state}; copy both files again or "
            "tokenize the corpus again"
        )


def _remedy(prefix: Path) -> str:
    """What to do about a prefix without its files: often it is the name of one of them, or of their folder."""
    if prefix.is_file() and prefix.suffix in (".bin", ".idx"):
        return f"write {prefix.with_suffix('')}, without {prefix.suffix}"
    if prefix.is_dir():
        return (
            f"{prefix} is a folder: write the beginning of its files' names too, such as {prefix / 'train'}"
        )
    return "make it with `python -m data_tools.tokenize_corpus`"
