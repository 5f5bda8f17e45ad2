"""Attention of several context-parallel processes, saved for a test to compare."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dash_megatron.config import ParallelConfig
from dash_megatron.ops import dash_attention
from dash_megatron.ops.types import Router
from dash_megatron.parallel import destroy_process_groups, init_process_groups, read_launch
from dash_megatron.parallel.context.attention import sharded_dash_attention
from dash_megatron.parallel.context.communication import ContextGroup
from dash_megatron.parallel.context.heads import heads_for_rows, rows_for_heads
from dash_megatron.parallel.context.layout import shard_sequence

CHUNK = 16


class Case(NamedTuple):
    """One call of attention."""

    bounds: tuple[int, ...]
    """Where documents start, and the number of tokens."""
    kind: str = "dash"
    comm: str = "all_gather"
    scaling_factor: float = 3.0
    alpha: float = 1.5
    estimate_diagonal: bool = True
    local_chunks: int = 0
    query_pool: int = 1
    pool_heads: bool = False
    """The router sees means over the query heads of a group, as one of its own does in any case."""
    own_router: bool = False
    """The router has queries and keys of its own."""
    learned_scaling: bool = False
    """Every key/value head has a factor of its own."""
    heads: tuple[int, int] = (8, 4)
    """Query and key/value heads."""
    changed_token: int | None = None
    """Its query, key and value are others."""
    similar_chunks: int = 0
    """Above 0: keys of so many neighbouring chunks are alike, and so are the queries that follow them: local routing."""
    backend: str = "reference"
    by_pair: bool = False
    """The kernels go over selected pairs in every stage that can."""
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor(self.bounds, dtype=torch.int32)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "chunk_size": CHUNK,
            "scaling_factor": self.scaling_factor,
            "sigma": 2.0,
            "estimate_diagonal": self.estimate_diagonal,
            "alpha": self.alpha,
            "local_chunks": self.local_chunks,
            "query_pool": self.query_pool,
            "pool_heads": self.pool_heads or self.own_router,
        }


def inputs_of(case: Case) -> list[torch.Tensor]:
    """Of the whole sequence q, k, v [N, heads, 16], with queries and keys of a router that has its own, the summary query and
    the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    N, (Hq, Hkv) = case.bounds[-1], case.heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v, w, d_out = (
        normal(N, Hq, 16),
        normal(N, Hkv, 16),
        normal(N, Hkv, 16),
        normal(Hkv, 16),
        normal(N, Hq, 16),
    )
    if case.similar_chunks:
        topics = 3 * normal(N // CHUNK // case.similar_chunks + 1, Hkv, 16)
        topic_of_token = torch.arange(N) // (CHUNK * case.similar_chunks)
        k += topics[topic_of_token]
        q += topics[(topic_of_token - 1).clamp_min(0)].repeat_interleave(Hq // Hkv, 1)
    if case.changed_token is not None:
        for x in (q, k, v):
            x[case.changed_token] = 2 * normal(*x.shape[1:])
    own = [normal(N, Hkv, 16) for _ in range(2 * case.own_router)]
    return [x.to(case.device, case.dtype) for x in (q, k, v, *own, w, d_out)]


ROUTING = "routing_q", "routing_k"


def head_scaling_of(case: Case) -> list[torch.Tensor]:
    """The factor of every key/value head, float64 [Hkv], a leaf; nothing if they are not learned."""
    heads = case.heads[1]
    factors = torch.linspace(0.5, 1.5, heads, dtype=torch.float64, device=case.device)
    return [factors.requires_grad_()] if case.learned_scaling else []


def attend_alone(case: Case) -> list[torch.Tensor]:
    """Output and gradients of inputs, the summary query (zero for full attention) and factors, in float64."""
    *rows, w, d_out = (x.double() for x in inputs_of(case))
    factors = head_scaling_of(case)
    leaves = [*(x.requires_grad_() for x in (*rows, w)), *factors]
    q, k, v, *own = (x[None] for x in rows)
    if case.kind == "dash":
        cu_seqlens = case.cu_seqlens.to(case.device)
        settings = case.settings | dict(zip(ROUTING, own, strict=False))
        for factor in factors:
            settings["scaling_factor"] *= factor
        out = dash_attention(q, k, v, w, cu_seqlens=cu_seqlens, backend="reference", **settings)
    else:
        documents = []
        for start, end in itertools.pairwise(case.bounds):
            parts = (x[:, start:end].transpose(1, 2) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            documents.append(attended.transpose(1, 2))
        out = torch.cat(documents, dim=1)
    gradients = torch.autograd.grad(out[0], leaves, d_out, allow_unused=True)
    return [out[0].detach(), *(torch.zeros_like(w) if g is None else g for g in gradients)]


def attend_together(cases: dict[str, Case], folder: str) -> None:
    """Save what `attend_alone` gives to `<folder>/<name>.pt`, and every rank's traffic to `<name>_<rank>.pt`."""
    size = int(os.environ["WORLD_SIZE"])
    if any(case.device == "cuda" for case in cases.values()):
        dist.init_process_group("gloo")  # the ranks share one GPU, which NCCL refuses
    else:
        if any(case.backend == "triton" for case in cases.values()):
            os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
            from tests.ops.poison import poison
            from tests.ops.quick_interpreter import quicken

            quicken(pytest.MonkeyPatch())
            poison(pytest.MonkeyPatch())
        init_process_groups(read_launch(os.environ), ParallelConfig(context=size))
    for name, case in cases.items():
        with _every_stage_by_pair() if case.by_pair else contextlib.nullcontext():
            results, traffic = _attend_rank(case, ContextGroup(dist.group.WORLD))
        rank = dist.get_rank()
        torch.save(traffic, Path(folder) / f"{name}_{rank}.pt")
        if rank == 0:
            torch.save(results, Path(folder) / f"{name}.pt")
    destroy_process_groups()


@contextlib.contextmanager
def _every_stage_by_pair() -> Iterator[None]:
    """Meanwhile pairs are taken whatever tiles list, and must have been at the end."""
    # late, when it is settled whether kernels are interpreted
    from dash_megatron.ops.kernels import attend, backward_q, pair_slabs, sharded

    taken: list[bool] = []

    def launches(*args: Any, **kwargs: Any) -> Any:
        return find_launches(*args, **kwargs)._replace(
            attend_pairs_above=0, backward_pairs_above=0, pairs_above=0
        )

    def plan_and_note(*args: Any) -> Any:
        plan = pair_slabs.plan_slabs(*args)
        taken.append(plan is not None and plan.slot[-1].item() > 0)
        return plan

    find_launches = sharded.find_launches
    with (
        mock.patch.object(sharded, "find_launches", launches),
        mock.patch.object(attend, "plan_slabs", plan_and_note),
        mock.patch.object(backward_q, "plan_slabs", plan_and_note),
    ):
        yield
    assert sum(taken) >= 2, "forward and backward went over pairs"


def _attend_rank(case: Case, group: ContextGroup) -> tuple[list[torch.Tensor], dict[str, Any]]:
    whole = inputs_of(case)
    chunk_size = CHUNK if case.kind == "dash" else None
    shard = shard_sequence(case.cu_seqlens, group.rank, group.size, chunk_size, case.query_pool)
    shard = shard.map(lambda x: x.to(case.device))
    *rows, w = [x[shard.token].clone() for x in whole[:-2]] + [whole[-2].clone()]
    leaves = [*(x.requires_grad_() for x in (*rows, w)), *head_scaling_of(case)]
    if case.comm == "a2a":
        out = _attend_heads(case, leaves, group)
    else:
        out = _attend_chunks(case, leaves, shard, group)
    sent = dict(group.bytes_sent)
    gradients = torch.autograd.grad(out, leaves, whole[-1][shard.token], allow_unused=True)
    traffic = {"forward": sent["forward"], "backward": group.bytes_sent["backward"], "shard": shard}
    assert sent["backward"] == 0
    assert group.bytes_sent["forward"] == sent["forward"]
    results = []
    for local, leaf in zip((out.detach(), *gradients), (out, *leaves), strict=True):
        local = torch.zeros_like(leaf) if local is None else local
        total = torch.zeros(case.bounds[-1], *local.shape[1:], dtype=local.dtype)
        if any(leaf is whole_leaf for whole_leaf in leaves[len(rows) :]):
            total = local.cpu()
        else:
            total[shard.token.cpu()] = local.cpu()
        dist.all_reduce(total)
        results.append(total)
    return results, traffic


def _attend_heads(case: Case, leaves: list[torch.Tensor], group: ContextGroup) -> torch.Tensor:
    *rows, w = leaves[: 4 + 2 * case.own_router]
    q, k, v, *own = heads_for_rows(group, *rows)
    w = w.split(k.shape[1])[group.rank]
    if case.kind == "dash":
        settings = case.settings | {name: x[None] for name, x in zip(ROUTING, own, strict=False)}
        for factors in leaves[len(rows) + 1 :]:
            settings["scaling_factor"] *= factors.split(k.shape[1])[group.rank]
        out = dash_attention(
            q[None], k[None], v[None], w, cu_seqlens=case.cu_seqlens, backend=case.backend, **settings
        )[0]
    else:
        parts = []
        for start, end in itertools.pairwise(case.bounds):
            piece = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(
                F.scaled_dot_product_attention(*piece, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            )
        out = torch.cat(parts)
    return rows_for_heads(group, out)


def _attend_chunks(case: Case, leaves: list[torch.Tensor], shard: Any, group: ContextGroup) -> torch.Tensor:
    router = Router(**case.settings)
    q, k, v, *own = leaves[: 3 + 2 * case.own_router]
    w, *factors = leaves[3 + len(own) :]
    for factor in factors:
        router = router._replace(scaling_factor=router.scaling_factor * factor)
    out, _ = sharded_dash_attention(
        q,
        k,
        v,
        w,
        router,
        shard.chunks,
        group,
        exchange=case.comm,
        backend=case.backend,
        **dict(zip(ROUTING, own, strict=False)),
    )
    return out
