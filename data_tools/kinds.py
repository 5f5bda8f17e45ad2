"""Kinds of input files, told from their names."""

import os
from typing import NamedTuple

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
COMPRESSION_SUFFIXES = (".gz", ".zst")
_SUFFIXES = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
SUPPORTED = (
    f"text files ({' '.join(sorted(TEXT_SUFFIXES))}), .jsonl, .ndjson and .json, all of them also with .gz or .zst, "
    ".parquet, .arrow and .feather"
)


class Kind(NamedTuple):
    """What a file is, by its name."""

    format: str
    """Format of what is in it: text, jsonl, json, parquet or arrow."""
    compression: str
    """The suffix of a compressed file, or nothing."""


def kind_of(path: str) -> Kind | None:
    """Tell what a file is from its name; None where nothing reads it."""
    name = os.path.basename(path).lower()
    stem, compression = os.path.splitext(name)
    if compression not in COMPRESSION_SUFFIXES:
        stem, compression = name, ""
    found = _SUFFIXES.get(os.path.splitext(stem)[1])
    if found is None or (compression and found in ("parquet", "arrow")):
        return None
    return Kind(found, compression)
