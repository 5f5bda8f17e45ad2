"""Condense a study's runs into one small JSON file: `python -m docs.tools.study_summary STUDY_FOLDER [...] --output FILE`.

The files of `docs/results/quality` are such summaries. They hold what the runs were trained with, what they came to, coarse
curves and mean evaluation scores; metrics of every step and scores of every sample stay with the runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dash_megatron.command_line import ending_with_reader
from dash_megatron.evaluation.settings import LOSS_TASKS
from dash_megatron.files import error_text
from dash_megatron.json_lines import strict_json
from dash_megatron.studies.collect import results_of
from dash_megatron.training.metrics import StepMetrics, read_metrics

# Points of a training curve: each is the mean over the steps logged since the last one.
CURVE_POINTS = 60
_MISSING = "<missing>"


def summarize(folders: Iterable[Path]) -> dict[str, Any]:
    """The summary of all runs in `<folder>/runs` of each folder, by the run's name.

    Returns:
        `config`: the settings that all runs share, by dotted key. `runs`: for each run that has logged a step the settings that
        differ (`config`), its `results`, its `curve`, its `validations` and its `evaluations`. `fits`: what `study fit` wrote,
        if it did.

    Raises:
        FileNotFoundError: a folder has no `runs`, or a run no config.
        ValueError: no run has logged a step, or two are called the same.
    """
    found = [path for folder in folders for path in sorted((folder / "runs").iterdir())]
    paths = [path for path in found if (path / "metrics.jsonl").is_file() and read_metrics(path)]
    if not paths:
        raise ValueError(
            "no run in the folders' `runs` has logged a step; give the `output` of a study that was trained"
        )
    configs: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path.name in configs:
            raise ValueError(f"two of the folders have a run {path.name}; make a summary of each")
        configs[path.name] = _flat(yaml.safe_load((path / "config.yaml").read_text()))
    first = next(iter(configs.values()))
    shared = {
        key: value
        for key, value in first.items()
        if all(config.get(key, _MISSING) == value for config in configs.values())
    }
    summary: dict[str, Any] = {"config": shared, "runs": {}}
    for path in paths:
        own = {key: value for key, value in configs[path.name].items() if key not in shared}
        summary["runs"][path.name] = {"config": own, **_summarize_run(path)}
    fits = [folder / "fits.json" for folder in folders if (folder / "fits.json").is_file()]
    if fits:
        summary["fits"] = json.loads(fits[0].read_text())
    return summary


def config_of(summary: dict[str, Any], run: str) -> dict[str, Any]:
    """The config that a run of a summary was trained with, as nested sections."""
    tree: dict[str, Any] = {}
    for key, value in {**summary["config"], **summary["runs"][run]["config"]}.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = copy.deepcopy(value)
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key; an empty section stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        # steps and layers are keys that are numbers, within one setting
        is_section = isinstance(value, dict) and value and all(isinstance(name, str) for name in value)
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def _summarize_run(path: Path) -> dict[str, Any]:
    lines = read_metrics(path)
    by_layer = {name: lines[-1][name] for name in ("density_per_layer", "scaling_factor_per_layer")}
    return {
        "results": _round({**results_of(lines), **by_layer}),
        "curve": _curve(lines),
        "validations": [_validation(line) for line in lines if line["valid_loss"] is not None],
        "evaluations": {
            folder.name: _evaluation(folder)
            for folder in sorted((path / "evaluation").glob("*"))
            if folder.is_dir()
        },
    }


def _curve(lines: Sequence[StepMetrics]) -> dict[str, list[Any]]:
    """Training loss and density by step, each the mean over the steps logged since the point before."""
    points = min(CURVE_POINTS, len(lines))
    bounds = [round(index * len(lines) / points) for index in range(points + 1)]
    parts = [lines[start:end] for start, end in pairwise(bounds)]
    return {
        "step": [part[-1]["step"] for part in parts],
        "loss": [_mean(line["loss"] for line in part) for part in parts],
        "density": [_mean(line["density"] for line in part) for part in parts],
    }


def _validation(line: StepMetrics) -> dict[str, Any]:
    """Loss over all positions and by position, and scores of tasks, as one step logged them."""
    by_position = line.get("valid_loss_by_position") or []
    return {
        "step": line["step"],
        "loss": _round(line["valid_loss"]),
        "loss_by_position": {str(bucket["to"]): _round(bucket["loss"]) for bucket in by_position},
        **({"tasks": _round(line["tasks"])} if line.get("tasks") else {}),
    }


def _evaluation(folder: Path) -> dict[str, Any]:
    """Means by task and length of what `evaluate` was last asked for: number of samples, and score and loss of the answers.

    Perplexity and documents have the mean loss over all windows or documents, over all their positions and by position.
    """
    results = folder / "results.json"
    tasks = json.loads(results.read_text())["tasks"] if results.is_file() else {}
    return {
        task: {
            length: (_losses if task in LOSS_TASKS else _scores)(found) for length, found in lengths.items()
        }
        for task, lengths in tasks.items()
    }


def _losses(result: dict[str, Any]) -> dict[str, Any]:
    by_position = {str(bucket["to"]): _round(bucket["nll"]) for bucket in result["buckets"]}
    samples = result.get("windows", result.get("documents"))
    return {"samples": samples, "nll": _round(result["nll"]), "nll_by_position": by_position}


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    # answers that were generated have no loss
    return {
        "samples": result["samples"], "score": _round(result["score"]), "nll": _round(result.get("nll")),
    }  # fmt: skip


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the finite numbers among the values; None where there are none."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return _round(fmean(numbers)) if numbers else None


def _round(value: Any) -> Any:
    """Five digits of every number in nested lists and sections."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _round(x) for key, x in value.items()}
    return [_round(x) for x in value] if isinstance(value, list) else value


def to_text(summary: dict[str, Any]) -> str:
    """JSON with one line for each entry of a run, which keeps the file small and its differences readable."""
    runs = summary["runs"]
    lines = ["{", f'"config": {json.dumps(summary["config"], indent=1)},']
    if "fits" in summary:
        lines.append(f'"fits": {json.dumps(summary["fits"])},')
    lines.append('"runs": {')
    for name, run in runs.items():
        entries = ",\n  ".join(f"{json.dumps(key)}: {strict_json(value)}" for key, value in run.items())
        lines.append(f" {json.dumps(name)}: {{\n  {entries}\n }}" + ("," if name != list(runs)[-1] else ""))
    return "\n".join([*lines, "}", "}"]) + "\n"


@ending_with_reader()
def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="STUDY_FOLDER", help="a study's `output`")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    options = parser.parse_args(arguments)
    try:
        options.output.write_text(to_text(summarize(options.folders)))
    except (OSError, ValueError) as error:
        parser.error(error_text(error))


if __name__ == "__main__":
    main()
