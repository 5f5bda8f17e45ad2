"""`study dispersion`: over how many chunks a router's probability spreads as context grows, by entmax and by softmax.

Letters: S queries, G query heads that share chunks, c chunks, C tokens of a chunk, D head dim.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dash_megatron.files import write_whole
from dash_megatron.layers import DashCoreAttention
from dash_megatron.ops.entmax import entmax
from dash_megatron.ops.pooling import pool_queries
from dash_megatron.ops.reference import summarize
from dash_megatron.ops.types import Router

ALPHAS = {"softmax": None, "1.5-entmax": 1.5, "2-entmax": 2.0}
"""Alpha of each way to probabilities."""
GROUPS = (1, 4, 16)
"""Query heads whose probabilities are averaged."""
CHUNKS = tuple(2**power for power in range(4, 13))
"""Numbers of past chunks."""
QUERIES = 128
HEAD_DIM, CHUNK_SIZE, TOPICS, NEEDLE = 128, 64, 10, 5.0
# A run's documents are shorter.
_RUN_CHUNKS = (4, 8, *CHUNKS)
_MEASURES = ("effective_chunks", "largest", "density")

INPUTS = {
    "random": "unrelated queries and summaries: scores are N(0, 1), and no chunk matters more than others",
    "needle": f"the same, and one chunk that every query scores {NEEDLE:g}: how long is it found?",
    "topics": f"chunks and queries of {TOPICS} topics, the inputs of the kernels' benchmark: relevant chunks grow with context",
}


class _Source(NamedTuple):
    """Scores of one input, at each number of chunks."""

    about: str
    groups: tuple[int, ...]
    chunks: list[int]
    scores: list[list[Tensor]]
    """For each number of chunks, tensors [S, G, c]; all their queries count alike."""


def study_dispersion(
    run_dir: str | Path | None,
    *,
    output: str | Path,
    seed: int = 0,
    step: int | None = None,
    length: int | None = None,
    device: str = "auto",
) -> list[Path]:
    """Measure how far routing disperses on made-up inputs and, where a run is given, on its queries and summaries.

    Args:
        run_dir: a run with routers; None: made-up inputs only.
        output: folder.
        seed: of the made-up inputs.
        step, length, device: of the run, as in `studies.routing.open_run`.

    Returns:
        The files written: dispersion.json and dispersion.png.

    Raises:
        FileNotFoundError, ValueError: as in `studies.routing.open_run`.
        ValueError: `step` or `length` without a run.
    """
    if run_dir is None and (step is not None or length is not None):
        raise ValueError("--step and --length are of a run's checkpoint and document; give RUN_DIR too")
    # first, as what is wrong with a run is to be told at once
    of_run = {} if run_dir is None else {"run": _of_run(run_dir, step, length, device)}
    inputs = {name: _measure(source) for name, source in _made_up(seed)} | of_run
    report = {"seed": seed, "queries": QUERIES, "inputs": inputs}
    folder = Path(output)
    write_whole(folder / "dispersion.json", json.dumps(report, indent=1) + "\n", make_folder=True)
    from dash_megatron.studies.dispersion_pictures import draw_dispersion

    return [folder / "dispersion.json", draw_dispersion(report, folder / "dispersion.png")]


def group_mean(z_SGc: Tensor, alpha: float | None) -> Tensor:
    """Mean over the group of entmax, or of softmax where alpha is None: [S, c]."""
    p_SGc = z_SGc.softmax(-1) if alpha is None else entmax(z_SGc, alpha)
    return p_SGc.mean(1)


def dispersion(p_Sc: Tensor) -> dict[str, Tensor]:
    """How far each distribution is spread: [S] each.

    Returns:
        `effective_chunks`: exp(entropy); `largest`: the largest probability; `density`: share of chunks with any.
    """
    return {
        "effective_chunks": torch.special.entr(p_Sc).sum(-1).exp(),
        "largest": p_Sc.amax(-1),
        "density": (p_Sc > 0).float().mean(-1),
    }


def _measure(source: _Source) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for name, alpha in ALPHAS.items():
        for group in source.groups:
            rows = []
            for scores in source.scores:
                parts = [dispersion(p) for z in scores for p in _groups(z, group, alpha)]
                rows.append([torch.cat([part[key] for part in parts]).mean().item() for key in _MEASURES])
            columns = [[float(f"{x:.4g}") for x in column] for column in zip(*rows, strict=True)]
            curves.setdefault(name, {})[str(group)] = dict(zip(_MEASURES, columns, strict=True))
    return {"about": source.about, "chunks": source.chunks, "curves": curves}


def _groups(z_SGc: Tensor, size: int, alpha: float | None) -> Iterator[Tensor]:
    """Group means of `size` heads: of the first ones, or of each alone."""
    for z in z_SGc.split(1, dim=1) if size == 1 else [z_SGc[:, :size]]:
        yield group_mean(z, alpha)


def _made_up(seed: int) -> Iterable[tuple[str, _Source]]:
    """Sources of `INPUTS`. Fewer chunks are the first of more, as a shorter context is the beginning of a longer."""
    heads, most = max(GROUPS), max(CHUNKS)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, summary = normal(QUERIES, heads, HEAD_DIM), normal(most, HEAD_DIM)
    random = q @ summary.T / math.sqrt(HEAD_DIM)
    needle = random.clone()
    needle[..., 0] = NEEDLE
    topic = normal(TOPICS, HEAD_DIM)
    summary_query = 0.1 * normal(HEAD_DIM)
    topic_c = torch.randint(TOPICS, (most,), generator=generator)
    k_cCD = torch.stack([topic[chunk] + normal(CHUNK_SIZE, HEAD_DIM) for chunk in topic_c.tolist()])
    filled_cC = torch.ones(most, CHUNK_SIZE, dtype=torch.bool)
    summary_cD = summarize(k_cCD[None], filled_cC, summary_query[None])[0]
    wanted = torch.randint(TOPICS, (QUERIES,), generator=generator)
    q = topic[wanted, None] + 0.35 * normal(QUERIES, heads, HEAD_DIM)
    topics = q @ summary_cD.T / math.sqrt(HEAD_DIM)
    for name, z_SGc in (("random", random), ("needle", needle), ("topics", topics)):
        scores = [[z_SGc[..., :count]] for count in CHUNKS]
        yield name, _Source(INPUTS[name], GROUPS, list(CHUNKS), scores)


def _of_run(run_dir: str | Path, step: int | None, length: int | None, device: str) -> dict[str, Any]:
    from dash_megatron.studies.routing import open_run

    found: dict[int, list[Tensor]] = {}

    def observe(
        layer: int, core: DashCoreAttention, q: Tensor, k: Tensor, w: Tensor,
        routing_q: Tensor | None, routing_k: Tensor | None,
    ) -> None:  # fmt: skip
        seen_q, seen_k = q if routing_q is None else routing_q, k if routing_k is None else routing_k
        for count, z in _scores_by_chunks(seen_q, seen_k, w, core.router):
            found.setdefault(count, []).append(z.cpu())

    with open_run(run_dir, step, length, device) as run:
        run.observe(observe)
    group = next(iter(found.values()))[0].shape[1]
    about = (
        f"{run.name}, trained with alpha = {run.config.attention.alpha:g} at {run.config.data.seq_length:,} tokens, "
        f"on a document of {len(run.document):,}: mean over layers and kv heads"
    )
    source = _Source(about, tuple(sorted({1, group})), list(found), list(found.values()))
    return _measure(source)


def _scores_by_chunks(
    q: Tensor, k: Tensor, w: Tensor, router: Router, most: int = QUERIES
) -> Iterator[tuple[int, Tensor]]:
    """For growing numbers n of chunks, scores [S, G, n] of queries that select among n to 9/8 n, on the last n, by kv head."""
    chunk_size = router.chunk_size
    num_tokens, num_heads = q.shape[1], k.shape[2]
    full = num_tokens // chunk_size
    k_HcCD = k[0, : full * chunk_size].float().unflatten(0, (full, chunk_size)).permute(2, 0, 1, 3)
    filled_cC = torch.ones(full, chunk_size, dtype=torch.bool, device=k.device)
    summary_HcD = summarize(k_HcCD, filled_cC, w.float())
    q_NHGD = pool_queries(q, router.query_pool)[0].float().unflatten(1, (num_heads, -1))
    if router.pool_heads:
        q_NHGD = q_NHGD.mean(2, keepdim=True)
    local = router.local_chunks
    for count in _RUN_CHUNKS:
        first = (local + count) * chunk_size
        end = min(num_tokens, first + (count // 8 + 1) * chunk_size)
        if first >= num_tokens:
            return
        tokens = torch.linspace(first, end - 1, min(most, end - first), device=q.device).long()
        own = tokens // chunk_size
        window = own[:, None] - local - count + torch.arange(count, device=q.device)
        for head in range(num_heads):
            factor = router.of_heads(slice(head, head + 1)).scaling_factor
            scale = torch.as_tensor(factor, dtype=torch.float32).item() / math.sqrt(q.shape[-1])
            yield count, scale * torch.einsum("sgd,snd->sgn", q_NHGD[tokens, head], summary_HcD[head, window])
