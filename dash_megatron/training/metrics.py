"""What a run reports: a console line, `metrics.jsonl` and curves, from rank 0."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from dash_megatron.files import path_for_message
from dash_megatron.json_lines import JsonLines, read_json_lines
from dash_megatron.training.trackers import TensorBoard, Tracker, add_or_drop, close_quietly

logger = logging.getLogger(__name__)

PositionLoss = TypedDict("PositionLoss", {"from": int, "to": int, "loss": float})
"""Mean loss of the targets whose tokens stand at positions [from, to) of their document."""


class TaskScore(TypedDict):
    """Mean scores over the samples of a task at one length."""

    score: float
    """Share of the answers all of whose tokens are the model's top-1 predictions."""
    nll: float
    """Mean loss per token of the answers, in nats."""


class StepMetrics(TypedDict):
    """One logged step, as `metrics.jsonl` holds it; per-layer lists have null for layers without a router.

    JSON has no NaN and no infinity: the file has null for them, in `loss` and `grad_norm` of a step whose update was skipped, and
    in losses of validation.
    """

    step: int
    """Finished optimizer steps."""
    loss: float
    """Mean cross entropy of the step's target tokens, in nats; null where it is not finite."""
    valid_loss: float | None
    """Mean cross entropy of the validation samples' target tokens, in nats; null at steps that do not validate."""
    valid_loss_by_position: list[PositionLoss] | None
    """`valid_loss` by position in the document, in order; without positions that no document of the samples has."""
    tasks: dict[str, dict[str, TaskScore]] | None
    """Scores of `evaluation.tasks` by name and length; null at steps that do not score."""
    lr: float
    grad_norm: float
    """Global gradient norm before clipping; null where it is not finite."""
    tokens: int
    """Tokens read since the start of the run."""
    target_tokens: int
    """Tokens of the step that enter the loss: of conversations those of answers."""
    context_length: int
    """Longest context of the step in tokens, by `data.seq_length_curriculum`."""
    tokens_per_second: float
    """Tokens per second of all processes together, mean since the last logged step, without validation and saving."""
    model_tflops_per_second: float
    """Model TFLOP/s per process, with attention counted at the measured density."""
    dense_equivalent_tflops_per_second: float
    """TFLOP/s per process that full attention in every layer would need for the same tokens per second."""
    model_flops_utilization: float | None
    """`model_tflops_per_second` over the device's bf16 peak; null where that is unknown."""
    density: float | None
    """Mean of `density_per_layer`; null without a router."""
    density_per_layer: list[float | None]
    """Selected over causally available chunks of each layer."""
    chunks_selected_per_layer: list[float | None]
    """Selected chunks per token of each layer, its own chunk included."""
    scaling_factor_per_layer: list[float | None]
    """Scaling factor of each layer for the next step; `attention.target_density` moves it."""
    context_imbalance: float
    """Most selected chunks of a context-parallel process over the mean of its group; 1 without context parallelism."""
    context_bytes_forward_per_layer: list[float]
    """Bytes that a process sent to context-parallel peers in forward passes of the step, mean over processes."""
    context_bytes_backward_per_layer: list[float]
    processes: int
    """Number of processes of the run at this step."""
    gpu_memory_gib: float | None
    """Peak memory of tensors on the GPU of rank 0 since it started, in GiB; null without a GPU."""
    skipped: int
    """Updates skipped since the start of the run."""
    alarms: int
    """Number of layers whose router has collapsed: it selects only the own chunk, or every chunk."""
    slowest_rank: int
    """The process that took longest to read data and compute since the last logged step."""
    slowest_over_median: float
    """The time of `slowest_rank` over the median of the processes."""


_ALWAYS = ("loss", "valid_loss")
"""Keys of `metrics.jsonl` that lines of every release have, and without which a line is no use."""


class MetricsWriter:
    """Appends to a run's metrics.

    Args:
        run_dir: the run's folder.
        tensorboard: also write TensorBoard events.
        resumed_step: steps finished before this start; later lines of an earlier start are dropped, because this
            start writes them anew.
        trackers: others to show values on, which `close` leaves open; one that fails is taken out of the list.
    """

    def __init__(
        self, run_dir: str | Path, tensorboard: bool, resumed_step: int, trackers: list[Tracker] | None = None
    ) -> None:
        folder = Path(run_dir)
        self._lines = JsonLines(folder / "metrics.jsonl", resumed_step, _ALWAYS)
        if (last := self._lines.last_dropped) is not None:
            logger.info(
                "steps %d to %d, at least, were taken before and not saved: done again",
                resumed_step + 1,
                last,
            )
        self._routing = JsonLines(folder / "routing.jsonl", resumed_step)
        self._own: list[Tracker] = [TensorBoard(folder, resumed_step)] if tensorboard else []
        self._others = [] if trackers is None else trackers

    def write(self, metrics: StepMetrics) -> None:
        """Append one step.

        Raises:
            OSError: the disk has been full or unavailable for minutes. What was written before is whole.
        """
        self._lines.append(metrics)
        curves = (
            curve for name, value in metrics.items() if name != "step" for curve in _scalars(name, value)
        )
        scalars = {tag: number for tag, number in curves if number is not None}
        self._show(metrics["step"], scalars, {})

    def write_routing(
        self, line: Mapping[str, Any], histograms: Mapping[str, Tensor], scalars: Mapping[str, float]
    ) -> None:
        """Append one step's line to `routing.jsonl`, and values of its step to the trackers.

        Args:
            line: has `step`.
            histograms: finite values, on CPU, for each tag.
            scalars: for each tag; no tag may be in both.

        Raises:
            OSError: as in `write`.
        """
        self._routing.append(line)
        self._show(line["step"], scalars, histograms)

    def _show(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        for trackers in (self._own, self._others):
            add_or_drop(trackers, step, scalars, histograms)

    def close(self) -> None:
        """Finish TensorBoard's file; the `.jsonl` files are complete after every step."""
        for tracker in self._own:
            close_quietly(tracker)


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float | None]]:
    """A metric's curves on trackers, and their points."""
    if isinstance(value, dict):
        for task, lengths in value.items():
            for length, means in lengths.items():
                yield f"{name}/{task}/{length}", means["score"]
                yield f"{name}_nll/{task}/{length}", means["nll"]
        return
    if not isinstance(value, list):
        yield f"train/{name}", value
        return
    for layer, part in enumerate(value):
        if isinstance(part, dict):
            yield f"{name}/{part['from']:06d}_to_{part['to']:06d}", part["loss"]
        else:
            yield f"{name}/layer_{layer:02d}", part


def read_metrics(run_dir: str | Path) -> list[StepMetrics]:
    """Read `metrics.jsonl`, without damaged lines; see `read_json_lines`.

    Null is read as NaN in `loss` and `grad_norm`, in the losses of `valid_loss_by_position`, and in `valid_loss` beside such.

    Raises:
        FileNotFoundError: the run has none.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path_for_message(path)} does not exist; {run_dir} must be the folder of a run that has logged a step"
        )
    lines = read_json_lines(path, _ALWAYS)
    for line in lines:
        line |= {name: math.nan for name in ("loss", "grad_norm") if line.get(name, 0.0) is None}
        lost = [part for part in line.get("valid_loss_by_position") or () if part["loss"] is None]
        for part in lost:
            part["loss"] = math.nan
        # else null is of a step that does not validate
        if lost and line["valid_loss"] is None:
            line["valid_loss"] = math.nan
    return lines


def console_line(metrics: StepMetrics, total_steps: int, seconds_left: float) -> str:
    """One line for people."""
    parts = [
        f"step {metrics['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {metrics['loss']:.4f}",
        f"lr {metrics['lr']:.2e}",
        f"grad norm {metrics['grad_norm']:.2f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
    ]
    if metrics["density"] is not None:
        parts.append(f"density {metrics['density']:.0%}")
    if metrics["valid_loss"] is not None:
        parts.append(f"validation loss {metrics['valid_loss']:.4f}")
    parts.append(f"{datetime.timedelta(seconds=round(seconds_left))} left")
    return " | ".join(parts)
