"""Evaluate a run or an exported folder, and draw the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dash_megatron.config import RopeScaling
from dash_megatron.evaluation.models import LanguageModel, open_model
from dash_megatron.evaluation.pictures import draw
from dash_megatron.evaluation.runner import RESULTS, evaluate
from dash_megatron.evaluation.settings import Settings
from dash_megatron.evaluation.text import LocalText, tokens_for_lines


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
        settings: without lengths: a quarter, half and all of the length of training.
        text: file with text; None: `data`.
        data: prefixes of `.bin/.idx` pairs; none: the run's validation data.
        output: folder for results; None: `RUN/evaluation/step_...`, with the type of `rope_scaling` behind it, or
            `FOLDER.evaluation` beside an export.

    Returns:
        The path of the JSON file with the results; the pictures are beside it.

    Raises:
        FileNotFoundError: a model or a file is missing.
        ValueError: an argument breaks a rule; see `Settings`, `open_model`, `LocalText` and `evaluate`.
    """
    if text is not None and data:
        raise ValueError("--text and --data exclude each other; give one")
    with open_model(source, step, rope_scaling) as model:
        if not settings.lengths:
            whole = model.trained_length
            settings = replace(settings, lengths=(whole // 4, whole // 2, whole))
        found = _open_text(model, max(settings.lengths), text, data)
        folder = Path(output) if output else _default_output(Path(source), model)
        results = evaluate(model, found, settings, folder, lambda line: print(line, flush=True))
    for path in draw(results, folder):
        print(path)
    return folder / RESULTS


def _open_text(model: LanguageModel, longest: int, text: str | None, data: Sequence[str]) -> LocalText:
    num_tokens = tokens_for_lines(longest)
    if text is not None:
        return LocalText.from_file(text, model.tokenizer, num_tokens)
    prefixes = list(data) or model.data
    if not prefixes:
        raise ValueError(f"{model.name} names no validation data; give --text FILE or --data PREFIX")
    return LocalText.from_data(prefixes, model.tokenizer, num_tokens)


def _default_output(source: Path, model: LanguageModel) -> Path:
    step = re.search(r" step (\d+)$", model.name)
    if step and (source / "checkpoints").is_dir():
        # results of another RoPE are kept apart
        scaling = model.rope_scaling
        other = "" if scaling is None else f"_{scaling.rope_type}_{scaling.factor or 1:g}"
        return source / "evaluation" / f"step_{int(step.group(1)):08d}{other}"
    return source.with_name(f"{source.name}.evaluation")
