"""Files with one line for each step, a strict JSON object, which survive kills, restarts and full disks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dash_megatron.files import write_whole
from dash_megatron.retry import retry

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends lines to such a file, which is made with the first line.

    Args:
        path: the file. Damaged lines that it has are moved to a file beside it, whose name ends with `.damaged`.
        resumed_step: lines of later steps, which an earlier start wrote, are dropped. Where that is all of them, as in a run
            that begins anew, they are added to a file beside it, whose name ends with `.earlier`.
        keys: what every line has beside `step`; one that lacks any is damaged.

    Raises:
        OSError: the disk has been full, or away, for minutes.
    """

    def __init__(self, path: Path, resumed_step: int, keys: Collection[str] = ()) -> None:
        self.path, self._size = path, 0
        self.last_dropped: int | None = None
        """The last step whose line was dropped."""
        if not path.exists():
            return
        before = path.read_bytes()
        kept: list[bytes] = []
        later: list[bytes] = []
        damaged: list[_Line] = []
        for line in _lines(before, keys):
            if line.value is None:
                damaged.append(line)
                continue
            # its text as it is: after weeks of steps, all lines take minutes to be made anew, for which every process waits
            text, step = _strict(line), line.value["step"]
            if step <= resumed_step:
                kept.append(text)
            else:
                later.append(text)
                self.last_dropped = max(step, self.last_dropped or 0)
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            _tell(path, damaged, f"; moved to {aside.name}")
            retry(lambda: _append_bytes(aside, [line.text for line in damaged]), f"write {aside}", path=aside)
        if later and not kept:
            earlier = path.with_name(f"{path.name}.earlier")
            retry(lambda: _append_bytes(earlier, later), f"write {earlier}", path=earlier)
        after = b"".join(line + b"\n" for line in kept)
        if after != before:
            retry(lambda: write_whole(path, after.decode()), f"write {path}", path=path)
        self._size = len(after)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one object, which has a `step`; for numbers that are not finite it holds null.

        Raises:
            OSError: the disk has been full, or away, for minutes. What was written before is whole.
        """
        data = (strict_json(line) + "\n").encode()
        retry(lambda: self._append(data), f"write {self.path}", path=self.path)
        self._size += len(data)

    def _append(self, data: bytes) -> None:
        with open(self.path, "r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.truncate()  # half a line of an attempt before
            file.write(data)


def strict_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, with null for each NaN or infinity in it, for which JSON has no number."""
    return json.dumps(_null_if_not_finite(value), indent=indent, allow_nan=False)


def _null_if_not_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_if_not_finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_null_if_not_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_lines(path: Path, keys: Collection[str] = ()) -> list[Any]:
    """Read all objects; a last line cut short by a kill is skipped, and so are damaged ones, of which a warning tells.

    Args:
        path: the file.
        keys: as in `JsonLines`.
    """
    lines = list(_lines(path.read_bytes(), keys))
    damaged = [line for line in lines if line.value is None]
    if damaged:
        _tell(path, damaged, "")
    return [line.value for line in lines if line.value is not None]


class _Line(NamedTuple):
    number: int
    """In the file, counted from 1."""
    text: bytes
    value: Any
    """The object; None of a damaged line."""


def _lines(data: bytes, keys: Collection[str]) -> Iterator[_Line]:
    """The lines that are not empty, but for a last one cut short."""
    *whole, rest = data.split(b"\n")
    for number, text in enumerate(whole, 1):
        if text:
            yield _Line(number, text, _object(text, keys))
    # without its newline a last line was cut short, unless only that is missing
    if (value := _object(rest, keys)) is not None:
        yield _Line(len(whole) + 1, rest, value)


def _strict(line: _Line) -> bytes:
    """The line's text, in which earlier releases may have written numbers that JSON does not have."""
    strict = b"NaN" not in line.text and b"Infinity" not in line.text
    return line.text if strict else strict_json(line.value).encode()


def _object(line: bytes, keys: Collection[str]) -> Any:
    try:
        value = json.loads(line.decode())  # json itself takes bytes that are no UTF-8
    except (ValueError, RecursionError):
        return None
    whole = isinstance(value, dict) and type(value.get("step")) is int and value.keys() >= set(keys)
    return value if whole else None


def _append_bytes(path: Path, lines: list[bytes]) -> None:
    with open(path, "ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))


def _tell(path: Path, damaged: list[_Line], then: str) -> None:
    logger.warning(
        "%s: %d damaged line(s) skipped, the first of them line %d%s",
        path,
        len(damaged),
        damaged[0].number,
        then,
    )
