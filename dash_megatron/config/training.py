"""Sections of optimization: `optimizer`, `schedule` and `training`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dash_megatron.config.section import Section


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), examples=["[0.9, 0.95]"])
    """Decay rates of the moving averages of gradients and of their squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms, summary queries and learned factors are not decayed."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 means no clipping."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must both lie in [0, 1), such as (0.9, 0.95)")
        return self


class ScheduleConfig(Section):
    """Learning rate over steps, as a fraction of `optimizer.lr`."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: a half cosine, warm-up-stable-decay (constant, then linear), or constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = Field(default=None, gt=0)
    """wsd only: steps of the final decay; null means a fifth of `training.steps`."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step over the peak (cosine and wsd)."""

    def check_steps(self, steps: int) -> None:
        """Refuse a warm-up and decay that are longer than the run's steps.

        Raises:
            ValueError: naming fields, values, rule and remedy.
        """
        warmup = self.warmup_steps
        decay = (self.decay_steps or 0) if self.kind == "wsd" else 0
        if warmup + decay > steps:
            both = f" + schedule.decay_steps={decay} = {warmup + decay}" if decay else ""
            raise ValueError(
                f"schedule.warmup_steps={warmup}{both} must not exceed training.steps={steps}; "
                f"shorten {'them' if both else 'it'} or train longer"
            )


class TrainingConfig(Section):
    """How long, how much at once, and in which arithmetic."""

    steps: int = Field(gt=0, lt=2**31)
    """Optimizer steps."""
    global_batch: int = Field(gt=0, lt=2**31)
    """Sequences per optimizer step, over all processes and micro-batches."""
    micro_batch: int = Field(default=1, gt=0)
    """Sequences per forward pass of one process."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights and moments; fp32 is for small models and parity tests."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed of the initial weights, the data order and every random generator."""
    init_from: str | None = None
    """Weights that a new run starts from: another run's folder, whose newest checkpoint is loaded, a checkpoint of one, such as
    `runs/base/checkpoints/step_00001000`, or a folder that `python -m dash_megatron convert from-hf` wrote; null draws random
    weights. A run that resumes does not read it."""
    recompute: Literal["none", "selective", "attention", "full"] = "none"
    """What the backward computes again instead of keeping: nothing (`none`); norm, first matrix product and activation of
    each feed-forward part (`selective`); core attention (`attention`); or whole layers (`full`). With `full` a feed-forward
    part of more than 2²⁹ activations (tokens times `model.ffn_hidden_size`, of one process) is computed in pieces, one
    after the other, except under ZeRO 3."""


def micro_batches(global_batch: int, micro_batch: int, data_parallel_size: int) -> int:
    """Micro-batches that each data-parallel rank runs per optimizer step.

    Args:
        global_batch: sequences per optimizer step, over all ranks.
        micro_batch: sequences per forward pass of one rank.
        data_parallel_size: the number of ranks that read different data.

    Raises:
        ValueError: a size is below 1, or `global_batch` is no multiple of micro-batch x data-parallel size.
    """
    for name, value in (("training.global_batch", global_batch), ("training.micro_batch", micro_batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    per_pass = micro_batch * data_parallel_size
    count, rest = divmod(global_batch, per_pass)
    if rest or not count:
        raise ValueError(
            f"training.global_batch={global_batch} must be a multiple of {per_pass} = training.micro_batch={micro_batch} "
            f"x {data_parallel_size} data-parallel processes; try {max(per_pass, global_batch - rest)}"
        )
    return count
