"""One benchmark input of DashAttention's training kernels, and every stage of its forward and backward as a function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.choices import RouterKind, load_selected, router_of
from benchmarks.inputs import Inputs
from benchmarks.persistence import make_selected
from dash_megatron.ops.kernels import configs, geometry
from dash_megatron.ops.kernels.attend import attend_forward
from dash_megatron.ops.kernels.backward_kv import backward_kv
from dash_megatron.ops.kernels.backward_pairs import backward_pairs
from dash_megatron.ops.kernels.backward_q import backward_q, backward_router
from dash_megatron.ops.kernels.backward_summary import Summaries, sum_d_summary
from dash_megatron.ops.kernels.dash import add_router_gradient, pooled_queries
from dash_megatron.ops.kernels.pool import pool_rows
from dash_megatron.ops.kernels.route import route
from dash_megatron.ops.kernels.summarize import summarize, summarize_backward
from dash_megatron.ops.kernels.transpose import transpose
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
    model: str = ""
    """Name of a trained model in `benchmarks/choices`: its chunks take the place of those the router selects.

    A case shorter than its document is the document's end; one that is longer, or has other heads, has made choices like them.
    """
    layer: int = 0
    """The layer of that model."""
    batch: int = 1
    """Rows of so many tokens; those of a trained model all select alike."""


def make_inputs(case: Case, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v, summary_query in bfloat16 and an upstream gradient; topics are the dial on density."""
    B, N, Hkv, D = case.batch, case.tokens, case.kv_heads, case.head_dim
    inputs = Inputs(case.topics, Hkv, D, device)
    q, k = inputs.noise(B, N, case.heads, D), inputs.noise(B, N, Hkv, D)
    if case.structured:
        k = inputs.gather_keys(k, case.chunk_size)
        q = inputs.gather_queries(q, case.run)
    leaves = [q, k, inputs.noise(B, N, Hkv, D), 0.1 * inputs.noise(Hkv, D)]
    return [x.requires_grad_() for x in leaves], inputs.noise(B, N, case.heads, D)


def given_chunks(case: Case, device: torch.device) -> Tensor:
    """Past chunks that the trained model of a case selected, bool [key/value heads, tokens, chunks] on the device.

    Where the case has more tokens or other heads than the model's file, made ones that persist alike (`make_selected`).

    Raises:
        ValueError: the case has other chunks than the model, or a part of a chunk.
    """
    selected_HNc = load_selected(case.model, case.layer)
    heads, tokens, chunks = selected_HNc.shape
    size = tokens // chunks
    if case.chunk_size != size or case.tokens % size:
        raise ValueError(f"{case.model} has chunks of {size}, of which {case} must have a whole number")
    if case.kv_heads != heads or case.tokens > tokens:
        return make_selected(case.model, case.layer, case.kv_heads, case.tokens, size, device)
    return selected_HNc[:, tokens - case.tokens :, chunks - case.tokens // size :].to(device)


def as_routing(
    past_HNc: Tensor, sizes: geometry.Sizes, batch: int = 1
) -> tuple[geometry.Lists, Tensor, Tensor, Tensor]:
    """Selected past chunks in place of what `route` returns, for `batch` documents of whole chunks that select alike.

    All chunks of a token are equally probable, so that the prior is 0. Thresholds are infinite: nothing gets a gradient
    through the router, whose backward takes its time all the same.

    Args:
        past_HNc: bool [key/value heads, tokens, chunks].
        sizes: of the kernels' tiles.
    """
    num_chunks, past_HNc = past_HNc.shape[-1], past_HNc.repeat(1, batch, 1)
    count_NH = past_HNc.sum(-1).mT.contiguous()
    mean_log_NH = -count_NH.clamp_min(1).log2()
    past_iTc = past_HNc.unflatten(1, (-1, sizes.tile_tokens)).flatten(0, 1)
    listed_ic = past_iTc.any(1)
    tile, chunk = listed_ic.nonzero(as_tuple=True)
    log_prior = mean_log_NH.mT.reshape(-1, sizes.tile_tokens)[tile]
    log_prior = log_prior.masked_fill(~past_iTc[tile, :, chunk], -torch.inf)
    listed_i = listed_ic.sum(-1)
    # chunks are numbered through all documents
    chunk = chunk + tile % sizes.tiles_per_head // (sizes.tiles_per_head // batch) * num_chunks
    lists = geometry.Lists(chunk.int(), log_prior, listed_i.cumsum(0) - listed_i, listed_i.int())
    tau = torch.full((sizes.num_tokens, sizes.num_heads), torch.inf, device=past_HNc.device)
    return lists, tau, mean_log_NH, (count_NH + 1).int()


class Stages:
    """Every stage of one forward and backward as a function to time; each keeps what the next ones need."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        launches: configs.Launches | None = None,
        deterministic: bool = False,
        kind: RouterKind | None = None,
    ) -> None:
        """Of a case, with the routers of its model, if it has one, or of `kind`."""
        leaves, upstream = make_inputs(case, device)
        self.q, self.k, self.v = (x.detach().flatten(0, 1) for x in leaves[:3])
        self.w, self.d_out, self.batch = leaves[3].detach(), upstream.flatten(0, 1), case.batch
        self.launches = launches or configs.find_launches(
            self.q.device, self.q.dtype, case.head_dim, case.chunk_size, case.heads // case.kv_heads
        )
        kind = kind or router_of(case.model)
        self.router = Router(
            case.chunk_size, case.scaling_factor, sigma=1.0, local_chunks=kind.local_chunks, query_pool=kind.query_pool,
            pool_heads=kind.pool_heads,
        )  # fmt: skip
        self.routing_q: Tensor | None = None
        self.routing_k: Tensor | None = None
        if kind.projections:
            self.routing_q, self.routing_k = torch.randn(2, *self.k.shape, dtype=self.k.dtype, device=device)
        self.sizes = geometry.measure(leaves[0], leaves[1], case.chunk_size, None, self.launches.tile_rows)
        self.router_sizes = self.sizes.of_router(self.router.pool_heads)
        self.deterministic = deterministic
        self.given = None
        if case.model:
            self.given = as_routing(given_chunks(case, device), self.router_sizes, case.batch)

    def layout(self) -> None:
        self.chunks, self.offsets = geometry.chunk_layout(self.sizes, self.batch, None, self.q.device)

    def summarize(self) -> None:
        self.summary = summarize(
            self.k if self.routing_k is None else self.routing_k, self.w, self.chunks, self.sizes
        )

    def pool_queries(self) -> None:
        """What the router sees, in the forward and again in the backward."""
        routing_q = self.q if self.routing_q is None else self.routing_q
        self.pooled_q, self.position = pooled_queries(
            routing_q, self.batch, self.sizes.num_kv_heads, self.router, None
        )

    def route(self) -> None:
        self.pool_queries()
        self.lists, self.tau, self.mean_log, self.selected = route(
            self.pooled_q,
            self.summary,
            self.chunks,
            self.offsets,
            self.router_sizes,
            self.router,
            self.launches.route,
        )
        if self.given is not None:
            self.lists, self.tau, self.mean_log, self.selected = self.given
        self.num_pairs = self.selected.sum() - self.selected.numel()

    def attend(self) -> None:
        self.out, self.lse = attend_forward(
            self.q, self.k, self.v, self.lists, self.mean_log, self.chunks, self.sizes,
            self.router.inv_sigma, self.launches.attend, by_pair=self.launches.attend_by_pair,
            num_pairs=self.num_pairs,
        )  # fmt: skip

    def backward_queries(self) -> None:
        self.d_prior = torch.empty_like(self.lists.log_prior)
        self.dq, self.delta, self.centred_lse, self.left, slabs = backward_q(
            self.q, self.k, self.v, self.out, self.d_out, self.lse, self.lists, self.mean_log, self.d_prior, self.chunks,
            self.sizes, self.router.inv_sigma, self.launches.queries, by_pair=self.launches.backward_by_pair,
            num_pairs=self.num_pairs,
        )  # fmt: skip
        self.key_sums = backward_pairs(
            self.q, self.k, self.v, self.d_out, self.lse, self.delta, self.dq, self.d_prior, self.lists, slabs,
            self.mean_log, self.chunks, self.sizes, self.router.inv_sigma,
        )  # fmt: skip

    def backward_router(self) -> None:
        self.pool_queries()
        shared, pool = self.pooled_q is self.q, self.router.query_pool
        router_dq = self.dq if shared else torch.zeros_like(self.pooled_q)
        self.d_summary, self.mean_dp, _ = backward_router(
            self.pooled_q, self.summary, self.tau, router_dq, self.d_prior, self.lists, self.chunks, self.router_sizes,
            self.router, self.launches.router, self.deterministic,
        )  # fmt: skip
        # the pass to keys and values knows one kind of queries only, and not which chunks are local
        apart = not shared or self.router.local_chunks > 0 or self.key_sums is not None
        self.summaries = None
        if self.deterministic and not apart:
            self.summaries = Summaries(self.tau, self.mean_dp, self.summary, self.d_prior, None, self.router)
        elif self.deterministic:
            self.d_summary = sum_d_summary(
                self.pooled_q, self.tau, self.mean_dp, self.summary, self.lists.log_prior, self.d_prior,
                transpose(self.lists, self.chunks, self.sizes), self.chunks[0], None, self.router_sizes, self.router, None,
            )  # fmt: skip
        if self.routing_q is not None and self.position is not None:
            pool_rows(router_dq, self.position, pool, transposed=True)
        elif self.routing_q is None and not shared:
            self.dq = add_router_gradient(self.dq, router_dq, self.position, self.router)

    def backward_keys(self) -> None:
        summaries_of_keys = (self.w, self.d_summary, self.summaries) if self.routing_k is None else ()
        self.dk, self.dv, self.dw = backward_kv(
            self.q, self.k, self.v, self.d_out, self.centred_lse, self.delta, self.mean_log, self.left, self.chunks, self.sizes,
            self.router.inv_sigma, self.launches, self.key_sums, *summaries_of_keys,
        )  # fmt: skip
        if self.routing_k is not None:
            _, self.dw = summarize_backward(self.d_summary, self.routing_k, self.w, self.chunks, self.sizes)

    def backward_attention(self) -> None:
        """Of queries, keys and values; what `backward_router` gave stays as it was."""
        self.run("backward_queries", "backward_keys")

    FORWARD = ("layout", "summarize", "route", "attend")
    BACKWARD = ("backward_queries", "backward_router", "backward_keys")

    def run(self, *names: str) -> None:
        for name in names:
            getattr(self, name)()

    def available(self) -> Tensor:
        """Chunks that each token may see, its own included: [tokens]."""
        token = torch.arange(len(self.q) // self.batch, device=self.q.device)
        return (token // self.sizes.chunk_size + 1).repeat(self.batch)

    def density(self) -> float:
        """Mean over tokens of chunks selected over chunks causally available."""
        return (self.selected.double() / self.available()[:, None]).mean().item()

    def listed_and_selected(self) -> tuple[int, int]:
        """Pairs of a token and a chunk that tiles visit, and those that were selected; both with the own chunks."""
        tiles = int(self.lists.counts.sum(dtype=torch.int64)) + self.sizes.num_tiles
        return tiles * self.sizes.tile_tokens, int(self.selected.sum(dtype=torch.int64))

    def products(self) -> float:
        """Floating-point operations of one matrix product over everything listed, own chunks included."""
        pairs, _ = self.listed_and_selected()
        return 2.0 * pairs * self.sizes.padded_group * self.sizes.chunk_size * self.sizes.head_dim
