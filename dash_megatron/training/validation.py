"""Validation during training: the mean loss over the same samples each time, also by position in the document."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from dash_megatron.config import Config
from dash_megatron.data.batches import BatchSource
from dash_megatron.evaluation.buckets import buckets
from dash_megatron.training.engine import Engine
from dash_megatron.training.metrics import PositionLoss


class Validation(NamedTuple):
    """What a step found out about the model; None where it did not look."""

    loss: float | None = None
    """Mean over the targets of the validation samples, nats."""
    by_position: list[PositionLoss] | None = None
    """The same by position in the document, without positions that no document has."""


class Validator:
    """Validates at the steps that `evaluation` names, on all processes together.

    Args:
        config: the run.
        engine: the model.
        source: validation samples, all of them with any number of processes; None: there are none.
        device: what this process computes on.
        beat: called before every batch.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        source: BatchSource | None,
        device: torch.device,
        beat: Callable[[], None],
    ) -> None:
        self.config = config
        self.engine = engine
        self.source = source
        self.device = device
        self.beat = beat

    @torch.no_grad()
    def run(self, step: int) -> Validation:
        """Do what is due after a step; collective."""
        if self.source is None or not self._due(step, self.config.evaluation.every):
            return Validation()
        self.engine.module.eval()
        return validate(self.engine.model, self.source, self.config.data.seq_length, self.device, self.beat)

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.training.steps)


@torch.no_grad()
def validate(
    model: torch.nn.Module,
    source: BatchSource,
    seq_length: int,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
) -> Validation:
    """Average the loss over all of a source's samples, from the first on; collective.

    Args:
        model: gives the losses of a `PackedBatch`'s tokens, as `DashGPTModel` does.
        source: this process's share of the samples.
        seq_length: tokens of a row.
        device: what this process computes on.
        beat: called before every batch.
    """
    ends = buckets(seq_length)
    ends_K = torch.tensor(ends, device=device)
    numbers_K1 = torch.arange(len(ends), device=device)[:, None]
    # losses and targets of each bucket
    sums_2K = torch.zeros(2, len(ends), dtype=torch.float64, device=device)
    source.load_state_dict({"consumed_samples": 0})
    for batch in source:
        beat()
        batch = batch.to(device)
        loss_BN = model(batch.tokens, batch.position_ids, batch.labels, batch.cu_seqlens, batch.context)
        bucket_BN = torch.bucketize(batch.position_ids, ends_K, right=True)
        inside_KN = (bucket_BN == numbers_K1) & batch.loss_mask
        sums_2K[0] += torch.where(inside_KN, loss_BN, 0.0).sum(1, dtype=torch.float64)
        sums_2K[1] += inside_KN.sum(1)
    # of tokens that several processes have copies of, losses and targets are in the sums as often, and that cancels
    dist.all_reduce(sums_2K)
    losses, targets = sums_2K.tolist()
    starts = [0, *ends[:-1]]
    return Validation(
        sum(losses) / max(1.0, sum(targets)),
        [
            {"from": start, "to": end, "loss": loss / count}
            for start, end, loss, count in zip(starts, ends, losses, targets, strict=True)
            if count
        ],
    )
