"""Whole gradients and weights of a run whose processes have parts of them, to be compared."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.layers.sharding import join, split_of
from dash_megatron.parallel import tensor_group


def full_gradients(engine: Any) -> dict[str, Tensor]:
    """The whole gradient of every parameter in float32, between the last `backward` and `step`; collective."""
    # imported late, as by the engine, which first says what DeepSpeed runs on
    from deepspeed.utils import safe_get_full_grad

    def gradient(parameter: torch.nn.Parameter) -> Tensor:
        found = safe_get_full_grad(parameter) if _is_sharded(parameter) else parameter.grad
        return torch.zeros_like(parameter, dtype=torch.float32) if found is None else found

    return {name: _whole(gradient(parameter), parameter) for name, parameter in _parameters(engine)}


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Every whole parameter in float32, from the master weights where there are any; collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    def weight(parameter: torch.nn.Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter) if _is_sharded(parameter) else parameter

    return {name: _whole(weight(parameter), parameter) for name, parameter in _parameters(engine)}


def _parameters(engine: Any) -> Any:
    return engine.model.named_parameters()


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO shards the parameter (stage 3) or links it to a shard of the optimizer (stages 1 and 2)."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _whole(shard: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """Join the shards of all tensor-parallel ranks; collective."""
    shard, split, size = (
        shard.detach().float().clone(),
        split_of(parameter),
        dist.get_world_size(tensor_group()),
    )
    if split is None or size == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(shards, shard.contiguous(), group=tensor_group())
    return join(shards, split)
