"""The kernels check: whether this machine's GPU computes DashAttention as the reference does."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.config import Config
from dash_megatron.doctor.runner import Figure, Finding
from dash_megatron.doctor.session import Session
from dash_megatron.layers.core_attention import router_of
from dash_megatron.ops.attention import attention_and_routing

# Relative errors |x - ref| / |ref| allowed, of the output and of gradients, as in the kernels' tests.
TOLERANCE = {torch.float32: (2e-4, 2e-3), torch.bfloat16: (1e-2, 4e-2)}
# Share of (token, kv head) pairs for which as many chunks must be selected. A chunk whose score lies within rounding of
# the threshold may change sides.
MIN_SAME_CHUNKS = {torch.float32: 0.999, torch.bfloat16: 0.95}


class Inputs(NamedTuple):
    """Inputs of one call of attention, and the gradient of its output."""

    leaves: list[Tensor]
    """q [1, N, Hq, D], k and v [1, N, Hkv, D], summary query [Hkv, D]."""
    d_out: Tensor
    """Gradient of the output [1, N, Hq, D]."""
    cu_seqlens: Tensor


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_kernels(config: Config, device: torch.device) -> bool:
    """Whether a run on `device` computes DashAttention with the Triton kernels."""
    attention = config.attention
    if attention.kind != "dash" or attention.backend == "reference":
        return False
    return device.type == "cuda" or (attention.backend == "triton" and interpreted())


def check_kernels(session: Session) -> Finding:
    """Compare the kernels' output, every gradient and the selected chunks with the reference in float64.

    The kernels run in float32 and in the run's precision.
    """
    config, on_gpu = session.config, session.device.type == "cuda"
    if config.attention.kind == "full":
        return Finding("skipped", {}, "attention.kind=full runs torch's own kernels")
    if config.attention.kind != "dash":
        return Finding("skipped", {}, f"attention.kind={config.attention.kind} does not run DashAttention")
    if config.attention.backend == "reference":
        return Finding("skipped", {}, "attention.backend=reference runs no kernel")
    if not on_gpu and not interpreted():
        return Finding("skipped", {}, "no GPU; TRITON_INTERPRET=1 checks kernels without one, slowly")
    types = [torch.float32] + ([torch.bfloat16] if config.training.precision == "bf16" else [])
    figures: dict[str, Figure] = {}
    problems = []
    for dtype in types:
        short = str(dtype).removeprefix("torch.")
        errors, same = _compare(config, dtype, session.device)
        allowed_out, allowed_gradient = TOLERANCE[dtype]
        allowed = {name: allowed_out if name == "out" else allowed_gradient for name in errors}
        figures[f"{short} output error"] = errors["out"]
        # one that is NaN comes first
        gradients = [error for name, error in errors.items() if name != "out"]
        figures[f"{short} gradient error"] = max(gradients, key=lambda error: (math.isnan(error), error))
        figures[f"{short} share of tokens with other chunks"] = 1 - same
        problems += [
            f"{short} {name} differs from the reference by {errors[name]:.1e}, allowed {limit:.0e}"
            for name, limit in allowed.items()
            if not errors[name] <= limit
        ]
        if not same >= MIN_SAME_CHUNKS[dtype]:
            problems.append(f"{short}: {1 - same:.2%} of tokens select another number of chunks")
    if problems:
        problems.append(
            "use the versions in constraints.txt, or attention.backend=reference; replace a GPU that errs alone"
        )
    return Finding("failed" if problems else "ok", figures, "; ".join(problems))


def _compare(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, float], float]:
    """Relative errors of the output and gradients, and the share of tokens that select as many chunks."""
    given = make_inputs(config, dtype, device)
    out, gradients, selected = _run(config, given, "triton")
    doubles = [x.detach().double().requires_grad_() for x in given.leaves]
    exact = given._replace(leaves=doubles, d_out=given.d_out.double())
    expected, expected_gradients, expected_selected = _run(config, exact, "reference")
    # what is zero by its nature is rounding here, so errors are relative to something at least
    floor = 1e-3 * exact.d_out.norm().item()
    errors = {"out": relative_error(out, expected)}
    for name, found, wanted in zip("qkvw", gradients, expected_gradients, strict=True):
        errors[f"d{name}"] = relative_error(found, wanted, floor)
    return errors, (selected == expected_selected).double().mean().item()


def make_inputs(config: Config, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Packed documents of ragged lengths, whose chunks and runs of queries share topics, so that routing selects."""
    model, C, D = config.model, config.attention.chunk_size, config.model.channels_per_head
    if device.type == "cuda":
        Hkv, lengths = model.kv_heads // config.parallel.tensor, [C // 2 + 1, 9 * C + 5, 12 * C]
    else:
        Hkv, lengths = 1, [C // 2 + 1, 2 * C + 5]
    N, group = sum(lengths), model.heads // model.kv_heads
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    topics = noise(Hkv, 4, D)

    def topic(run: int) -> Tensor:
        pick = torch.randint(4, (-(-N // run), Hkv), generator=generator).repeat_interleave(run, dim=0)[:N]
        return topics[torch.arange(Hkv), pick]

    k, v = noise(N, Hkv, D) + topic(C), noise(N, Hkv, D)
    q = 0.35 * noise(N, Hkv * group, D) + topic(2 * C).repeat_interleave(group, dim=1)
    tensors = [x.to(device, dtype) for x in (q[None], k[None], v[None], noise(Hkv, D), noise(1, *q.shape))]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return Inputs([x.requires_grad_() for x in tensors[:4]], tensors[4], bounds)


def _run(config: Config, inputs: Inputs, backend: str) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    attention = config.attention
    # of a list, that of the sparsest layer
    scaling_factor = max(map(attention.layer_scaling_factor, range(config.model.layers)))
    router = router_of(attention, scaling_factor)
    q, k, v, summary_query = inputs.leaves
    out, routing = attention_and_routing(q, k, v, summary_query, router, inputs.cu_seqlens, backend)
    gradients = torch.autograd.grad(
        out, inputs.leaves, inputs.d_out, allow_unused=True, materialize_grads=True
    )
    return out.detach(), gradients, routing.chunks_selected


def relative_error(found: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Norm of the difference over the norm of what is expected, or over `floor` where that is more."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(floor)).item()
