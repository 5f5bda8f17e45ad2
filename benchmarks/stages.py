"""One benchmark input of DashAttention's training kernels, and every stage of its forward and backward as a function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from dash_megatron.ops.kernels import configs, geometry
from dash_megatron.ops.kernels.attend import attend_forward
from dash_megatron.ops.kernels.backward_kv import backward_kv
from dash_megatron.ops.kernels.backward_q import backward_q, backward_router
from dash_megatron.ops.kernels.route import route
from dash_megatron.ops.kernels.summarize import summarize
from dash_megatron.ops.kernels.transpose import partition_work, transpose
from dash_megatron.ops.types import Router


@dataclass(frozen=True)
class Case:
    """One benchmark input."""

    name: str
    tokens: int
    heads: int = 32
    kv_heads: int = 2
    topics: int = 10
    run: int = 32
    """Consecutive queries that share a topic."""
    scaling_factor: float = 1.0
    chunk_size: int = 64
    head_dim: int = 128
    structured: bool = True


def make_inputs(case: Case, tokens: int, device: torch.device, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v, summary_query in bfloat16 and an upstream gradient; topics are the dial on density."""
    Hkv, D = case.kv_heads, case.head_dim
    inputs = Inputs(case.topics, Hkv, D, device, seed=seed)
    q, k = inputs.noise(1, tokens, case.heads, D), inputs.noise(1, tokens, Hkv, D)
    if case.structured:
        k = inputs.gather_keys(k, case.chunk_size)
        q = inputs.gather_queries(q, case.run)
    leaves = [q, k, inputs.noise(1, tokens, Hkv, D), 0.1 * inputs.noise(Hkv, D)]
    return [x.requires_grad_() for x in leaves], inputs.noise(1, tokens, case.heads, D)


class Stages:
    """Every stage of one forward and backward as a function to time; each keeps what the next ones need."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        launches: configs.Launches | None = None,
        deterministic: bool = False,
    ) -> None:
        leaves, upstream = make_inputs(case, case.tokens, device)
        self.q, self.k, self.v = (x.detach()[0] for x in leaves[:3])
        self.w, self.d_out = leaves[3].detach(), upstream[0]
        self.launches = launches or configs.find_launches(
            self.q.device, self.q.dtype, case.head_dim, case.chunk_size, case.heads // case.kv_heads
        )
        self.router = Router(case.chunk_size, case.scaling_factor, sigma=1.0)
        self.sizes = geometry.measure(
            self.q[None], self.k[None], case.chunk_size, None, self.launches.tile_rows
        )
        self.deterministic = deterministic

    def layout(self) -> None:
        self.chunks, self.offsets = geometry.chunk_layout(self.sizes, 1, None, self.q.device)

    def summarize(self) -> None:
        self.summary = summarize(self.k, self.w, self.chunks, self.sizes)

    def route(self) -> None:
        self.lists, self.tau, self.mean_log, self.selected = route(
            self.q,
            self.summary,
            self.chunks,
            self.offsets,
            self.sizes,
            self.router,
            self.launches.route,
        )

    def attend(self) -> None:
        self.out, self.lse = attend_forward(
            self.q, self.k, self.v, self.lists, self.mean_log, self.chunks, self.sizes,
            self.router.inv_sigma, self.launches.attend,
        )  # fmt: skip

    def backward_queries(self) -> None:
        self.d_prior = torch.empty_like(self.lists.log_prior)
        self.dq, self.delta, self.centred_lse = backward_q(
            self.q, self.k, self.v, self.out, self.d_out, self.lse, self.lists, self.mean_log, self.d_prior, self.chunks,
            self.sizes, self.router.inv_sigma, self.launches.queries,
        )  # fmt: skip

    def backward_router(self) -> None:
        self.d_summary, self.mean_dp, _ = backward_router(
            self.q, self.summary, self.tau, self.dq, self.d_prior, self.lists, self.chunks, self.sizes,
            self.router, self.launches.router, self.deterministic,
        )  # fmt: skip

    def transpose(self) -> None:
        self.transposed = transpose(self.lists, self.chunks, self.sizes)
        parts = min(self.launches.parts, self.sizes.least_work)
        self.partition = partition_work(self.transposed, self.chunks, self.sizes, parts)

    def backward_keys(self) -> None:
        self.dk, self.dv, self.dw = backward_kv(
            self.q, self.k, self.v, self.w, self.d_out, self.centred_lse, self.delta, self.tau, self.mean_log, self.mean_dp,
            self.summary, self.d_summary, self.d_prior, self.lists, self.transposed, self.partition, self.chunks,
            self.sizes, self.router, self.launches.keys, self.deterministic,
        )  # fmt: skip

    FORWARD = ("layout", "summarize", "route", "attend")
    BACKWARD = ("backward_queries", "backward_router", "transpose", "backward_keys")

    def run(self, *names: str) -> None:
        for name in names:
            getattr(self, name)()

    def density(self) -> float:
        """Mean over tokens of chunks selected over chunks causally available."""
        available = torch.arange(len(self.q), device=self.q.device) // self.sizes.chunk_size + 1
        return (self.selected.double() / available[:, None]).mean().item()

    def products(self) -> float:
        """Floating-point operations of one matrix product over everything listed, own chunks included."""
        blocks = int(self.lists.counts.sum(dtype=torch.int64)) + self.sizes.num_tiles
        return 2.0 * blocks * self.sizes.tile_rows * self.sizes.chunk_size * self.sizes.head_dim
