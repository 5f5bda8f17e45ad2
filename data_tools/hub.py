"""Data sets of the Hugging Face hub, or folders that its `datasets` package loads, as a stream of documents."""

from collections.abc import Iterator
from typing import Any

from data_tools.documents import BadLine, BadLineCounter, Document

PREFIX = "hf:"
_SPLITS = ("train", "validation", "test")


def parse_name(entry: str) -> tuple[str, str | None, str]:
    """Take `hf:NAME[:config][:split]` apart; the split is `train` where none is given.

    Raises:
        ValueError: no name, or too many parts.
    """
    name, *rest = entry.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2:
        raise ValueError(
            f"--input={entry} must read hf:NAME, hf:NAME:CONFIG, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    if len(rest) == 1 and rest[0] in _SPLITS:
        return name, None, rest[0]
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or "train"


def hub_documents(entry: str, text_key: str, bad_lines: BadLineCounter) -> Iterator[Document]:
    """Stream the texts of a data set; nothing but its current part is kept on the disk.

    Raises:
        ValueError: the package `datasets` is missing, or cannot load it, or it has no column `text_key`.
        TooManyBadLines: see `BadLineCounter`.
    """
    rows = _open(entry, text_key)
    for number, row in enumerate(_naming_input(rows, entry), 1):
        text = row.get(text_key)
        if not isinstance(text, str):
            bad_lines.add(BadLine(entry, number, f"{text_key!r} is not a string but {type(text).__name__}"))
        elif text:
            yield Document(text, f"{entry}:{number}")


def _open(entry: str, text_key: str) -> Any:
    name, config, split = parse_name(entry)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--input={entry} needs the package datasets; install it with `pip install 'dash-megatron[hub]'`"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        columns = rows.column_names
    except Exception as error:  # of the network, the hub, the package or the data
        raise ValueError(f"--input={entry} cannot be loaded ({type(error).__name__}: {error})") from error
    if columns is not None and text_key not in columns:
        raise ValueError(
            f"--input={entry} has no column {text_key!r} (it has {', '.join(columns)}); set --text-key"
        )
    return rows


def _naming_input(rows: Any, entry: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # a consumer's errors do not come here
        raise ValueError(f"--input={entry} cannot be read on ({type(error).__name__}: {error})") from error
