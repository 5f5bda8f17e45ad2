"""Whole steps that were timed on one GPU and on two, and what the planner says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from dash_megatron.config import Config, load_config
from dash_megatron.planning import step_time
from dash_megatron.planning.layout import Hardware
from dash_megatron.planning.search import estimate_configured
from dash_megatron.planning.step_time import Routing, StepEstimate
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
DENSE = ["attention.kind=full", "attention.target_density=null"]
# Bytes that steps moved before RoPE, SwiGLU, the loss and the update were fused. Logits were computed twice then.
UNFUSED: dict[str, Any] = {
    "ELEMENTWISE_BYTES": 50,
    "LOGIT_BYTES": 11,
    "OPTIMIZER_BYTES": dict.fromkeys(step_time.OPTIMIZER_BYTES, 65),
    "GRADIENT_BYTES": dict.fromkeys(step_time.GRADIENT_BYTES, 18),
}
TODAY: dict[str, Any] = {name: getattr(step_time, name) for name in UNFUSED}
# Bytes that steps moved while heads were still split and rotated in several passes: 20 ms of a step of the 1B model.
UNFUSED_ROPE = TODAY | {"ELEMENTWISE_BYTES": 41}


class MeasuredStep(NamedTuple):
    """One step of one process, or of two."""

    name: str
    gpu: str
    config: Config
    routing: Routing
    seconds: float
    gib: float | None
    """Peak of torch's allocations; None: not noted, or of lists that had room for documents as long as a micro-batch."""
    gpus: int = 1
    passes: dict[str, Any] = UNFUSED
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


def measured_steps() -> list[MeasuredStep]:
    """The steps, those the model is right about within 20% first."""
    study = load_study(ROOT / "docs" / "results" / "quality" / "steps_131k.yaml")
    runs = {run.name.partition("-")[0]: run.config for run in expand(study) if run.name.endswith("seed1")}
    large = ("training.global_batch=1", "training.recompute=none")
    long = "data.seq_length=65536"
    medium = (
        "model.layers=16", "model.hidden_size=1024", "model.heads=16", "model.kv_heads=4", "model.head_dim=64",
        "model.ffn_hidden_size=3072", "model.vocab_size=16384", "training.global_batch=4", "training.micro_batch=4",
        "training.recompute=none",
    )  # fmt: skip
    small = (
        "model.layers=5", "model.hidden_size=960", "model.heads=8", "model.kv_heads=2", "model.head_dim=64",
        "model.ffn_hidden_size=2816", "model.vocab_size=16384", "training.global_batch=4", "training.micro_batch=4",
        "training.recompute=none",
    )  # fmt: skip
    branch = (*small, "attention.router_projections=true", "attention.learned_scaling=20")
    whole, lists = Routing(), Routing(density=0.115, choices=4.54)
    rows = "8 x 16K in one micro-batch"
    return [
        MeasuredStep("1B, full attention, 16K", "H200", _of_file("1b_16k", *large, *DENSE), whole, 0.365, 42.5, passes=TODAY),
        MeasuredStep("the same, 64K", "H200", _of_file("1b_16k", *large, *DENSE, long), whole, 3.108, 98.7, passes=TODAY),
        MeasuredStep("1B before, full attention, 16K", "H200", _of_file("1b_16k", *large, *DENSE), whole, 0.416, 42.4),
        MeasuredStep("the same, full recomputation", "H200", _of_file("1b_16k", *large, *DENSE, "training.recompute=full"), whole, 0.519, None),
        MeasuredStep("the same, 64K, no recomputation", "H200", _of_file("1b_16k", *large, *DENSE, long), whole, 3.323, 103.2),
        MeasuredStep("1B before, random weights, 16K, chunks of `d11_c32_w4m16g`, 8.6% selected", "H200", _of_file("1b_16k", *large), Routing(density=0.086), 0.328, 42.7),
        MeasuredStep("210M by the recipe, 4 x 16K in one micro-batch, 24% selected", "H200", _of_file("60m_16k", *medium), Routing(density=0.238), 0.414, None),
        MeasuredStep("62M by the recipe, 4 x 16K in one micro-batch, 24% selected", "H200", _of_file("60m_16k", *branch), Routing(density=0.24), 0.0929, None, passes=UNFUSED_ROPE),
        MeasuredStep("the same, 11% selected", "H200", _of_file("60m_16k", *branch), Routing(density=0.107), 0.0842, None, passes=UNFUSED_ROPE),
        MeasuredStep(f"62M, one query a token, {rows}, 12% selected, 52% visited", "H200", runs["dash_25"], lists, 0.192, None),
        MeasuredStep("62M, full attention, the same", "H100", runs["full"], whole, 0.266, 20.7),
        MeasuredStep("62M, InfLLMv2 at 25% of the chunks, the same", "H100", runs["infllmv2_25"], lists, 0.244, 22.4),
        MeasuredStep("62M, NSA at 25%, the same", "H100", runs["nsa_25"], lists, 0.664, 28.5),
        MeasuredStep("210M, full attention by FlashAttention-2", "H200", _of_file("60m_16k", *medium, *DENSE), whole, 0.615, 39.5),
        MeasuredStep("62M, the same, 4 x 16K", "H200", _of_file("60m_16k", *small, *DENSE), whole, 0.1225, None, passes=UNFUSED_ROPE),
    ]  # fmt: skip


def measured_layouts() -> list[MeasuredStep]:
    """Steps of the 8B shape with 6 layers at 64K, two sequences a step, on one H200 and on two over NVLink."""
    shape = (
        "model.layers=6", "model.vocab_size=16384", "training.recompute=selective", "training.global_batch=2",
        "attention.query_pool=16", "attention.local_chunks=2", "attention.pool_heads=true", "attention.target_density=null",
    )  # fmt: skip
    context = "parallel.context=2 zero.stage=1 parallel.context_comm="
    data = "parallel.context=1 zero.stage="
    measured = (
        ("one GPU", f"{data}1", 1, 0.0833, 2.806, 65.3),
        ("context 2, `a2a`", f"{context}a2a", 2, 0.0833, 1.568, 37.7),
        ("context 2, `all_gather`", f"{context}all_gather", 2, 0.0837, 1.567, 38.1),
        ("context 2, `sparse`", f"{context}sparse", 2, 0.0837, 1.653, 38.1),
        ("context 2, `p2p`", f"{context}p2p", 2, 0.0837, 1.682, 39.0),
        ("tensor 2 with sequence", f"{data}1 parallel.tensor=2 parallel.sequence=true", 2, 0.0833, 1.607, 33.4),
        ("data 2, ZeRO 1", f"{data}1", 2, 0.0833, 1.441, 54.8),
        ("data 2, ZeRO 2", f"{data}2", 2, 0.0833, 1.444, 50.1),
        ("data 2, ZeRO 3", f"{data}3", 2, 0.0833, 1.450, 54.3),
    )  # fmt: skip
    return [
        MeasuredStep(name, "H200", _of_file("8b_64k", *shape, *layout.split()), Routing(density, density), seconds, gib, gpus)
        for name, layout, gpus, density, seconds, gib in measured
    ]  # fmt: skip
