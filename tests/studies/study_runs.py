"""Studies of a small model, and what their finished and evaluated runs leave."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dash_megatron.studies.runs import StudyRun, expand
from dash_megatron.studies.study_file import load_study

STUDIES = Path(__file__).parents[2] / "studies"
BASE = {
    "run_dir": "runs/unused",
    "model": {
        "layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 96, "vocab_size": 320,
    },
    "attention": {"chunk_size": 16},
    "data": {"seq_length": 128},
    "training": {"steps": 10, "global_batch": 4},
    "checkpoint": {"every": 5},
}  # fmt: skip
SIZES = [{"name": f"h{width}", "model.hidden_size": width} for width in (32, 64, 128, 256)]
Write = Callable[..., Path]


def runs_of(path: Path) -> list[StudyRun]:
    return expand(load_study(path))


def finish(run: StudyRun, loss: float, density: float | None) -> None:
    """Leave what a finished run would."""
    layers = run.config.model.layers
    per_layer = [density] * layers
    available = (run.context - 0.5) / 16 + 0.5
    lines = [
        {
            "step": step,
            "tokens": step * run.tokens // run.config.training.steps,
            "loss": loss + 1 / step,
            "valid_loss": loss,
            "valid_loss_by_position": [
                {"from": 0, "to": 64, "loss": loss + 1},
                {"from": 64, "to": 128, "loss": loss - 1},
            ],
            "density": density,
            "density_per_layer": per_layer,
            "chunks_selected_per_layer": [None if d is None else d * available for d in per_layer],
            "tokens_per_second": 1000.0,
            "skipped": 0,
        }
        for step in np.linspace(1, run.config.training.steps, 10, dtype=int).tolist()
    ]
    checkpoint = run.folder / "checkpoints" / f"step_{run.config.training.steps:08d}"
    checkpoint.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated(run.folder, "step", {"copy": {64: 0.5, 128: 0.25}, "niah_single": {64: 1.0}})
    summary = {"windows": 4, "nll": loss, "perplexity": math.exp(loss)}
    results = {"model": {}, "tasks": {"perplexity": {"64": summary, "128": summary}}}
    (run.folder / "evaluation" / "text").mkdir()
    (run.folder / "evaluation" / "text" / "results.json").write_text(json.dumps(results))


def evaluated(run_dir: Path, name: str, scores: dict[str, dict[int, float]], **model: Any) -> Path:
    """Leave what `evaluate` would."""
    tasks = {
        task: {str(length): {"samples": 4, "score": score} for length, score in found.items()}
        for task, found in scores.items()
    }
    path = run_dir / "evaluation" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": {"rope_scaling": None, **model}, "tasks": tasks}))
    return path


def finish_branch(run: StudyRun, name: str, extra: float, score: float) -> None:
    """Leave what a trained and evaluated branch would: losses of 30 documents of up to 256 tokens, and 16 answers.

    Args:
        run: the branch.
        name: of the evaluation.
        extra: nats a token above what documents share, growing with the position.
        score: share of answers that are right.
    """
    finish(run, 3.0 + extra, None if run.config.attention.kind == "full" else 0.25)
    order = run.config.training.seed
    noise = np.random.default_rng(order + 100 * len(run.variant)).normal(0, 0.02, (30, 3))
    shared = np.random.default_rng(0)
    tokens = shared.integers(20, 257, 30).tolist()
    hard = shared.normal(3.0, 0.5, 30)
    starts, ends = (0, 64, 128), (64, 128, 256)
    documents = [
        {
            "key": "k256", "length": 256, "index": n, "depth": None, "tokens": count,
            "nll_sums": [
                (hard[n] + extra * (1 + part) + noise[n, part]) * (min(end, count) - start)
                for part, (start, end) in enumerate(zip(starts, ends, strict=True))
                if start < count
            ],
        }
        for n, count in enumerate(tokens)
    ]  # fmt: skip
    answers = [
        {
            "key": f"k{length}",
            "length": length,
            "index": n,
            "depth": None,
            "score": float(n < 16 * score * 64 / length),
        }
        for length in (64, 128)
        for n in range(16)
    ]
    found = {"documents": documents, "niah_single": answers}
    folder = run.folder / "evaluation" / name
    folder.mkdir(parents=True)
    for task, lines in found.items():
        # what an earlier evaluation with other settings left
        stale = [{**lines[0], "key": "other", "index": 99}]
        text = "".join(json.dumps(line) + "\n" for line in stale + lines)
        (folder / f"{task}.jsonl").write_text(text)
    lengths = {task: {line["length"] for line in lines} for task, lines in found.items()}
    tasks = {task: {str(x): {"key": f"k{x}"} for x in sorted(known)} for task, known in lengths.items()}
    (folder / "results.json").write_text(json.dumps({"model": {}, "tasks": tasks}))


def law(parameters: Any, tokens: Any) -> Any:
    return 1.7 + 400 * parameters**-0.34 + 410 * tokens**-0.28
