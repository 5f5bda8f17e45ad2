"""The unit of work of tokenize_corpus: some input in, a finished shard of train and valid tokens out."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from dash_megatron.data.index_file import check_bin_size, read_index, read_lengths, token_dtype, write_index
from dash_megatron.data.sidecar import Sidecar, answers_path, describe, sidecar_path
from data_tools.atomic import TEMPORARY_SUFFIX, atomic_write, remove_files, sync_and_rename
from data_tools.documents import Document
from data_tools.encoding import Encoder, Tokens
from data_tools.readers import BadLine, Piece, read_piece, split_into_pieces

SPLITS = ("train", "valid")
# Raised whenever the same input and options would give other files.
_FORMAT = 1
# No more bad lines than these are kept of a shard; the run has failed long before, or does not care.
_MAX_REPORTS = 1000


@dataclass(frozen=True)
class Options:
    """What decides the contents of the output, besides the input itself."""

    tokenizer: str
    """Path of the model file."""
    fingerprint: str
    vocab_size: int
    eod: int
    text_key: str | None
    """None reads conversations, see `text_of`."""
    valid_fraction: float
    seed: int
    chat_template: str | None = None
    """Renders conversations; None where texts are read."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files of a split."""
        return (".bin", ".idx") if self.chat_template is None else (".bin", ".answers.bin", ".idx")


@dataclass(frozen=True)
class Unit:
    """Some pieces of the input, which become one shard."""

    number: int
    pieces: tuple[Piece, ...]
    key: str
    """Digest of all that decides the shard's contents: a finished shard with this key is not made again."""

    @property
    def num_bytes(self) -> int:
        """About how much input it is."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True)
class ShardReport:
    """What a finished shard holds, saved beside it as NNNNN.json."""

    key: str
    num_bytes: int
    documents: dict[str, int]
    """For train and valid."""
    tokens: dict[str, int]
    num_bad_lines: int
    bad_lines: list[str]
    """The first of them, as file:line: reason."""
    answers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Tokens of answers, for train and valid."""
    rendered: int = 0
    """Documents that the chat template rendered."""


def plan_units(paths: Sequence[str], options: Options, unit_bytes: int | None = None) -> list[Unit]:
    """Divide the input into units; the division depends on the input alone, not on the number of workers.

    Args:
        paths: files, in order.
        options: see `Options`.
        unit_bytes: input in a unit; None: a 256th of all, between 1 and 64 MB.
    """
    if unit_bytes is None:
        total = sum(os.path.getsize(path) for path in paths)
        unit_bytes = min(max(total // 256, 1_000_000), 64_000_000)
    groups: list[list[Piece]] = []
    room = 0
    for path in paths:
        for piece in split_into_pieces(path, unit_bytes):
            if room < piece.num_bytes or not groups:
                groups.append([])
                room = unit_bytes
            groups[-1].append(piece)
            room -= piece.num_bytes
    return [Unit(number, tuple(group), _key(group, options)) for number, group in enumerate(groups)]


def _key(pieces: Sequence[Piece], options: Options) -> str:
    inputs = []
    for piece in pieces:
        status = os.stat(piece.path)
        inputs.append(
            [os.path.abspath(piece.path), status.st_size, status.st_mtime_ns, piece.start, piece.stop]
        )
    # the fingerprint stands for the tokenizer, wherever its file lies
    decisive = {**asdict(options), "tokenizer": ""}
    if options.chat_template is None:
        del decisive["chat_template"]  # as before there were any
    values = [_FORMAT, inputs, decisive]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def goes_to_valid(text: bytes, valid_fraction: float, seed: int) -> bool:
    """Decide by the text itself, so that two copies of a document never lie on both sides."""
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") < valid_fraction * 2.0**64


class _SplitWriter:
    """The files of one split, under temporary names until `finish`."""

    def __init__(self, prefix: Path, dtype: np.dtype, suffixes: Sequence[str], stack: ExitStack) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.suffixes = suffixes
        self.lengths: list[int] = []
        self.answers = self.rendered = 0
        self._files: dict[str, IO[bytes]] = {
            suffix: stack.enter_context(self._temporary(suffix).open("wb"))
            for suffix in suffixes
            if suffix != ".idx"
        }

    def add(self, tokens: Tokens) -> None:
        self._files[".bin"].write(np.asarray(tokens.ids, dtype=self.dtype).tobytes())
        self.lengths.append(len(tokens.ids))
        if tokens.answers is not None:
            self._files[".answers.bin"].write(bytes(tokens.answers))
            self.answers += sum(tokens.answers)
        self.rendered += tokens.rendered

    def finish(self) -> None:
        for file in self._files.values():
            file.close()
        write_index(self._temporary(".idx"), np.asarray(self.lengths, dtype=np.int32), self.dtype)
        for suffix in self.suffixes:
            sync_and_rename(self._temporary(suffix), Path(f"{self.prefix}{suffix}"))

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}{TEMPORARY_SUFFIX}")


def shard_prefix(folder: Path, unit: Unit, split: str) -> Path:
    """Give folder/NNNNN.train or folder/NNNNN.valid."""
    return folder / f"{unit.number:05d}.{split}"


def _report_path(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.number:05d}.json"


def tokenize_unit(
    unit: Unit, folder: Path, encode: Encoder, options: Options, max_bad_lines: int
) -> ShardReport:
    """Tokenise a unit and save its shard, the report last.

    Args:
        unit: what to read.
        folder: where the shards are.
        encode: of the tokenizer and chat template that `options` describe.
        options: see `Options`.
        max_bad_lines: with more than these the shard is given up and not saved.

    Returns:
        The report; where `num_bad_lines` exceeds `max_bad_lines` it is that of the lines read so far.
    """
    dtype = token_dtype(options.vocab_size)
    bad_lines: list[str] = []
    num_bad_lines = 0
    with ExitStack() as stack:
        writers = {
            split: _SplitWriter(shard_prefix(folder, unit, split), dtype, options.suffixes, stack)
            for split in SPLITS
        }
        for item in (item for piece in unit.pieces for item in read_piece(piece, options.text_key)):
            found = _encode(item, encode)
            if isinstance(found, str):
                num_bad_lines += 1
                if len(bad_lines) < _MAX_REPORTS:
                    bad_lines.append(found)
                if num_bad_lines > max_bad_lines:
                    break
                continue
            text, tokens = found
            split = "valid" if goes_to_valid(text, options.valid_fraction, options.seed) else "train"
            writers[split].add(tokens)
        report = ShardReport(
            key=unit.key,
            num_bytes=unit.num_bytes,
            documents={split: len(writer.lengths) for split, writer in writers.items()},
            tokens={split: sum(writer.lengths) for split, writer in writers.items()},
            num_bad_lines=num_bad_lines,
            bad_lines=bad_lines,
            answers={split: writer.answers for split, writer in writers.items()},
            rendered=sum(writer.rendered for writer in writers.values()),
        )
        if num_bad_lines <= max_bad_lines:
            # an older shard's report must not vouch for these files, should the run be killed among them
            _report_path(folder, unit).unlink(missing_ok=True)
            for writer in writers.values():
                writer.finish()
            with atomic_write(_report_path(folder, unit)) as file:
                json.dump(asdict(report), file)
    return report


def _encode(item: Document | BadLine, encode: Encoder) -> tuple[bytes, Tokens] | str:
    """A document's text and tokens, or what is wrong with it and where it is from."""
    if isinstance(item, BadLine):
        return str(item)
    try:
        return item.text.encode("utf-8"), encode(item.text)
    except ValueError as error:
        return f"{item.source}: {error}"


def finished_report(unit: Unit, folder: Path) -> ShardReport | None:
    """Give the report of a unit's shard if it is there, whole, and of the same input and options."""
    try:
        report = ShardReport(**json.loads(_report_path(folder, unit).read_text(encoding="utf-8")))
        for split in SPLITS:
            prefix = shard_prefix(folder, unit, split)
            index = read_index(prefix)
            check_bin_size(prefix, index)
            marks = answers_path(prefix)
            if marks.is_file() and marks.stat().st_size != index.tokens:
                return None
    except (OSError, ValueError, TypeError):
        return None
    return report if report.key == unit.key else None


def merge_split(
    units: Sequence[Unit], folder: Path, output: Path, split: str, options: Options, rendered: bool
) -> Sidecar:
    """Concatenate the shards of a split into OUTPUT/SPLIT.bin and the files beside it, and write the sidecar.

    The old sidecar goes first and the new one comes last: at no moment does a sidecar stand beside data it
    does not describe. It keeps the chat template where that `rendered` any document.
    """
    prefix = output / split
    paths = {suffix: Path(f"{prefix}{suffix}") for suffix in options.suffixes}
    temporary = {suffix: path.with_name(path.name + TEMPORARY_SUFFIX) for suffix, path in paths.items()}
    shards = [shard_prefix(folder, unit, split) for unit in units]
    for suffix in paths:
        if suffix == ".idx":
            lengths = [np.array(read_lengths(shard)[0]) for shard in shards]
            write_index(temporary[suffix], np.concatenate(lengths), token_dtype(options.vocab_size))
            continue
        with open(temporary[suffix], "wb") as merged:
            for shard in shards:
                with open(f"{shard}{suffix}", "rb") as file:
                    shutil.copyfileobj(file, merged, 1 << 22)
    sidecar_path(prefix).unlink(missing_ok=True)
    answers_path(prefix).unlink(missing_ok=True)
    for suffix, path in paths.items():
        sync_and_rename(temporary[suffix], path)
    sidecar = describe(
        prefix,
        tokenizer_fingerprint=options.fingerprint,
        vocab_size=options.vocab_size,
        eod=options.eod,
        chat_template=options.chat_template if rendered else None,
    )
    sidecar.write(prefix)
    return sidecar


def remove_shards(folder: Path) -> None:
    """Remove all shards, and the folder if nothing else is in it."""
    parts = [f"{split}.{end}" for split in SPLITS for end in ("bin", "answers.bin", "idx")]
    remove_files(folder, *(f"[0-9]*.{part}" for part in [*parts, "json"]))
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_split(output: Path, split: str) -> None:
    """Remove the files of a split that an earlier run with other options left."""
    names = (f"{split}.{end}" for end in ("idx", "answers.bin", "bin"))
    remove_files(output, sidecar_path(output / split).name, *names)


def progress_of(reports: Sequence[ShardReport]) -> Iterator[tuple[str, Any]]:
    """Sum up reports: the totals that a run prints and its manifest keeps."""
    for split in SPLITS:
        yield f"{split}_documents", sum(report.documents[split] for report in reports)
        yield f"{split}_tokens", sum(report.tokens[split] for report in reports)
        yield f"{split}_answer_tokens", sum(report.answers[split] for report in reports)
    yield "rendered_documents", sum(report.rendered for report in reports)
    yield "bad_lines", sum(report.num_bad_lines for report in reports)
