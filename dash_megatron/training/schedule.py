"""Learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from dash_megatron.config import Config


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of update `step`, counted from 0.

    Warm-up is linear and its last step reaches the peak; cosine and wsd end at `schedule.min_lr_ratio` times the
    peak on the run's last step.
    """
    peak, schedule, total = config.optimizer.lr, config.schedule, config.training.steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    if schedule.kind == "cosine":
        progress = _progress(step, schedule.warmup_steps, total)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule.kind == "wsd":
        decay_steps = schedule.decay_steps or max(1, total // 5)
        progress = _progress(step, max(schedule.warmup_steps, total - decay_steps) - 1, total)
        return peak * (1 - (1 - floor) * progress)
    return peak


def _progress(step: int, first: int, total: int) -> float:
    """How far update `step` is between `first`, which is 0, and the last of `total` updates, which is 1."""
    return min(1.0, max(0.0, (step - first) / max(1, total - 1 - first)))
