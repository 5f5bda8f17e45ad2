"""Files that may be compressed, as bytes and as lines."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from data_tools.kinds import kind_of

_MAX_WINDOW = 1 << 31
"""Largest window of zstd, in bytes: long-range matching (`--long=31`) needs it, and zstd's own limit is 2^27."""


@contextmanager
def naming_damaged_files(path: str) -> Iterator[None]:
    """Turn errors of decompressing into one that names the file.

    Raises:
        ValueError: the file is cut short, damaged, or not compressed.
    """
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole compressed file ({error}); copy it again") from error


def read_whole(path: str) -> bytes:
    """Read a file, decompressed where its name says that it is compressed."""
    with naming_damaged_files(path):
        return b"".join(_blocks(path))


def read_lines(path: str) -> Iterator[bytes]:
    """Read the lines of a compressed file, without their ends."""
    rest: list[bytes] = []
    with naming_damaged_files(path):
        for block in _blocks(path):
            *lines, tail = block.split(b"\n")
            for line in lines:
                yield b"".join([*rest, line])
                rest = []
            rest.append(tail)
    if any(rest):
        yield b"".join(rest)


def _blocks(path: str) -> Iterator[bytes]:
    kind = kind_of(path)
    if kind is not None and kind.compression and not os.path.getsize(path):
        raise EOFError("it is empty, which no compressed file is")
    if kind is not None and kind.compression == ".zst":
        yield from _zstd_blocks(path)
        return
    with gzip.open(path, "rb") if kind is not None and kind.compression else open(path, "rb") as file:
        while block := file.read(io.DEFAULT_BUFFER_SIZE * 16):
            yield block


def _zstd_blocks(path: str) -> Iterator[bytes]:
    """Decompress frame after frame; unlike zstandard's stream reader this notices a file cut short."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
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
