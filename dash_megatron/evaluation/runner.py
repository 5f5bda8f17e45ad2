"""Compute what is missing, a line of results at a time, and sum it up."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from dash_megatron.evaluation.buckets import buckets
from dash_megatron.evaluation.jobs import JOBS, Job, TaskJob
from dash_megatron.evaluation.models import LanguageModel, ModelSource
from dash_megatron.evaluation.samples import LengthError
from dash_megatron.evaluation.settings import LOSS_TASKS, PERPLEXITY, Settings
from dash_megatron.evaluation.text import LocalText
from dash_megatron.files import write_whole
from dash_megatron.json_lines import strict_json

logger = logging.getLogger(__name__)

RESULTS = "results.json"


def evaluate(
    model: LanguageModel,
    text: LocalText,
    settings: Settings,
    output: Path,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a model; what an earlier call left in `output` is not computed again.

    Args:
        model: what is evaluated.
        text: what is scored, and what prompts are made of.
        settings: tasks, lengths and how much of each.
        output: folder for `<task>.jsonl`, with a line for each item, and `results.json`; made where it is missing. Both have null
            for a number that is not finite.
        report: called with a line of text for each task and length.

    Returns:
        What `results.json` has, with such numbers themselves.

    Raises:
        ValueError: a sample cannot be made, in which case nothing was computed.
    """
    jobs, left_out = _prepared_jobs(settings, model, text)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "trained_length": model.trained_length,
            "device": model.device.type,
            "rope_scaling": model.rope_scaling and model.rope_scaling.model_dump(exclude_none=True),
        },
        "text": text.name,
        "score": settings.score,
        "seed": settings.seed,
        "left_out": [str(why) for why in left_out],
        "tasks": {job.task: {} for job in jobs},
    }
    for why in left_out:
        report(f"left out: {why}")
    for job in jobs:
        begin = time.perf_counter()
        lines, computed = run_job(job, output / f"{job.task}.jsonl")
        summary = _sum_up_losses(job, lines) if job.task in LOSS_TASKS else _sum_up_scores(lines)
        # of the lines in the file, those with this key are of these settings
        results["tasks"][job.task][str(job.length)] = {**summary, "key": job.key}
        seconds = time.perf_counter() - begin
        report(
            f"{job.task:20} {job.length:8}  {_headline(summary)}  ({computed} of {len(lines)} computed, {seconds:.1f} s)"
        )
    write_whole(output / RESULTS, strict_json(results, indent=2) + "\n")
    return results


def check_samples(settings: Settings, source: ModelSource, text: LocalText) -> None:
    """Check that samples of every task and length can be made, before the weights of a model are read.

    Raises:
        ValueError: one cannot be made.
    """
    _prepared_jobs(settings, source, text)


def _prepared_jobs(
    settings: Settings, model: LanguageModel | ModelSource, text: LocalText
) -> tuple[list[Job], list[LengthError]]:
    """The jobs, and why others are left out: a task cannot have a length that nobody asked for. Whatever else is wrong is an error."""
    jobs, left_out = [], []
    for job in [
        JOBS.get(task, TaskJob)(task, length, settings, cast(LanguageModel, model), text)
        for task in settings.tasks
        for length in settings.lengths
    ]:
        try:
            job.prepare()
        except LengthError as error:
            left_out.append(error)
        else:
            jobs.append(job)
    if left_out and not (settings.only_fitting and jobs):
        raise left_out[0]
    return jobs, left_out


def run_job(job: Job, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Compute the items of a job that `path` does not have yet, and append them.

    Returns:
        The lines of all items, in the order of `Job.items`, and how many of them are new.
    """
    _cut_half_line(path)
    known = {(line["index"], line["depth"]): line for line in read_lines(path) if line["key"] == job.key}
    items = job.items()
    computed = 0
    with open(path, "a", encoding="utf-8") as file:
        for batch in job.batches(items):
            if all(item in known for item in batch):
                continue
            # all of a batch again: other company would change the last bits
            for item, result in zip(batch, job.compute(batch), strict=True):
                if item in known:
                    continue
                index, depth = item
                known[item] = {"key": job.key, "length": job.length, "index": index, "depth": depth, **result}
                file.write(strict_json(known[item]) + "\n")
                computed += 1
            file.flush()
    return [known[item] for item in items], computed


def _cut_half_line(path: Path) -> None:
    """Cut off the last line, if a process was killed over it."""
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of results, in which a loss that was not finite is NaN; none where there is no file."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and {"key", "index", "depth"} <= value.keys():
            lines.append(_with_nan(value))
        else:
            logger.warning("%s, line %d is damaged: skipped, and computed anew", path, number)
    return lines


def _with_nan(line: dict[str, Any]) -> dict[str, Any]:
    """A line with NaN for what it has null for: losses of a diverged model."""
    if "nll_sums" in line:
        return {**line, "nll_sums": [math.nan if loss is None else loss for loss in line["nll_sums"]]}
    return {**line, "nll": math.nan} if line.get("nll", 0.0) is None else line


def _sum_up_losses(job: Job, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all tokens, and by bucket of positions, without the buckets that no text reaches."""
    tokens = [line.get("tokens", job.length) for line in lines]
    found = []
    for number, (start, end) in enumerate(buckets(job.length)):
        count = sum(max(0, min(end, each) - start) for each in tokens)
        if count:
            total = sum(line["nll_sums"][number] for line in lines if number < len(line["nll_sums"]))
            found.append({"from": start, "to": end, "nll": total / count, "perplexity": _exp(total / count)})
    nll = sum(sum(line["nll_sums"]) for line in lines) / sum(tokens)
    unit = (
        {"windows": len(lines)}
        if job.task == PERPLEXITY
        else {"documents": len(lines), "tokens": sum(tokens)}
    )
    return {**unit, "nll": nll, "perplexity": _exp(nll), "buckets": found}


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def _sum_up_scores(lines: list[dict[str, Any]]) -> dict[str, Any]:
    summary = _mean(lines)
    depths = sorted({line["depth"] for line in lines if line["depth"] is not None})
    if depths:
        summary["depths"] = {
            f"{depth:.3f}": _mean([line for line in lines if line["depth"] == depth]) for depth in depths
        }
    return summary


def _mean(lines: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [line["score"] for line in lines]
    mean = sum(scores) / len(scores)
    found = {"samples": len(lines), "score": mean}
    if len(scores) > 1:
        spread = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
        found["standard_error"] = math.sqrt(spread / len(scores))
    if "nll" in lines[0]:
        found["nll"] = sum(line["nll"] for line in lines) / len(lines)
    return found


def _headline(summary: dict[str, Any]) -> str:
    nll = f"loss {summary['nll']:.3f}" if "nll" in summary else ""
    return f"score {summary['score']:.3f}  {nll}" if "score" in summary else nll
