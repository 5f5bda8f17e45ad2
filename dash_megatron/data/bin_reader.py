"""Read tokens from a .bin file, trying again while a file system is unavailable."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np

from dash_megatron.retry import retry


class BinReader:
    """Reads parts of a file at given offsets, from any number of threads, in place of Megatron's readers.

    Args:
        path: the .bin file; opened at the first read, or by `open`.
        seconds: for how long a failed read is tried again.
    """

    def __init__(self, path: str, seconds: float = 120.0) -> None:
        self.path = path
        self.seconds = seconds
        self._file: int | None = None

    def open(self) -> int:
        """Open the file, unless it is open; gives its descriptor.

        Raises:
            OSError: it cannot be opened.
        """
        file = self._file
        if file is None:
            # two threads may both open the file; the handle that loses stays open, which does no harm
            file = self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return file

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        """Read `count` numbers of type `dtype`, starting at byte `offset`.

        Raises:
            OSError: the file cannot be read, or ends before the last number.
        """
        numbers = np.empty(count, dtype=dtype)
        if count:
            retry(
                lambda: self._fill(numbers.data.cast("B"), offset),
                f"read {numbers.nbytes} bytes at {offset} of {self.path}",
                self.seconds,
                self.path,
            )
        return numbers

    def _fill(self, buffer: memoryview, offset: int) -> None:
        file = self.open()
        try:
            done = 0
            while done < len(buffer):
                read = os.preadv(file, [buffer[done:]], offset + done)
                if not read:
                    raise OSError(
                        errno.EINVAL,
                        f"the file ends at byte {offset + done}, although it was whole at the start of the run: "
                        "restore it, or tokenize the corpus again",
                    )
                done += read
        except OSError:
            # a handle from before a file system went away stays broken; another thread may still use it, so it stays open
            self._file = None
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "seconds": self.seconds, "_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
