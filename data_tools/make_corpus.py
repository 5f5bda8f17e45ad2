"""Gather documents from any input into JSONL shards and a manifest.

python -m data_tools.make_corpus --output data/corpus --stdlib
python -m data_tools.make_corpus --output data/corpus --input books/ crawl.jsonl.zst --text-key content
python -m data_tools.make_corpus --output data/corpus --input sources/ --join-folders
python -m data_tools.make_corpus --output data/corpus --input hf:HuggingFaceFW/fineweb-edu:sample-10BT --max-mb 5000
"""

import argparse
import ast
import hashlib
import json
import math
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.arguments import add_max_bad_lines, add_text_key, make_parser, run
from data_tools.atomic import (
    MANIFEST,
    TEMPORARY_SUFFIX,
    atomic_write,
    check_no_other_manifest,
    remove_files,
    sole_writer,
    sync_and_rename,
)
from data_tools.hub import PREFIX, hub_documents, parse_name
from data_tools.readers import (
    UNFINISHED,
    BadLineCounter,
    Document,
    find_inputs,
    read_folders,
    read_inputs,
    warn_of_unread_files,
)

SHARD_NAME = "corpus-{:05d}.jsonl"


def stdlib_documents(folder: Path | None = None) -> Iterator[Document]:
    """Read the modules of Python's standard library: each one's source, then its documentation strings.

    Nothing is imported. Files that are not UTF-8 (tests of other encodings) are skipped.

    Args:
        folder: default: the running Python's library.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if {"site-packages", "dist-packages", "__pycache__"} & set(name.parts):
            continue
        try:
            source = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not source.strip():
            continue
        docstrings = _docstrings(source)
        # one document, so that a split by document never has a text on one side and its source on the other
        text = "\n\n".join([source.rstrip("\n"), *docstrings]) + "\n"
        yield Document(text, f"stdlib/{name.as_posix()}")


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():
        # old modules have invalid escapes, which is none of our concern
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            # the library's tests hold some files that are wrong on purpose
            return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and _is_unicode(docstring):
                name = getattr(node, "name", None)
                found.append(f"{name}\n\n{docstring}" if name else docstring)
    return found


def _is_unicode(text: str) -> bool:
    # "\ud800" is a legal literal, and no UTF-8 text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class ShardWriter:
    """Write documents to corpus-00000.jsonl and so on, each file whole or not at all.

    Args:
        folder: where to write; it has to exist.
        shard_bytes: a shard is closed when it has this many bytes or more.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._written = 0
        self._digest = hashlib.sha256()

    def add(self, document: Document) -> None:
        """Append a document as one line."""
        if self._file is None:
            self._file = self._path(temporary=True).open("wb")
            self._written, self._digest = 0, hashlib.sha256()
        value = {"text": document.text, "source": document.source}
        # a source, and only it, may be the name of a file that is not UTF-8
        line = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self._file.write(line)
        self._digest.update(line)
        self._written += len(line)
        if self._written >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the shard under way, if there is one."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        path = self._path(temporary=False)
        sync_and_rename(self._path(temporary=True), path)
        self.shards.append({"name": path.name, "bytes": self._written, "sha256": self._digest.hexdigest()})

    def _path(self, temporary: bool) -> Path:
        name = SHARD_NAME.format(len(self.shards))
        return self.folder / (name + TEMPORARY_SUFFIX if temporary else name)


def make_corpus(
    output: Path,
    *,
    stdlib: bool = False,
    inputs: Sequence[str] = (),
    text_key: str = "text",
    join_folders: bool = False,
    shard_mb: float = 64.0,
    max_mb: float | None = None,
    max_bad_lines: int = 0,
) -> dict[str, Any]:
    """Write the corpus and give its manifest; arguments as on the command line.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: no input, no documents, damaged input, or too many bad lines, and no manifest is then written; or another
            process writes to the output.
    """
    if not stdlib and not inputs:
        raise ValueError(
            "--input is empty and must name files or folders, unless --stdlib is given; give either"
        )
    if not 0 < shard_mb < math.inf or (max_mb is not None and not max_mb > 0):
        raise ValueError(
            f"--shard-mb={shard_mb} and --max-mb={max_mb} must be numbers above 0; leave them out"
        )
    bad_lines = BadLineCounter(max_bad_lines)
    # before anything is written, so that a wrong argument leaves an earlier corpus alone
    check_no_other_manifest(output, "sources")
    files = _find_files(output, inputs, text_key)
    sources: list[tuple[str, Iterator[Document]]] = [("stdlib", stdlib_documents())] if stdlib else []
    read = read_folders if join_folders else read_inputs
    for entry in dict.fromkeys(inputs):
        if entry.startswith(PREFIX):
            sources.append((entry, hub_documents(entry, text_key, bad_lines)))
        else:
            sources.append((entry, read(files[entry], text_key, bad_lines)))
    with sole_writer(output):
        (output / UNFINISHED).touch()
        (output / MANIFEST).unlink(missing_ok=True)
        writer = ShardWriter(output, int(shard_mb * 1e6))
        counts = _write_documents(writer, sources, math.inf if max_mb is None else max_mb * 1e6)
        if not writer.shards:
            raise ValueError(
                f"the inputs must hold at least one document, but are empty but for {bad_lines.count} bad lines; check --input"
            )
        return _finish(output, writer.shards, counts, bad_lines.count)


def _find_files(output: Path, inputs: Sequence[str], text_key: str) -> dict[str, list[str]]:
    """The files of each input that is none of the hub, without those of the inputs before it."""
    files: dict[str, list[str]] = {}
    seen: set[str] = set()
    for entry in inputs:
        if entry.startswith(PREFIX):
            parse_name(entry)
            continue
        found = find_inputs([entry], text_key)
        files.setdefault(entry, [path for path in found if os.path.abspath(path) not in seen])
        seen.update(map(os.path.abspath, found))
    if any(Path(path).resolve().parent == output.resolve() for path in seen):
        raise ValueError(
            f"--output={output} must not hold the inputs, which it would overwrite; give another folder"
        )
    warn_of_unread_files(list(files), text_key)
    return files


def _write_documents(
    writer: ShardWriter, sources: Sequence[tuple[str, Iterator[Document]]], max_bytes: float
) -> dict[str, dict[str, int]]:
    """Write documents until they have `max_bytes` of text; gives the documents and bytes of each source."""
    counts: dict[str, dict[str, int]] = {}
    num_bytes = 0
    with tqdm(unit="B", unit_scale=True, desc="corpus", mininterval=1.0) as progress:
        for name, documents in sources:
            for document in documents:
                if num_bytes >= max_bytes:
                    break
                size = len(document.text.encode("utf-8"))
                writer.add(document)
                # the library's sources and its documentation strings are counted apart
                origin = document.source.partition("/")[0] if name == "stdlib" else name
                count = counts.setdefault(origin, {"documents": 0, "bytes": 0})
                count["documents"] += 1
                count["bytes"] += size
                num_bytes += size
                progress.update(size)
    writer.close()
    return counts


def _surplus(output: Path, num_shards: int) -> Iterator[int]:
    number = num_shards
    while (output / SHARD_NAME.format(number)).exists():
        yield number
        number += 1


def _finish(
    output: Path, shards: list[dict[str, Any]], counts: dict[str, dict[str, int]], bad_lines: int
) -> dict[str, Any]:
    """Drop the surplus shards of an earlier, larger corpus, and write the manifest."""
    remove_files(output, *(SHARD_NAME.format(number) for number in _surplus(output, len(shards))))
    manifest = {
        "documents": sum(count["documents"] for count in counts.values()),
        "bytes": sum(count["bytes"] for count in counts.values()),
        "bad_lines": bad_lines,
        "sources": counts,
        "shards": shards,
    }
    with atomic_write(output / MANIFEST) as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
    (output / UNFINISHED).unlink()
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = make_parser("make_corpus", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards and manifest.json")
    parser.add_argument("--stdlib", action="store_true", help="take in the Python standard library")
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders to search, or hf:NAME[:config][:split] of the Hugging Face hub",
    )
    add_text_key(parser)
    parser.add_argument(
        "--join-folders",
        action="store_true",
        help="make one document of the text files that lie in the same folder, for long contexts over sources",
    )
    parser.add_argument("--shard-mb", type=float, default=64.0, help="size of a shard (default: 64)")
    parser.add_argument("--max-mb", type=float, help="stop after this much text (default: take all)")
    add_max_bad_lines(parser)
    return run(parser, arguments, _make)


def _make(options: argparse.Namespace) -> str:
    manifest = make_corpus(
        options.output,
        stdlib=options.stdlib,
        inputs=options.input,
        text_key=options.text_key,
        join_folders=options.join_folders,
        shard_mb=options.shard_mb,
        max_mb=options.max_mb,
        max_bad_lines=options.max_bad_lines,
    )
    return (
        f"{options.output}: {manifest['documents']} documents, {manifest['bytes'] / 1e6:.1f} MB of text in "
        f"{len(manifest['shards'])} shards, {manifest['bad_lines']} bad lines"
    )


if __name__ == "__main__":
    sys.exit(main())
