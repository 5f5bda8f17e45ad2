"""The loss of one row of tokens, kept with every checkpoint: loaded weights must give it again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.data.batches import BatchSource
from dash_megatron.layers import take_context_bytes
from dash_megatron.training.engine import Engine
from dash_megatron.training.loss import share_of_global_mean

# relative; another layout sums in another order, and bf16 has 8 bits of mantissa
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@torch.no_grad()
def probe_loss(engine: Engine, source: BatchSource, row: dict[str, Tensor], device: torch.device) -> float:
    """Mean loss of one row's targets, which all processes compute, each its share of it; collective.

    Args:
        engine: the model.
        source: packs rows as training does.
        row: tokens and labels, int64 [seq_length].
        device: what this process computes on.
    """
    engine.model.eval()
    batch = source.pack([row], [0])
    one = torch.ones((), device=device)
    loss = share_of_global_mean(engine.forward, batch.to(device), one)
    take_context_bytes(engine.model)  # not those of a training step
    sums = torch.stack([loss.double(), batch.loss_mask.sum().to(device).double()])
    dist.all_reduce(sums)  # every copy is in both sums, and cancels
    return float(sums[0] / sums[1].clamp_min(1))


def check_probe(found: float, saved: float, precision: str, place: str) -> None:
    """Compare the loss of a checkpoint's row under loaded weights with that under saved ones.

    Raises:
        ValueError: they differ by more than another order of summation explains.
    """
    difference = abs(found - saved) / max(abs(saved), 1e-6)
    if not difference <= TOLERANCE[precision]:
        raise ValueError(
            f"{place} was saved with loss {saved:.8f} on its stored tokens, but gives {found:.8f} here: code, config or "
            "data types compute something else. Go on with the code of its checkpoint.json, or set "
            "checkpoint.check_loss=false if the change is meant"
        )
