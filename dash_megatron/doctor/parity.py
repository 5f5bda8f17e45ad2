"""The parity check: whether the processes that share a model compute what one process would."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_megatron.config import Config, ParallelConfig
from dash_megatron.data.batches import num_target_tokens
from dash_megatron.doctor.kernels import TOLERANCE, relative_error, uses_kernels
from dash_megatron.doctor.runner import Figure, Finding
from dash_megatron.doctor.session import Session
from dash_megatron.doctor.small import build, documents_batch, tiny_config
from dash_megatron.layers import routing_means
from dash_megatron.layers.sharding import join, split_of
from dash_megatron.parallel import context_parallel_group, tensor_group
from dash_megatron.training.loss import share_of_global_mean

# Relative, of the loss and of every gradient. Float64, so that what remains is a fault, and not sums in another order:
# in float32 a router near its threshold magnifies these tenfold.
LAYOUT_TOLERANCE = 1e-5


class ForwardBackward(NamedTuple):
    """What one forward and backward pass gave."""

    loss: Tensor
    """Scalar on the host."""
    gradients: dict[str, Tensor]
    """Every parameter's whole gradient, on the host."""
    density: float
    """Selected over available chunks of the layers that route; 1 without any."""


def check_parity(session: Session) -> Finding:
    """Compare loss and every gradient of a small model in the run's layout with those of one process.

    Both compute in float64 with the reference; where the run uses kernels, these are compared too, in float32.
    """
    config, parallel = session.config, session.config.parallel
    if parallel.context == parallel.tensor == 1:
        return Finding("skipped", {}, "parallel.context=1 and parallel.tensor=1: no model is shared")
    alone = tiny_config(config, backend="reference")
    sections = alone.model_dump(mode="json") | {"parallel": ParallelConfig().model_dump()}
    alone = Config.model_validate(sections)
    with session.model_groups(alone.parallel):
        expected = session.run_on_all(lambda: run_once(alone, session.device, torch.float64))
    passes = {"reference": (torch.float64, LAYOUT_TOLERANCE, LAYOUT_TOLERANCE)}
    if uses_kernels(config, session.device):
        # the kernels are no nearer to the reference on a single process
        passes["triton"] = (torch.float32, *TOLERANCE[torch.float32])
    figures: dict[str, Figure] = {"density": expected.density}
    problems = []
    for backend, (dtype, *allowed) in passes.items():
        with session.model_groups(parallel):
            found = run_once(tiny_config(config, backend=backend), session.device, dtype)
        errors = {"loss": relative_error(found.loss, expected.loss)}
        errors |= {
            name: relative_error(found.gradients[name], gradient)
            for name, gradient in expected.gradients.items()
        }
        worst = max(list(errors)[1:], key=lambda name: errors[name])
        figures |= {f"{backend} loss error": errors["loss"], f"{backend} gradient error": errors[worst]}
        for name, limit in (("loss", allowed[0]), (worst, allowed[1])):
            # NaN fails too
            if not errors[name] <= limit:
                what = name if name == "loss" else f"gradient of {name}"
                problems.append(
                    f"{backend}: {what} differs from one process's by {errors[name]:.1e}, allowed {limit:.0e}"
                )
    if not problems:
        return Finding(figures=figures)
    layout = (
        f"parallel.context={parallel.context} ({parallel.context_comm}), parallel.tensor={parallel.tensor}"
    )
    problems.append(f"do not train with {layout} here; try another parallel.context_comm, and report this")
    return Finding("failed", figures, "; ".join(problems))


def run_once(config: Config, device: torch.device, dtype: torch.dtype) -> ForwardBackward:
    """Compute loss and gradients of one batch, the same in all copies of the model; collective within each copy."""
    model = build(config, device).to(dtype)
    batch = documents_batch(config).to(device)
    targets = num_target_tokens(batch).to(device)
    dist.all_reduce(targets, group=context_parallel_group())
    # other implementations of full attention may round to fewer bits than float32 has
    with sdpa_kernel(SDPBackend.MATH):
        loss = share_of_global_mean(model, batch, targets.to(dtype))
        loss.backward()
    means = routing_means(model).values()
    total = loss.detach().clone()
    # available and selected chunks
    chunks = sum((torch.stack(tuple(mean)) for mean in means), torch.zeros(2, device=device))
    for share in (total, chunks):
        dist.all_reduce(share, group=context_parallel_group())
    gradients = {name: _whole_gradient(parameter) for name, parameter in model.named_parameters()}
    return ForwardBackward(total.cpu(), gradients, (chunks[1] / chunks[0]).item() if means else 1.0)


def _whole_gradient(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    dist.all_reduce(gradient, group=context_parallel_group())
    split, size = split_of(parameter), dist.get_world_size(tensor_group())
    if split is not None and size > 1:
        shards = [torch.empty_like(gradient) for _ in range(size)]
        dist.all_gather(shards, gradient.contiguous(), group=tensor_group())
        gradient = join(shards, split)
    return gradient.cpu()
