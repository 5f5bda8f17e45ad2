"""Process groups: how this process was launched, and the groups Megatron-core makes of all of them."""

# before any other file imports Megatron-core
import dash_megatron.parallel.libraries  # noqa: F401
from dash_megatron.parallel.gradient_groups import GradientGroups
from dash_megatron.parallel.groups import (
    context_parallel_group,
    context_rank,
    data_rank,
    destroy_model_groups,
    destroy_process_groups,
    forget_model_groups,
    gradient_group,
    init_process_groups,
    join_processes,
    make_model_groups,
    tensor_group,
)
from dash_megatron.ranks import Launch, read_launch

__all__ = [
    "GradientGroups",
    "Launch",
    "context_parallel_group",
    "context_rank",
    "data_rank",
    "destroy_model_groups",
    "destroy_process_groups",
    "forget_model_groups",
    "gradient_group",
    "init_process_groups",
    "join_processes",
    "make_model_groups",
    "read_launch",
    "tensor_group",
]
