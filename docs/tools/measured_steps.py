"""Whole steps that were timed on one GPU, and what the planner says of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dash_megatron.config import Config, load_config
from dash_megatron.planning.layout import Hardware
from dash_megatron.planning.search import estimate_configured
from dash_megatron.planning.step_time import Routing
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
DENSE = ["attention.kind=full", "attention.target_density=null"]


class MeasuredStep(NamedTuple):
    """One step of one process."""

    name: str
    gpu: str
    config: Config
    routing: Routing
    seconds: float

    @property
    def modelled(self) -> float:
        """Seconds that the planner says."""
        return estimate_configured(self.config, 1, self.routing, Hardware.of(self.gpu)).seconds


def _of_file(name: str, *keys: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", list(keys))


def measured_steps() -> list[MeasuredStep]:
    """The steps, those the model is right about within 20% first."""
    study = load_study(ROOT / "docs" / "results" / "quality" / "steps_131k.yaml")
    runs = {run.name.partition("-")[0]: run.config for run in expand(study) if run.name.endswith("seed1")}
    large = (*DENSE, "training.global_batch=1")
    medium = (
        "model.layers=16", "model.hidden_size=1024", "model.heads=16", "model.kv_heads=4", "model.head_dim=64",
        "model.ffn_hidden_size=3072", "model.vocab_size=16384", "training.global_batch=4", "training.micro_batch=4",
        "training.recompute=none",
    )  # fmt: skip
    whole, trained = Routing(), Routing(density=0.238)
    lists = Routing(density=0.115, choices=4.54)
    rows = "8 x 16K in one micro-batch"
    return [
        MeasuredStep("1B, full attention, 16K, full recomputation", "H200", _of_file("1b_16k", *large, "training.recompute=full"), whole, 0.519),
        MeasuredStep("the same, no recomputation", "H200", _of_file("1b_16k", *large, "training.recompute=none"), whole, 0.414),
        MeasuredStep("the same, 64K, full recomputation", "H200", _of_file("1b_16k", *large, "training.recompute=full", "data.seq_length=65536"), whole, 4.471),
        MeasuredStep("199M by the recipe, 4 x 16K in one micro-batch, 24% of the pairs selected", "H200", _of_file("60m_16k", *medium), trained, 0.414),
        MeasuredStep(f"62M, one query a token, {rows}, 12% selected, 52% visited", "H200", runs["dash_25"], lists, 0.192),
        MeasuredStep("62M, full attention, the same", "H100", runs["full"], whole, 0.260),
        MeasuredStep("62M, InfLLMv2 at 25% of the chunks, the same", "H100", runs["infllmv2_25"], lists, 0.228),
        MeasuredStep("62M, NSA at 25%, the same", "H100", runs["nsa_25"], lists, 0.462),
        MeasuredStep("199M, full attention by FlashAttention-2", "H200", _of_file("60m_16k", *medium, *DENSE), whole, 0.615),
    ]  # fmt: skip
