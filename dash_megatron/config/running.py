"""Sections of what a run saves, reports and survives: `checkpoint`, `logging` and `faults`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dash_megatron.config.section import Section


class CheckpointConfig(Section):
    """Saving and resuming. A run resumes by itself from the newest checkpoint of its `run_dir`."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves after the last step only."""
    keep: int = Field(default=0, ge=0)
    """Newest checkpoints that stay on disk; 0 keeps all."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps divisible by it stay too, however old; 0 = none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; false waits until the checkpoint is published."""
    check_loss: bool = True
    """Refuse to resume where the loaded weights give another loss on the checkpoint's stored tokens."""
    retry_seconds: float = Field(default=300.0, ge=0)
    """How long writing is tried again while a disk is full or a file system away, before the run ends with an error."""


class LoggingConfig(Section):
    """Console, `metrics.jsonl` and TensorBoard."""

    every: int = Field(default=10, gt=0)
    """Steps between logged lines."""
    tensorboard: bool = True
    """Write `<run_dir>/tensorboard`."""
    routing_every: int = Field(default=0, ge=0)
    """Steps between measurements of how each layer and kv head routes, into `<run_dir>/routing.jsonl` and TensorBoard;
    0 = never. They are of rank 0's heads and of its first micro-batch."""


class FaultsConfig(Section):
    """What a run does when something goes wrong. Updates that are left out change nothing but the place in the data and
    the learning rate's; their batches are kept in `<run_dir>/faults`."""

    non_finite: Literal["skip", "rollback", "halt"] = "skip"
    """A loss or gradient that is no number: leave the update out (`skip`), also go back to the newest checkpoint and
    leave it out from there (`rollback`), or end the run with exit code 3 (`halt`)."""
    loss_spike: float | None = Field(default=None, gt=0)
    """A loss more than this many standard deviations above the mean of the last `loss_window` ones is a spike, whose
    update is left out; null accepts every finite loss."""
    loss_window: int = Field(default=128, ge=2)
    """Updates that a spike is measured by; until there are as many, nothing is a spike."""
    loss_spike_policy: Literal["skip", "rollback", "halt"] = "skip"
    """As `non_finite`, for spikes."""
    max_in_a_row: int = Field(default=3, gt=0)
    """So many updates left out in a row end the run, whatever the policy."""
    collapse_steps: int = Field(default=100, gt=0)
    """Steps in a row after which a layer's router that selects only the own chunk, or all, raises an alarm."""
    hang_minutes: float = Field(default=30.0, ge=0)
    """A process that finishes no step, validation batch, load or save for so long writes its stacks to standard error
    and aborts, to be started again; 0 = never."""
    straggler_ratio: float = Field(default=1.5, gt=1)
    """Warn when a process takes this many times the median to read data and compute."""
