"""Whole steps that were timed on one, two and four GPUs, and what the planner says of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from dash_megatron.config import Config, load_config
from dash_megatron.planning import step_time
from dash_megatron.planning.layout import Hardware
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.planning.search import estimate_configured
from dash_megatron.planning.step_time import StepEstimate
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
DENSE = ["attention.kind=full", "attention.target_density=null"]
# Bytes that steps moved before RoPE, SwiGLU, the loss and the update were fused. Logits were computed twice then.
UNFUSED: dict[str, Any] = {
    "ELEMENTWISE_BYTES": 50,
    "LOGIT_BYTES": 11,
    "OPTIMIZER_BYTES": dict.fromkeys(step_time.OPTIMIZER_BYTES, 65),
    "GRADIENT_BYTES": dict.fromkeys(step_time.GRADIENT_BYTES, 18),
}
TODAY: dict[str, Any] = {name: getattr(step_time, name) for name in UNFUSED}
# steps that were taken twice, or in which dense attention is not cuDNN's or documents are short
LEFT_OUT = ("again", "alone", "as code", "packed")


class MeasuredStep(NamedTuple):
    """One step of a number of processes."""

    name: str
    gpu: str
    config: Config
    routing: AssumedRouting
    seconds: float
    gib: float | None
    """Peak of torch's allocations; None: not noted, or of lists that had room for documents as long as a micro-batch."""
    gpus: int = 1
    passes: dict[str, Any] = TODAY
    """Bytes that it moved."""

    @property
    def modelled(self) -> StepEstimate:
        """What the planner says, of the passes of then and with nothing reserved beside torch's allocations."""
        hardware = replace(Hardware.of(self.gpu), reserved_gib=0.0)
        with mock.patch.multiple(step_time, **self.passes):
            estimate = estimate_configured(self.config, self.gpus, self.routing, hardware)
        if self.passes is not UNFUSED:
            return estimate
        vocabulary = self.config.model.hidden_size * (self.config.model.vocab_size or 0)
        again = 2 * vocabulary * estimate.tokens / self.gpus / hardware.matmul_flops
        return replace(estimate, matmul=estimate.matmul + again)


def _of_file(name: str, *keys: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", list(keys))


def _of_results(name: str) -> Iterator[MeasuredStep]:
    """The steps of a file beside the page of results."""
    with (RESULTS / name).open() as file:
        rows = [row for row in csv.DictReader(file) if not any(part in row["step"] for part in LEFT_OUT)]
    for row in rows:
        if row["step"].startswith("torchtitan"):
            continue
        density = float(row["density"])
        keys = ["attention.target_density=null", *row["overrides"].split()]
        yield MeasuredStep(
            row["step"], "H200", load_config(ROOT / row["config"], keys), AssumedRouting(density, density),
            float(row["seconds"]), float(row["peak_gib"]), int(row.get("gpus", 1)),
        )  # fmt: skip


def measured_steps() -> list[MeasuredStep]:
    """The steps on one GPU, those of today's code first."""
    study = load_study(ROOT / "docs" / "results" / "quality" / "steps_131k.yaml")
    runs = {run.name.partition("-")[0]: run.config for run in expand(study) if run.name.endswith("seed1")}
    medium = (
        "model.layers=16", "model.hidden_size=1024", "model.heads=16", "model.kv_heads=4", "model.head_dim=64",
        "model.ffn_hidden_size=3072", "model.vocab_size=16384", "training.global_batch=4", "training.micro_batch=4",
        "training.recompute=none",
    )  # fmt: skip
    whole, lists = AssumedRouting(), AssumedRouting(density=0.115, choices=4.54)
    rows = "8 x 16K in one micro-batch"
    return [
        *_of_results("training_steps.csv"),
        MeasuredStep("210M by the recipe, 4 x 16K in one micro-batch, 24% selected", "H200", _of_file("60m_16k", *medium), AssumedRouting(density=0.238), 0.414, None, passes=UNFUSED),
        MeasuredStep(f"62M, one query a token, {rows}, 12% selected, 52% visited", "H200", runs["dash_25"], lists, 0.192, None, passes=UNFUSED),
        MeasuredStep("62M, full attention, the same", "H100", runs["full"], whole, 0.266, 20.7, passes=UNFUSED),
        MeasuredStep("62M, InfLLMv2 at 25% of the chunks, the same", "H100", runs["infllmv2_25"], lists, 0.244, 22.4, passes=UNFUSED),
        MeasuredStep("62M, NSA at 25%, the same", "H100", runs["nsa_25"], lists, 0.664, 28.5, passes=UNFUSED),
        MeasuredStep("210M, full attention by FlashAttention-2", "H200", _of_file("60m_16k", *medium, *DENSE), whole, 0.615, 39.5, passes=UNFUSED),
    ]  # fmt: skip


def measured_layouts() -> list[MeasuredStep]:
    """Steps of the 8B shape with 6 layers at 64K on one, two and four H200s of a host, and of the whole 8B model."""
    return list(_of_results("training_layouts.csv"))
