"""Files with one line for each step, a JSON object, which survive kills, restarts and full disks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dash_megatron.files import write_whole
from dash_megatron.retry import retry


class JsonLines:
    """Appends lines to such a file, which is made with the first line.

    Args:
        path: the file.
        resumed_step: lines of later steps, which an earlier start wrote, are dropped.

    Raises:
        ValueError: a line before the last is damaged.
        OSError: the disk has been full, or away, for minutes.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path, self._size = path, 0
        if not path.exists():
            return
        kept = [line for line in read_json_lines(path) if line["step"] <= resumed_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        retry(lambda: write_whole(path, text), f"write {path}", path=path)
        self._size = len(text.encode())

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one object, which has a `step`.

        Raises:
            OSError: the disk has been full, or away, for minutes. What was written before is whole.
        """
        data = (json.dumps(line) + "\n").encode()
        retry(lambda: self._append(data), f"write {self.path}", path=self.path)
        self._size += len(data)

    def _append(self, data: bytes) -> None:
        with open(self.path, "r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.truncate()  # half a line of an attempt before
            file.write(data)


def read_json_lines(path: Path) -> list[Any]:
    """Read all objects; a last line cut short by a kill is skipped.

    Raises:
        ValueError: a line before the last is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON ({error}); remove the damaged line") from error
    return found
