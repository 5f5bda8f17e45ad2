"""How long the top-k baselines' attention takes: kernels by their lists, and scores of pooled keys by counting.

Attention to listed chunks runs in DashAttention's kernels, without its router, so its time is theirs. Pooled keys are
scored by plain torch in float32; no such time was measured, so operations and bytes are counted from the code in
`ops/`. Documents count as whole sequences.
"""

from __future__ import annotations

import dataclasses

from dash_megatron.config import AttentionConfig
from dash_megatron.ops.blocks import MAX_KEPT_SCORES
from dash_megatron.planning.kernel_times import AttentionSeconds, AttentionWork, dash_stages

BASELINES = ("infllmv2", "nsa")
"""Kinds of attention whose lists have a fixed length."""

NOTE = (
    "attention of infllmv2 and nsa: kernels by the length of their lists, scores of pooled keys by operations and bytes "
    "counted, never compared with a measurement"
)
FLOAT32_FLOPS = 40e12
"""Operations per second of float32 matrix products without TF32: 60% of an H200's."""
SCORE_PASSES = 8
"""Times that scores of all heads are read or written: product, mask, softmax, mask again, sum over a group."""
BRANCH_PASSES = 9
"""The same in NSA's branch, which also multiplies them with values."""
BACKWARD_PASSES = 10
"""And in that branch's backward."""
SORT_BYTES = 100
"""Read and written for each chunk scored, to pool scores and to sort them stably."""


def share_of_pairs(chunks: int, selected: int) -> float:
    """Pairs in at most `selected` chunks a token over causal pairs, for documents of `chunks` chunks."""
    return 2 * sum(min(selected, own) for own in range(1, chunks + 1)) / (chunks * (chunks + 1))


def selected_chunks(attention: AttentionConfig) -> int:
    """Chunks of the fixed list of `infllmv2`, or of NSA's second branch, the own one included."""
    chosen = attention.nsa if attention.kind == "nsa" else attention.infllmv2
    return chosen.initial_blocks + chosen.local_blocks + chosen.top_k


def window_chunks(attention: AttentionConfig) -> int:
    """Chunks of NSA's third branch, the own one included."""
    return attention.nsa.window // attention.chunk_size + 1


def density_of_lists(attention: AttentionConfig, context: float) -> float:
    """Selected over available chunks, as metrics report them, of tokens that see `context` tokens on average.

    Documents count as equally long. A chunk of NSA's two lists counts once; one of its `top_k` may also lie in the window,
    which is left out.
    """
    chunks = max(1, round(2 * context / attention.chunk_size))
    selected = selected_chunks(attention)
    if attention.kind == "nsa":
        selected += max(0, window_chunks(attention) - attention.nsa.local_blocks)
    return share_of_pairs(chunks, selected)


def baseline_seconds(
    work: AttentionWork,
    attention: AttentionConfig,
    chunks: int,
    listed_over_selected: float,
    memory_bandwidth: float,
) -> AttentionSeconds:
    """Time of one layer's attention of `attention.kind` infllmv2 or nsa on one rank.

    Args:
        work: the rank's share; `listed` is ignored, lists have a fixed length here.
        attention: the section, whose kind is one of the two.
        chunks: of a sequence.
        listed_over_selected: pairs in chunks that tiles list over pairs selected. A window is the same for a whole tile.
        memory_bandwidth: bytes per second.
    """
    nsa = attention.kind == "nsa"
    share = min(1.0, listed_over_selected * share_of_pairs(chunks, selected_chunks(attention)))
    parts = [_listed_seconds(work, share), _scoring_seconds(work, attention, memory_bandwidth)]
    if nsa:
        parts.append(_listed_seconds(work, share_of_pairs(chunks, window_chunks(attention))))
    return AttentionSeconds(sum(part.forward for part in parts), sum(part.backward for part in parts))


def _listed_seconds(work: AttentionWork, share: float) -> AttentionSeconds:
    """Attention to the chunks of a list, by the stages of DashAttention's kernels that do not route."""
    stages = dash_stages(dataclasses.replace(work, listed=work.pairs * share))
    backward = stages["queries"] + stages["transpose"] + stages["keys"]
    return AttentionSeconds(stages["attend"] / 1e3, backward / 1e3)


def _scoring_seconds(
    work: AttentionWork, attention: AttentionConfig, memory_bandwidth: float
) -> AttentionSeconds:
    """Scores of pooled keys and the choice; in NSA also the branch that attends to them, and its backward."""
    nsa = attention.kind == "nsa"
    stride = attention.nsa.kernel_stride if nsa else attention.infllmv2.kernel_stride
    scores = work.heads * work.pairs / stride
    product = 2 * scores * work.head_dim / FLOAT32_FLOPS
    one_pass = 4 * scores / memory_bandwidth
    choice = SORT_BYTES * work.kv_heads * work.pairs / attention.chunk_size / memory_bandwidth
    if not nsa:
        return AttentionSeconds(product + SCORE_PASSES * one_pass + choice, 0.0)
    forward = 2 * product + BRANCH_PASSES * one_pass + choice
    # more scores than are kept (the blocks hold masked ones too) are computed again
    again = forward if 2 * scores > MAX_KEPT_SCORES else 0.0
    return AttentionSeconds(forward, again + 4 * product + BACKWARD_PASSES * one_pass)
