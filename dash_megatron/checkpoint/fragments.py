"""Which part of every master weight and of Adam's moments this process keeps, under every ZeRO stage.

DeepSpeed has no public interface for this: its optimizers' attributes are read here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A process's part of one parameter: consecutive elements of its flattened tensor-parallel shard."""

    start: int
    """Its first element in the flattened shard."""
    master: Tensor
    """The float32 tensor that Adam updates; it may hold parts of other parameters too."""
    offset: int
    """Where in the flattened `master` this part begins."""
    numel: int

    def views(self, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Weight and moments, float32 [numel] each, as views of what Adam updates."""
        state = adam_state(adam, self.master)
        whole = {"weight": self.master.detach(), **{name: state[name] for name in MOMENTS}}
        return {name: tensor.view(-1).narrow(0, self.offset, self.numel) for name, tensor in whole.items()}


def adam_state(adam: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Adam's state of a tensor that it updates; before the first update the zeros that Adam would make itself."""
    state = adam.state[master]
    if not state:
        fused = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
        state["step"] = torch.zeros((), device=master.device if fused else "cpu")
        state |= {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
    return state


def fragments(module: torch.nn.Module, optimizer: Any, adam: torch.optim.Optimizer) -> dict[str, Fragment]:
    """This process's fragments by parameter name, without parameters of which it keeps nothing.

    Args:
        module: the model.
        optimizer: DeepSpeed's, or `adam` itself where DeepSpeed does not wrap it.
        adam: the optimizer that updates float32 weights.
    """
    masters = {id(parameter): master for parameter, master in _zero_0_masters(optimizer)}
    found = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            fragment = _zero_3(parameter, optimizer)
        elif hasattr(parameter, "_hp_mapping"):
            fragment = _zero_1_2(parameter, adam)
        else:
            fragment = Fragment(0, masters.get(id(parameter), parameter), 0, parameter.numel())
        if fragment is not None:
            found[name] = fragment
    return found


def _zero_0_masters(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters and their float32 copies, which ZeRO 0 keeps whole in bf16 and not at all in float32."""
    if hasattr(optimizer, "fp32_groups") and not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for parameters, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(parameters, copies, strict=True)


def _zero_3(parameter: Any, optimizer: Any) -> Fragment | None:
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = length * optimizer._get_param_partition_rank(parameter)
    numel = min(length, parameter.ds_numel - start)  # the last processes' parts are padded
    master = optimizer.fp32_partitioned_groups_flat[group]
    return Fragment(start, master, offset, numel) if numel > 0 else None


def _zero_1_2(parameter: Any, adam: torch.optim.Optimizer) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # one flat tensor a group holds all of the group that this process updates
    (master,) = adam.param_groups[mapping.param_group_index]["params"]
    place = mapping.get_hp_fragment_address()
    return Fragment(mapping.lp_fragment_address.start, master, place.start, place.numel)


def local_shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter, whole but for tensor parallelism, by name."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters()
    }


def refresh_weights(optimizer: Any) -> None:
    """Copy the master weights into the weights that the model computes with; collective."""
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):  # ZeRO 3
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    else:
        for parameter, master in _zero_0_masters(optimizer):
            parameter.data.copy_(master.data)
