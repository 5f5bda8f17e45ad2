"""Megatron's process groups as DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist

from dash_megatron.parallel.groups import gradient_group, tensor_group


class GradientGroups:
    """The `mpu` that DeepSpeed takes: model parallel is tensor parallel, data parallel is data x context parallel.

    Context ranks hold the same weights and see other tokens, exactly as data ranks do, so ZeRO may shard optimizer,
    gradients and weights over both and never hear of context. There are no methods about sequence parallelism on
    purpose: at the name of one, stages 1 and 2 take model parallelism for 1.
    """

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Processes that hold the shards of one copy of the weights."""
        return tensor_group()

    def get_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """Rank within that group."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Processes that hold the same weights as this one: their gradients add up."""
        return gradient_group()

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        """Rank within that group."""
        return dist.get_rank(self.get_data_parallel_group())
