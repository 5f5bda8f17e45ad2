"""How long the top-k baselines' attention takes: kernels by their lists, and scores of pooled keys by counting.

Attention to listed chunks runs in DashAttention's kernels, without its router, so its time is theirs. Chunks are scored
in a kernel and NSA's compressed keys attended to in torch's; of these, operations and bytes are counted from the code in
`ops/`. Documents count as whole sequences.
"""

from __future__ import annotations

import dataclasses

from dash_megatron.config import AttentionConfig, InfLLMv2Config
from dash_megatron.planning.kernel_times import AttentionSeconds, AttentionWork, dash_seconds

MAX_SHARED_BIAS = 2**28
"""Elements of a mask that the backward of NSA's compressed branch shares: `dash_megatron.ops.topk.nsa.MAX_SHARED_BIAS`."""

NOTE = (
    "attention of infllmv2 and nsa: kernels by the length of their lists, the rest by operations and bytes counted; beside the "
    "one measured step of each, 6% too little time for infllmv2 and 61% for nsa"
)
SCORE_FLOPS = 200e12
"""Operations per second of half-precision products on an H200, slowed down by the exponentials among them: assumed."""
SELECTION_BYTES = 200
"""Read and written for each past chunk scored: scores and int64 keys of future chunks too, masked and searched."""
MASK_BYTES = 16
"""The same for each visible pair of query and compressed key, once for all heads: mask, bias, and future pairs of a piece."""
COMPRESS_PASSES = 13
"""How often as many float32 numbers as there are in the keys are read or written to compress keys and values."""
COMPRESS_BACKWARD_PASSES = 24
"""The same in the backward."""
BRANCH_BYTES = {"nsa": 18}
"""Kept of an element of the attention's output beside it: three branches in bf16, and in float32 to be multiplied by their gates."""


def share_of_pairs(chunks: int, selected: int) -> float:
    """Pairs in at most `selected` chunks a token over causal pairs, for documents of `chunks` chunks."""
    return 2 * sum(min(selected, own) for own in range(1, chunks + 1)) / (chunks * (chunks + 1))


def _lists(attention: AttentionConfig) -> InfLLMv2Config:
    lists = attention.fixed_lists
    assert lists is not None
    return lists


def _selected_chunks(attention: AttentionConfig) -> int:
    """Chunks of the fixed list of `infllmv2`, or of NSA's second branch, the own one included."""
    lists = _lists(attention)
    return lists.initial_blocks + lists.local_blocks + lists.top_k


def _window_chunks(attention: AttentionConfig) -> int:
    """Chunks of NSA's third branch, the own one included."""
    return attention.nsa.window // attention.chunk_size + 1


def density_of_lists(attention: AttentionConfig, context: float) -> float:
    """Selected over available chunks, as metrics report them, of tokens that see `context` tokens on average.

    Documents count as equally long. A chunk of NSA's two lists counts once; one of its `top_k` may also lie in the window,
    which is not counted.
    """
    chunks = max(1, round(2 * context / attention.chunk_size))
    selected = _selected_chunks(attention)
    if attention.kind == "nsa":
        selected += max(0, _window_chunks(attention) - attention.nsa.local_blocks)
    return share_of_pairs(chunks, selected)


def baseline_seconds(
    work: AttentionWork,
    attention: AttentionConfig,
    chunks: int,
    visited_over_selected: float,
    memory_bandwidth: float,
) -> AttentionSeconds:
    """Time of one layer's attention of `attention.kind` infllmv2 or nsa on one rank.

    Args:
        work: the rank's share; `selected` and `visited` are ignored, lists have a fixed length here.
        attention: the section, whose kind is one of the two.
        chunks: of a sequence.
        visited_over_selected: pairs in chunks that tiles visit over pairs selected. A window is the same for a whole tile.
        memory_bandwidth: bytes per second.
    """
    parts = [
        _listed_seconds(work, share_of_pairs(chunks, _selected_chunks(attention)), visited_over_selected),
        _scoring_seconds(work, attention, memory_bandwidth),
    ]
    if attention.kind == "nsa":
        parts.append(_listed_seconds(work, share_of_pairs(chunks, _window_chunks(attention)), 1.0))
    return AttentionSeconds(sum(part.forward for part in parts), sum(part.backward for part in parts))


def _listed_seconds(work: AttentionWork, share: float, visited_over_selected: float) -> AttentionSeconds:
    """Attention to the chunks of a list, by the stages of DashAttention's kernels that do not route."""
    visited = work.pairs * min(1.0, share * visited_over_selected)
    return dash_seconds(dataclasses.replace(work, selected=work.pairs * share, visited=visited), routes=False)


def _scoring_seconds(
    work: AttentionWork, attention: AttentionConfig, memory_bandwidth: float
) -> AttentionSeconds:
    """Scores of chunks and the selection from them; in NSA also compression, the branch that attends, and their backward."""
    scored = _lists(attention)
    pairs = work.pairs / scored.kernel_stride
    product = 2 * work.heads * pairs * work.head_dim / SCORE_FLOPS
    # every pooled key once for the normalizer, and once for each chunk that it overlaps
    overlaps = 1 + (scored.kernel_size - scored.kernel_stride) / attention.chunk_size
    selection = SELECTION_BYTES * work.kv_heads * work.pairs / attention.chunk_size / memory_bandwidth
    scoring = (1 + overlaps) * product + selection
    if attention.kind == "infllmv2":
        return AttentionSeconds(scoring, 0.0)
    branch = 2 * product + MASK_BYTES * pairs / memory_bandwidth
    keys = 4 * work.rows * work.kv_heads * work.head_dim / memory_bandwidth
    # where biases are too many to be shared, each layer makes its own, in the backward again
    again = branch if pairs > MAX_SHARED_BIAS else 0.0
    return AttentionSeconds(
        scoring + branch + COMPRESS_PASSES * keys, again + 5 * product + COMPRESS_BACKWARD_PASSES * keys
    )
