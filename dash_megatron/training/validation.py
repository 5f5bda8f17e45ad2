"""Evaluation during training: the mean loss over the same samples each time, also by position, and scores of tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.config import Config
from dash_megatron.data.batches import BatchSource
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.buckets import buckets
from dash_megatron.training.engine import Engine
from dash_megatron.training.loss import token_losses
from dash_megatron.training.metrics import PositionLoss, TaskScore
from dash_megatron.training.sources import batch_source, open_rows
from dash_megatron.training.task_scores import TaskScorer

logger = logging.getLogger(__name__)


class Validation(NamedTuple):
    """What validation after a step found; fields are None where it did not look."""

    loss: float | None = None
    """Mean loss of the target tokens of the validation samples, in nats."""
    by_position: list[PositionLoss] | None = None
    """`loss` by position in the document, without positions that no document has."""
    tasks: dict[str, dict[str, TaskScore]] | None = None
    """Scores of tasks, by name and length."""


class Validator:
    """Validates and scores tasks at the steps that `evaluation` names, on all processes together.

    Args:
        config: the run.
        tokenizer: of the run.
        device: what this process computes on.

    Raises:
        ValueError, FileNotFoundError: the validation data cannot be used, or a task has no sample of a length.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._source: BatchSource | None = None
        self._tasks: TaskScorer | None = None
        if config.data.valid:
            rows = open_rows(config, "valid", config.evaluation.samples, tokenizer)
            self._source = batch_source(config, rows, tokenizer.eod, device, pad_last=True)
        if config.evaluation.tasks_every:
            self._tasks = TaskScorer(config, tokenizer, device)
        elif config.evaluation.tasks:
            logger.warning(
                "evaluation.tasks=%s is ignored, since evaluation.tasks_every is 0",
                list(config.evaluation.tasks),
            )

    def run(self, engine: Engine, step: int, beat: Callable[[], None]) -> Validation:
        """Do what is due after a step; collective.

        Args:
            engine: the model, left in evaluation mode by what is done.
            step: finished optimizer steps.
            beat: called before every batch, to tell the watchdog.
        """
        found = Validation()
        if self._source is not None and self._due(step, self.config.evaluation.every):
            engine.model.eval()
            found = validate(engine.forward, self._source, self.config.data.seq_length, self.device, beat)
        if self._tasks is not None and self._due(step, self.config.evaluation.tasks_every):
            engine.model.eval()
            found = found._replace(tasks=self._tasks.score(engine, beat))
        return found

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.training.steps)


@torch.no_grad()
def validate(
    forward: Callable[..., Tensor],
    source: BatchSource,
    seq_length: int,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
) -> Validation:
    """Average the loss over all of a source's samples, from the first on; collective.

    Args:
        forward: of a `DashGPTModel`, or of an `Engine` around one.
        source: this process's share of the samples.
        seq_length: tokens of a row.
        device: what this process computes on.
        beat: called before every batch.
    """
    spans = buckets(seq_length)
    ends_K = torch.tensor([end for _, end in spans], device=device)
    numbers_K1 = torch.arange(len(spans), device=device)[:, None]
    # losses and targets of each bucket
    sums_2K = torch.zeros(2, len(spans), dtype=torch.float64, device=device)
    source.load_state_dict({"consumed_samples": 0})
    for batch in source:
        beat()
        batch = batch.to(device)
        loss_BN = token_losses(forward, batch)
        bucket_BN = torch.bucketize(batch.position_ids, ends_K, right=True)
        inside_KN = (bucket_BN == numbers_K1) & batch.loss_mask
        sums_2K[0] += torch.where(inside_KN, loss_BN, 0.0).sum(1, dtype=torch.float64)
        sums_2K[1] += inside_KN.sum(1)
    # tokens that several processes hold count as often in losses as in targets, so that copies cancel
    dist.all_reduce(sums_2K)
    losses, targets = sums_2K.tolist()
    return Validation(
        sum(losses) / max(1.0, sum(targets)),
        [
            {"from": start, "to": end, "loss": loss / count}
            for (start, end), loss, count in zip(spans, losses, targets, strict=True)
            if count
        ],
    )
