"""Evaluate a run or an exported folder, and draw the results."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dash_megatron.config import Config, RopeScaling
from dash_megatron.data.tokenizer import load_tokenizer
from dash_megatron.evaluation.models import ModelSource, describe_run, describe_source, open_model
from dash_megatron.evaluation.pictures import draw
from dash_megatron.evaluation.runner import RESULTS, check_samples, evaluate
from dash_megatron.evaluation.settings import Settings
from dash_megatron.evaluation.text import LocalText, tokens_for_lines
from dash_megatron.files import lock


def evaluate_source(
    source: str,
    settings: Settings,
    *,
    step: int | None = None,
    rope_scaling: RopeScaling | None = None,
    text: str | None = None,
    data: Sequence[str] = (),
    output: str | None = None,
) -> Path:
    """Evaluate a run or an exported folder, telling on standard output how far it is.

    Args:
        source, step, rope_scaling: see `open_model`.
        settings: without lengths: a quarter, half and all of the length of training, of which a task leaves out those that it
            cannot have.
        text: file with text; None: `data`.
        data: prefixes of `.bin/.idx` pairs; none: the run's validation data.
        output: folder for results; None: `RUN/evaluation/step_...`, with the type of `rope_scaling` behind it, or
            `FOLDER.evaluation` beside an export.

    Returns:
        The path of the JSON file with the results; the pictures are beside it.

    Raises:
        FileNotFoundError: a model or a file is missing.
        ValueError: an argument breaks a rule, see `Settings`, `open_model`, `LocalText` and `evaluate`; or another process
            evaluates into the folder.
    """
    # all that can be wrong with the arguments is told before weights are read, which may take minutes
    known = describe_source(source, step, rope_scaling)
    folder = Path(output) if output else _default_output(known, rope_scaling)
    _check_output(folder)
    settings, found = _prepared(known, settings, text, data)
    with _only_one(folder), open_model(source, step, rope_scaling) as model:
        results = evaluate(model, found, settings, folder, lambda line: print(line, flush=True))
    for path in draw(results, folder):
        print(path)
    return folder / RESULTS


def check_run(
    config: Config,
    settings: Settings,
    *,
    rope_scaling: RopeScaling | None = None,
    text: str | None = None,
    data: Sequence[str] = (),
) -> None:
    """Refuse of a run that is not trained yet what `evaluate_source` would refuse of it before its weights are read.

    Raises:
        FileNotFoundError: the tokenizer or the text is not there, or not yet.
        ValueError: an argument breaks a rule; see `evaluate_source`.
    """
    tokenizer = load_tokenizer(config.data)
    _prepared(describe_run(Path(config.run_dir), config, tokenizer, None, rope_scaling), settings, text, data)


def _prepared(
    known: ModelSource, settings: Settings, text: str | None, data: Sequence[str]
) -> tuple[Settings, LocalText]:
    """The settings with lengths, and the text, of which all samples can be made."""
    if not settings.lengths:
        whole = known.trained_length
        settings = replace(settings, lengths=(whole // 4, whole // 2, whole), only_fitting=True)
    found = _open_text(known, max(settings.lengths), text, data)
    check_samples(settings, known, found)
    return settings, found


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold a folder of results, which is made where it is missing, against other evaluations."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "evaluate.lock", "a+", encoding="utf-8") as file:
        file.seek(0)
        owner = file.read() or "another process"
        held = f"{owner} evaluates into {folder}; wait for it, or choose another folder with --output"
        lock(file.fileno(), ValueError(held))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, "File exists", str(folder))
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "Permission denied", str(place))


def _open_text(known: ModelSource, longest: int, text: str | None, data: Sequence[str]) -> LocalText:
    if text is not None and data:
        raise ValueError("--text and --data exclude each other; give one")
    num_tokens = tokens_for_lines(longest)
    if text is not None:
        return LocalText.from_file(text, known.tokenizer, num_tokens)
    prefixes = list(data) or known.data
    if not prefixes:
        raise ValueError(f"{known.folder} names no validation data; give --text FILE or --data PREFIX")
    return LocalText.from_data(prefixes, known.tokenizer, num_tokens)


def _default_output(known: ModelSource, scaling: RopeScaling | None) -> Path:
    if known.step is None:
        return known.folder.with_name(f"{known.folder.name}.evaluation")
    # results of another RoPE are kept apart
    other = "" if scaling is None else f"_{scaling.rope_type}_{scaling.factor or 1:g}"
    return known.folder / "evaluation" / f"step_{known.step:08d}{other}"
