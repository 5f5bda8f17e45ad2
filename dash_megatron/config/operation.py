"""Sections of how a run is operated: `checkpoint`, `logging` and `faults`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dash_megatron.config.section import Section


class CheckpointConfig(Section):
    """Saving and resuming. A run resumes by itself from the newest checkpoint of its `run_dir`."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves after the last step only."""
    keep: int = Field(default=0, ge=0)
    """How many of the newest checkpoints stay on disk; 0 keeps all."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps divisible by this number also stay, however old; 0 keeps no others."""
    asynchronous: bool = True
    """Write a checkpoint while training goes on, from a copy in host memory; false waits until it is published."""
    check_loss: bool = True
    """Refuse to resume where the loaded weights give another loss on the tokens that the checkpoint stores."""
    retry_seconds: float = Field(default=300.0, ge=0)
    """Seconds for which a failed write is tried again, as while a disk is full or a file system is unavailable, before the
    run ends with an error."""


MAX_PROFILED_STEPS = 20
"""Steps in one trace: viewers do not open what is much longer."""


class WandbConfig(Section):
    """Weights & Biases (`pip install 'dash-megatron[wandb]'`): the scalars of TensorBoard under the same names. A run that
    resumes goes on in the same page. Where the login or the network fails, training goes on without. `WANDB_MODE=offline`
    keeps everything in `<run_dir>/wandb` for `wandb sync`."""

    project: str = Field(min_length=1)
    """The project in which the run is shown."""
    entity: str | None = None
    """The user or team whose project it is; null means that of the login."""
    name: str | None = None
    """The run's name; null means that of its folder."""
    group: str | None = None
    """Runs of one group are shown together."""


class LoggingConfig(Section):
    """Console, `metrics.jsonl`, TensorBoard, Weights & Biases and traces."""

    every: int = Field(default=10, gt=0)
    """Steps between logged lines."""
    tensorboard: bool = True
    """Write `<run_dir>/tensorboard`."""
    wandb: WandbConfig | None = None
    """Show the run at Weights & Biases, such as `logging.wandb.project=NAME`; null does not. Its fields are below."""
    routing_every: int = Field(default=0, ge=0)
    """Steps between measurements of how each layer and kv head routes, written to `<run_dir>/routing.jsonl` and TensorBoard;
    0 = never. They cover rank 0's heads and its first micro-batch."""
    profile_steps: tuple[int, int] | None = Field(default=None, examples=["[5, 6]"])
    """First and last step to record with torch's profiler, such as `[5, 6]`, counted from 1: each process writes a Chrome
    trace and, on a GPU, a memory snapshot to `<run_dir>/profile`; null records nothing. docs/profiling.md says how to read
    them."""

    @model_validator(mode="after")
    def _check(self) -> LoggingConfig:
        if self.profile_steps is None:
            return self
        first, last = self.profile_steps
        if not 1 <= first <= last < first + MAX_PROFILED_STEPS:
            raise ValueError(
                f"logging.profile_steps={list(self.profile_steps)} must be the first and the last of at most "
                f"{MAX_PROFILED_STEPS} steps, counted from 1, such as [5, 6]"
            )
        return self

    def check_steps(self, steps: int) -> None:
        """Refuse to record steps that a run does not have.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        if self.profile_steps is not None and self.profile_steps[1] > steps:
            last = self.profile_steps[1] - self.profile_steps[0]
            raise ValueError(
                f"logging.profile_steps={list(self.profile_steps)} must end by training.steps={steps}; try "
                f"{[max(1, steps - last), steps]}"
            )


class FaultsConfig(Section):
    """What a run does when something goes wrong. A skipped update changes no weight and no optimizer state; the data and
    the learning-rate schedule advance. Its batch is kept in `<run_dir>/faults`."""

    non_finite: Literal["skip", "rollback", "halt"] = "skip"
    """Policy for a non-finite (NaN or inf) loss or gradient: skip the update (`skip`), go back to the newest checkpoint and
    skip it when training reaches it again (`rollback`), or end the run with exit code 3 (`halt`)."""
    loss_spike: float | None = Field(default=None, gt=0)
    """A loss more than this many standard deviations above the mean of the last `loss_window` losses is a spike, which
    `loss_spike_policy` handles; null accepts every finite loss."""
    loss_window: int = Field(default=128, ge=2)
    """The number of past losses that a spike is compared with; until there are as many, no loss is a spike."""
    loss_spike_policy: Literal["skip", "rollback", "halt"] = "skip"
    """Policy for spikes, with the values of `non_finite`."""
    max_in_a_row: int = Field(default=3, gt=0)
    """The run ends after this many skipped updates in a row, whatever the policy."""
    collapse_steps: int = Field(default=100, gt=0)
    """A layer whose router selects only the token's own chunk, or every chunk, for this many steps in a row raises an
    alarm."""
    hang_minutes: float = Field(default=30.0, ge=0)
    """A process that finishes no step, validation batch, load or save for this many minutes writes its stack traces to
    standard error and aborts, so that it can be started again; 0 = never, but what processes wait for from each other still
    fails after 30. A little before, one process tells which stand where, and which give no sign of life. Take three times the
    longest of these: a start's first step compiles kernels too; a save waits until the one before is written, and the last one, or
    any with `checkpoint.asynchronous=false`, until it is itself; of validation and `evaluation.tasks` each batch counts alone."""
    straggler_ratio: float = Field(default=1.5, gt=1)
    """Warn when a process takes this many times the median to read data and compute."""
