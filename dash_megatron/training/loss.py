"""The training loss: the mean over real target tokens of the global batch, however it is split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.data.batches import PackedBatch, num_target_tokens
from dash_megatron.parallel import gradient_group


def global_target_tokens(batches: Sequence[PackedBatch], device: torch.device) -> Tensor:
    """Count the target tokens that enter the loss, in the micro-batches of all processes; collective.

    Args:
        batches: this process's micro-batches of one step.
        device: where the process group communicates.

    Returns:
        Float32 scalar, at least 1, so that a batch without any target has loss 0.
    """
    count = torch.stack([num_target_tokens(batch) for batch in batches]).sum().to(device)
    if dist.is_initialized():
        dist.all_reduce(count, group=gradient_group())  # tensor-parallel ranks read copies
    return count.clamp_min(1).float()


def token_losses(forward: Callable[..., Tensor], batch: PackedBatch) -> Tensor:
    """Loss of every label of a batch, in nats: float32 [1, T].

    Within `dash_megatron.layers.scoring` it is float32 [1, T, 2], as `DashGPTModel.forward` returns it.
    """
    return forward(*_inputs(batch))


def share_of_global_mean(
    forward: Callable[..., Tensor], batch: PackedBatch, global_targets: Tensor
) -> Tensor:
    """This micro-batch's share of the global batch's mean loss, in nats.

    Shares of all micro-batches of all processes add up to the loss, and their gradients to its gradient, because each
    is a sum over its own targets divided by the number of targets of all: documents, micro-batches and processes with
    few targets weigh no more than their tokens. Tensor-parallel ranks all have the share of the tokens they read together.
    """
    return forward(*_inputs(batch), batch.loss_mask / global_targets)


def _inputs(batch: PackedBatch) -> tuple[Any, ...]:
    """What `DashGPTModel.forward` takes of a batch, but for weights of losses."""
    return batch.tokens, batch.position_ids, batch.labels, batch.cu_seqlens, batch.context, batch.max_seqlen
