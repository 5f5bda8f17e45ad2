"""Turn a corpus into Megatron .bin/.idx files, train and validation, split by document.

    python -m data_tools.tokenize_corpus --input data/corpus --tokenizer data/tokenizer.model --output data
    python -m data_tools.tokenize_corpus --input chats.jsonl --conversations --tokenizer data/tokenizer.model --output data/chats

A run that was killed goes on where it was: finished shards are not made again, nor is a finished run.
"""

import argparse
import concurrent.futures
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dash_megatron.data.chat import ChatTemplate, read_template
from dash_megatron.data.tokenizer import Tokenizer
from data_tools.arguments import add_input, add_max_bad_lines, add_text_key, make_parser, run
from data_tools.atomic import MANIFEST, atomic_write, check_no_other_manifest, sole_writer
from data_tools.encoding import Encoder, make_encoder
from data_tools.readers import BadLineCounter, find_inputs, warn_of_unread_files
from data_tools.shards import (
    SPLITS,
    Options,
    ShardReport,
    Unit,
    finished_report,
    merge_split,
    plan_units,
    progress_of,
    remove_shards,
    remove_split,
    tokenize_unit,
)

# where validation has no more tokens than the rows of most configs, and so may have no row
SHORT_VALIDATION = 16384

SHARDS = "shards"


def tokenize_corpus(
    inputs: Sequence[str],
    tokenizer_path: Path,
    output: Path,
    *,
    valid_fraction: float = 0.02,
    seed: int = 0,
    workers: int | None = None,
    text_key: str = "text",
    conversations: bool = False,
    chat_template: Path | None = None,
    shard_mb: float | None = None,
    max_bad_lines: int = 0,
) -> dict[str, Any]:
    """Tokenise and give the run's manifest; arguments as on the command line.

    Of conversations the answers alone are marked to be learnt: PREFIX.answers.bin has a byte for each token.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: an argument breaks a rule, another process writes to the output, the input is damaged or has too many
            bad lines, or a split is empty.
        RuntimeError: a worker process died.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_arguments(valid_fraction, seed, workers, shard_mb)
    check_no_other_manifest(output, "key")
    tokenizer = Tokenizer(tokenizer_path)
    template = _find_template(tokenizer, chat_template) if conversations else None
    if chat_template is not None and not conversations:
        raise ValueError(f"--chat-template={chat_template} must come with --conversations, which it renders")
    options = Options(
        tokenizer=str(tokenizer_path),
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        text_key=None if conversations else text_key,
        valid_fraction=valid_fraction,
        seed=seed,
        chat_template=template,
    )
    warn_of_unread_files(inputs, options.text_key)
    units = plan_units(
        find_inputs(inputs, options.text_key),
        options,
        None if shard_mb is None else max(1, int(shard_mb * 1e6)),
    )
    run_key = hashlib.sha256("".join(unit.key for unit in units).encode()).hexdigest()
    folder = output / SHARDS
    finished = _finished_manifest(output, run_key)
    if finished is not None:
        print(f"{output} is complete: nothing to do", file=sys.stderr)
        if folder.is_dir():  # of a run that was killed in its last moment
            with sole_writer(output):
                remove_shards(folder)
        return finished

    with sole_writer(output):
        folder.mkdir(exist_ok=True)
        reports = _tokenize_units(units, folder, options, workers, max_bad_lines)
        totals = dict(progress_of(reports))
        _check_splits(totals, valid_fraction)
        if not conversations:  # whose rows are filled up
            _warn_of_short_validation(totals, valid_fraction)
        return _merge(units, output, options, {"key": run_key, **totals})


def _check_arguments(valid_fraction: float, seed: int, workers: int, shard_mb: float | None) -> None:
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"--valid-fraction={valid_fraction} must be at least 0 and below 1, such as 0.02")
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed={seed} must lie in [0, 2**64); pick a smaller one")
    if workers < 1:
        raise ValueError(f"--workers={workers} must be at least 1; leave it out to use all cores")
    if shard_mb is not None and not 0 < shard_mb < math.inf:
        raise ValueError(f"--shard-mb={shard_mb} must be above 0 and finite; leave it out to have it chosen")


def _find_template(tokenizer: Tokenizer, chat_template: Path | None) -> str:
    """The text of the template, which is tried before anything is read."""
    text, source = read_template(tokenizer.path, chat_template)
    return ChatTemplate(text, tokenizer, source).text


def _finished_manifest(output: Path, run_key: str) -> dict[str, Any] | None:
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("key") != run_key:
        return None
    whole = all((output / name).is_file() for name in manifest["files"])
    return manifest if whole else None


def _tokenize_units(
    units: list[Unit], folder: Path, options: Options, workers: int, max_bad_lines: int
) -> list[ShardReport]:
    """Make the shards that are not there yet, and give the reports of all, in any order."""
    bad_lines = BadLineCounter(max_bad_lines)
    reports: dict[int, ShardReport] = {}
    for unit in units:
        report = finished_report(unit, folder)
        if report is not None:
            reports[unit.number] = report
    waiting = [unit for unit in units if unit.number not in reports]
    if reports:
        print(f"resuming: {len(reports)} of {len(units)} shards are finished", file=sys.stderr)
    for report in reports.values():
        _count_bad_lines(report, bad_lines)

    start, new_tokens = time.monotonic(), 0
    total = sum(unit.num_bytes for unit in units)
    done = sum(report.num_bytes for report in reports.values())
    with tqdm(
        total=total, initial=done, unit="B", unit_scale=True, desc="tokenize", mininterval=0.5
    ) as progress:
        for unit, report in _run(waiting, folder, options, min(workers, len(waiting)), max_bad_lines):
            _count_bad_lines(report, bad_lines)
            reports[unit.number] = report
            new_tokens += sum(report.tokens.values())
            rate = new_tokens / max(1e-9, time.monotonic() - start)
            progress.set_postfix_str(f"{tqdm.format_sizeof(rate)} tokens/s", refresh=False)
            progress.update(unit.num_bytes)
    return list(reports.values())


def _count_bad_lines(report: ShardReport, bad_lines: BadLineCounter) -> None:
    for text in report.bad_lines:
        bad_lines.add(text)
    for _ in range(report.num_bad_lines - len(report.bad_lines)):
        bad_lines.add("(not listed)")


def _run(
    units: list[Unit], folder: Path, options: Options, workers: int, max_bad_lines: int
) -> Iterator[tuple[Unit, ShardReport]]:
    """Yield the units' reports as they come in."""
    if workers <= 1:
        encode = make_encoder(Tokenizer(options.tokenizer), options.chat_template)
        for unit in units:
            yield unit, tokenize_unit(unit, folder, encode, options, max_bad_lines)
        return
    # spawn: a forked copy of whatever the caller runs, with its threads' locks, is no safe place to work in
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(options, folder, max_bad_lines),
    )
    try:
        futures = {pool.submit(_work, unit): unit for unit in units}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a tokenising process died, perhaps for lack of memory; run the same command again, with "
            "smaller --workers: finished shards are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_arguments: tuple[Path, Encoder, Options, int]


def _start_worker(options: Options, folder: Path, max_bad_lines: int) -> None:
    global _worker_arguments
    encode = make_encoder(Tokenizer(options.tokenizer), options.chat_template)
    _worker_arguments = (folder, encode, options, max_bad_lines)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    # the pool's workers would wait for ever for a parent that was killed
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _work(unit: Unit) -> ShardReport:
    return tokenize_unit(unit, *_worker_arguments)


def _check_splits(totals: dict[str, Any], valid_fraction: float) -> None:
    documents = totals["train_documents"] + totals["valid_documents"]
    if documents == 0:
        raise ValueError(
            "--input must hold documents, but has none with text: the corpus is empty; check the files"
        )
    if totals["train_documents"] == 0:
        raise ValueError(
            f"--valid-fraction={valid_fraction} must leave documents to train on, but all {documents} fell "
            "to validation; lower it, give more documents or try another --seed"
        )
    if valid_fraction > 0 and totals["valid_documents"] == 0:
        raise ValueError(
            f"--valid-fraction={valid_fraction} must give a document to validation, but none of {documents} "
            f"fell to it; raise it to {_fraction_for(5, documents)}, give more documents, try another --seed, or set it to 0 and "
            "train with data.valid=[] evaluation.every=0"
        )


def _fraction_for(wanted: int, total: int) -> float:
    """The fraction that gives so many of all documents or tokens to validation in the mean, rounded up; a half at most."""
    return min(0.5, math.ceil(100 * wanted / total) / 100)


def _warn_of_short_validation(totals: dict[str, Any], valid_fraction: float) -> None:
    """Tell of validation data that may be shorter than a row, which training would refuse."""
    documents, tokens = totals["valid_documents"], totals["valid_tokens"]
    if valid_fraction == 0 or tokens > SHORT_VALIDATION:
        return
    # twice as many, since documents fall as they do
    raised = _fraction_for(2 * (SHORT_VALIDATION + 1), totals["train_tokens"] + tokens)
    remedy = "" if raised <= valid_fraction else f"; --valid-fraction={raised} gives more"
    print(
        f"warning: --valid-fraction={valid_fraction} leaves {documents} of {documents + totals['train_documents']} documents to "
        f"validation, {tokens} tokens, and training needs more than data.seq_length: give more text, or train with at most "
        f"data.seq_length={tokens - 1}{remedy}",
        file=sys.stderr,
    )


def _merge(units: list[Unit], output: Path, options: Options, manifest: dict[str, Any]) -> dict[str, Any]:
    """Merge the shards, write the manifest, and remove the shards, in this order."""
    (output / MANIFEST).unlink(missing_ok=True)
    splits: Iterable[str] = SPLITS if options.valid_fraction > 0 else SPLITS[:1]
    files = []
    for split in SPLITS:
        if split not in splits:
            remove_split(output, split)
            continue
        rendered = manifest["rendered_documents"] > 0
        sidecar = merge_split(units, output / SHARDS, output, split, options, rendered)
        manifest[f"{split}_unigram_entropy_nats"] = sidecar.unigram_entropy_nats
        files += [*(f"{split}{suffix}" for suffix in options.suffixes), f"{split}.idx.json"]
    manifest = {**manifest, "tokenizer_fingerprint": options.fingerprint, "files": files}
    with atomic_write(output / MANIFEST) as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
    remove_shards(output / SHARDS)
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = make_parser("tokenize_corpus", __doc__)
    add_input(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="model file of train_tokenizer, or a tokenizer.json of Hugging Face, beside its tokenizer_config.json",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for train and valid .bin, .idx, .idx.json"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.02, help="documents for validation (default: 0.02)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which documents those are (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    add_text_key(parser)
    parser.add_argument(
        "--conversations",
        action="store_true",
        help="read `messages`, or `prompt` and `completion`, of which the answers alone are learnt",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja that renders `messages` (default: the one beside the tokenizer, else a plain one)",
    )
    parser.add_argument(
        "--shard-mb", type=float, help="input in a shard (default: a 256th of it, 1 to 64 MB)"
    )
    add_max_bad_lines(parser)
    return run(parser, arguments, _tokenize, (ValueError, OSError, RuntimeError))


def _tokenize(options: argparse.Namespace) -> str:
    start = time.monotonic()
    manifest = tokenize_corpus(
        options.input,
        options.tokenizer,
        options.output,
        valid_fraction=options.valid_fraction,
        seed=options.seed,
        workers=options.workers,
        text_key=options.text_key,
        conversations=options.conversations,
        chat_template=options.chat_template,
        shard_mb=options.shard_mb,
        max_bad_lines=options.max_bad_lines,
    )
    splits = []
    for split in SPLITS:
        text = f"{split} {manifest[f'{split}_documents']} documents, {manifest[f'{split}_tokens']} tokens"
        if options.conversations:
            text += f", {manifest[f'{split}_answer_tokens']} of them in answers"
        splits.append(text)
    return f"{options.output}: {'; '.join(splits)}; {manifest['bad_lines']} bad lines; {time.monotonic() - start:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
