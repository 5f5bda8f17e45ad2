"""Whether a label is the model's top-1 prediction."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_argmax(logits_NBV: Tensor, labels_BN: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Tell which labels have the largest logit; of equal logits the first one is the argmax.

    Args:
        logits_NBV: this tensor-parallel rank's logits, [N, B, rows of its shard of the embedding table].
        labels_BN: int64 [B, N].
        vocab_size: rows of the whole table that are tokens; those after them only pad it and never win.
        group: the tensor-parallel ranks, in the order of their shards; collective.

    Returns:
        Float32 [B, N], 1 or 0, the same on every rank. Where a logit is NaN it is 0.
    """
    rows = logits_NBV.shape[-1]
    first = group.rank() * rows
    own = max(0, min(rows, vocab_size - first))
    nothing = rows * group.size()  # no label
    if own:
        value, number = logits_NBV[..., :own].max(-1)
        # NaN beats every number, and is no token
        number = torch.where(value.isnan(), nothing, number + first)
        value = value.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    else:
        value = torch.full(logits_NBV.shape[:-1], -torch.inf, device=logits_NBV.device)
        number = torch.full_like(value, nothing, dtype=torch.int64)
    if group.size() > 1:
        largest = value.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        number = torch.where(value == largest, number, nothing)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=group)
    return (number.transpose(0, 1) == labels_BN).float()
