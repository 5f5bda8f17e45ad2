"""Whether a label is what the model would say."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_likeliest(logits_NBV: Tensor, labels_BN: Tensor, words: int, group: dist.ProcessGroup) -> Tensor:
    """Tell which labels have the largest logit of all words; of equal ones only the first has it, as argmax says.

    Args:
        logits_NBV: those that this tensor-parallel rank's part of the table gives, [N, B, rows of the part].
        labels_BN: int64 [B, N].
        words: rows of the whole table that are words; those behind them only pad it, and never win.
        group: the tensor-parallel ranks, in the order of their parts; collective.

    Returns:
        Float32 [B, N], 1 or 0, the same on every rank. A logit that is no number makes it 0.
    """
    rows = logits_NBV.shape[-1]
    first = group.rank() * rows
    own = max(0, min(rows, words - first))
    nothing = rows * group.size()  # no label
    if own:
        value, number = logits_NBV[..., :own].max(-1)
        # what is no number beats every number, and is no word
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
