"""Memory of one GPU: what a layout keeps for weights, optimizer and activations, and what one layer's backward needs at its worst."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dash_megatron.config import Config
from dash_megatron.config.flops import norm_parameters, parameter_count, routing_rows
from dash_megatron.planning.baseline_times import BRANCH_BYTES
from dash_megatron.planning.kernel_times import PAIRS_ABOVE
from dash_megatron.planning.layout import Hardware, Layout
from dash_megatron.planning.traffic import ContextShape
from dash_megatron.planning.workspaces import attends_elsewhere, key_bytes, list_bytes, pair_bytes

MAX_LOGITS = 2**29
"""Logits of one process alive at once, in elements: `dash_megatron.layers.vocabulary_loss.MAX_LOGITS`."""
MAX_ACTIVATED = 2**29
"""Activations of a recomputed layer's feed-forward part alive at once, in elements: `dash_megatron.layers.recompute.MAX_ACTIVATED`."""
BUCKET_ELEMENTS = 500_000_000
"""Gradients that ZeRO reduces together, at most: `dash_megatron.training.engine.BUCKET_ELEMENTS`."""
BUCKET_BYTES = 8
"""Bytes for each element of the bucket that is reduced in float32. ZeRO-3 fills a float32 bucket and orders a copy of it by rank; ZeRO-2
flattens a copy of a bf16 bucket and widens that, or flattens one of a float32 bucket."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default bound on parameters that ZeRO-3 keeps gathered."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one GPU at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    """ZeRO's communication buffers and gathered parameters."""
    activations: float
    """Kept from forward to backward, all layers."""
    working: float
    """The larger of one layer's recomputation and backward, with its lists and exchange, and one piece of logits."""
    reserved: float

    @property
    def states(self) -> float:
        """Weights, gradients, optimizer and buffers: they do not depend on the tokens of a micro-batch, and are known exactly."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return self.states + self.activations + self.working + self.reserved


def first_products(config: Config) -> int:
    """Weights of the first matrix product of every feed-forward part, which `selective` repeats."""
    return config.model.layers * 2 * config.model.hidden_size * config.model.ffn_hidden_size


def rank_parameters(config: Config, layout: Layout, vocab_size: int) -> float:
    """Parameters of one tensor-parallel rank before ZeRO: norms on every rank, everything else split."""
    norms = norm_parameters(config)
    return (parameter_count(config, vocab_size) - norms) / layout.tensor + norms


def _state_bytes(config: Config, layout: Layout, parameters: float) -> dict[str, float]:
    """Weights, gradients, optimizer states and buffers.

    bf16: bf16 weights and float32 master weights and moments. Stage 1 accumulates in float32 beside the bf16 gradient
    of the backward pass, of which a first micro-batch has little while activations are there; stages 2 and 3 in the rank's own
    shard; stage 0 keeps one bf16 gradient.
    """
    bf16, stage, shards = config.training.precision == "bf16", layout.zero_stage, layout.shards
    element = 2 if bf16 else 4
    optimizer = parameters * (12 if bf16 else 8)
    whole_gradients = element if stage == 0 or not bf16 else 4 + element * (micro_batches(config, layout) > 1)
    buckets = 0.0
    if stage >= 2:
        buckets = min(BUCKET_ELEMENTS, parameters) * BUCKET_BYTES
    if stage == 3:
        buckets += min(LIVE_PARAMETERS, parameters) * element
    return {
        "weights": parameters * element / (shards if stage == 3 else 1),
        "gradients": parameters * (4 / shards if stage >= 2 else whole_gradients),
        "optimizer": optimizer / (shards if stage else 1),
        "buckets": buckets,
    }


def micro_batches(config: Config, layout: Layout) -> int:
    """Forward and backward passes of a step."""
    return config.training.global_batch // (config.training.micro_batch * layout.data)


def _exchange_bytes(shape: ContextShape, layout: Layout) -> tuple[float, float]:
    """Buffers of one layer's context exchange: forward and backward."""
    if layout.context == 1:
        return 0.0, 0.0
    own = shape.kv_bytes + shape.summary_bytes
    # gathered K and V; in the backward also dK and dV in float32 and in the input dtype, and what all ranks send
    backward = 3 * own + shape.kv_float32_bytes
    if layout.context_comm in ("all_gather", "sparse"):
        # `sparse` fetches all chunks until the router has learnt to select
        return layout.context * own, layout.context * backward
    if layout.context_comm == "p2p":
        # the sums of queries and of the shard that is here, and what a piece of it adds; also those of the own shard and, from
        # three ranks on, what has come and what leaves
        queries_float32 = 4 * shape.tokens * shape.heads * shape.head_dim
        keys_float32 = (3 if layout.context == 2 else 5) * shape.kv_float32_bytes
        return 2 * own, 2 * own + keys_float32 + 2 * queries_float32
    heads = 2 * (shape.heads + shape.kv_heads + shape.routing_heads) * shape.head_dim * shape.element_bytes
    return shape.tokens * heads, 2 * shape.tokens * heads


def _layer_bytes(config: Config, layout: Layout, shape: ContextShape) -> dict[str, float]:
    """Activations of one layer on one rank, by part."""
    model, tokens, b, kind = config.model, shape.tokens, shape.element_bytes, config.attention.kind
    listed = config.attention.fixed_lists is not None
    stream_tokens = tokens / layout.tensor if layout.sequence else tokens
    normed = model.qk_norm
    heads = (2 + normed) * (shape.heads + shape.kv_heads) + 2 * (1 + normed) * shape.routing_heads
    return {
        "stream": stream_tokens * model.hidden_size * b,
        # q, k, v and the output, and the router's own q and k; with `qk_norm` also q and k from before it
        "attention": tokens * heads * shape.head_dim * b,
        # the means that the router sees
        "pooled": tokens
        * shape.pooled_heads
        * shape.head_dim
        * b
        * (kind == "dash" and config.attention.query_pool > 1),
        # threshold and log-sum-exp of every query head, float32
        "row_state": tokens * shape.heads * 8,
        # baselines copy their operands and output into whole chunks first
        "laid_out": tokens * 2 * (shape.heads + shape.kv_heads) * shape.head_dim * b * listed,
        "branches": tokens * shape.heads * shape.head_dim * BRANCH_BYTES.get(kind, 0),
        # both halves of the input of a compiled SwiGLU, and its output
        "feed_forward": tokens * 3 * model.ffn_hidden_size / layout.tensor * b,
    }


def _loss_bytes(config: Config, layout: Layout, vocab_size: int) -> float:
    """A piece of logits, which its gradient replaces, and gradients of the table, float32, and of the hidden states."""
    shape = context_shape(config, layout)
    logits = shape.tokens * vocab_size / layout.tensor
    piece = logits / math.ceil(logits / MAX_LOGITS) * shape.element_bytes
    table = config.model.hidden_size * vocab_size / layout.tensor * 4
    return piece + table + _layer_bytes(config, layout, shape)["stream"]


def feed_forward_pieces(config: Config, layout: Layout) -> int:
    """In how many pieces, one after the other, the feed-forward part of a layer is computed and differentiated."""
    if layout.recompute != "full" or layout.zero_stage == 3:
        return 1
    activated = context_shape(config, layout).tokens * config.model.ffn_hidden_size / layout.tensor
    return math.ceil(activated / MAX_ACTIVATED)


def context_shape(config: Config, layout: Layout) -> ContextShape:
    """What one rank holds of one layer's attention in one micro-batch."""
    return ContextShape(
        context=layout.context,
        tokens=config.training.micro_batch * config.data.seq_length // layout.context,
        heads=config.model.heads // layout.tensor,
        kv_heads=config.model.kv_heads // layout.tensor,
        routing_heads=config.model.kv_heads // layout.tensor * (routing_rows(config) > 0),
        pool_heads=config.attention.pool_heads,
        head_dim=config.model.channels_per_head,
        chunk_size=config.attention.chunk_size,
        element_bytes=2 if config.training.precision == "bf16" else 4,
    )


def _kept_of_attention(config: Config, layout: Layout, parts: dict[str, float], listed: float) -> float:
    """What one layer's attention keeps for its backward beside its operands and output."""
    lists = list_bytes(config, layout, listed)[0] if config.attention.kind != "full" else 0.0
    kept = parts["row_state"] + parts["laid_out"] + parts["branches"] + lists
    # means of queries in which other ranks have a part are kept, not computed again
    return kept + parts["pooled"] * attends_elsewhere(layout)


def _whole_layer(parts: dict[str, float]) -> float:
    return 4 * parts["stream"] + parts["attention"] + parts["feed_forward"]


def _feed_forward_part(parts: dict[str, float]) -> float:
    """Norm, both halves and the activation."""
    return parts["stream"] + parts["feed_forward"]


def _attention_backward(
    config: Config, layout: Layout, parts: dict[str, float], listed: float, gpu: str
) -> float:
    """What one layer's attention needs in its backward beside what is kept: gradients, lists, exchange, and sums over pairs."""
    shape = context_shape(config, layout)
    heads = 2 * (shape.heads + shape.kv_heads + shape.routing_heads)
    gradients = shape.tokens * heads * shape.head_dim * shape.element_bytes + 2 * parts["pooled"]
    lists, keys, pairs = 0.0, 0.0, dict.fromkeys(PAIRS_ABOVE, 0.0)
    if config.attention.kind != "full":
        lists = list_bytes(config, layout, listed)[1]
        keys, pairs = key_bytes(config, layout, listed), pair_bytes(config, layout, listed, gpu)
    # Gradients of keys and values that come with those of queries, float32, stay until the pass to keys and values is done. Of keys
    # of other ranks they are the gradients of the exchange's buffer.
    key_sums = 8 * shape.tokens * shape.kv_heads * shape.head_dim
    key_sums *= pairs["queries"] > 0 and not attends_elsewhere(layout)
    by_pair = max(pairs["queries"], keys + key_sums)
    return max(gradients + lists + max(_exchange_bytes(shape, layout)) + by_pair, pairs["attend"])


def _feed_forward_backward(config: Config, layout: Layout, parts: dict[str, float]) -> float:
    """What one layer's feed-forward part needs in its backward: gradients of its input, of both halves and of the activation."""
    pieces = feed_forward_pieces(config, layout)
    if pieces == 1:
        return _feed_forward_part(parts) * (2 if layout.recompute == "selective" else 1)
    # what one piece computes again, and its gradients; the whole input's gradient; float32 sums of the weights' gradients
    weights = 3 * config.model.hidden_size * config.model.ffn_hidden_size / layout.tensor
    return 2 * _feed_forward_part(parts) / pieces + parts["stream"] + 4 * weights


def _gathered_early(config: Config, layout: Layout) -> float:
    """Keys and values of all ranks, which attention's backward will need, while the feed-forward part's runs."""
    early = layout.context_comm == "all_gather" and layout.recompute != "attention"
    return layout.context * context_shape(config, layout).kv_bytes * (early and layout.context > 1)


def _layer_backward(
    config: Config, layout: Layout, parts: dict[str, float], kept_attention: float, listed: float, gpu: str
) -> float:
    """What one layer's backward needs at its worst moment beside what is kept, what it computes again included."""
    worst = max(
        _attention_backward(config, layout, parts, listed, gpu),
        _feed_forward_backward(config, layout, parts) + _gathered_early(config, layout),
    )
    if layout.sequence:
        shape = context_shape(config, layout)
        # a product's input is gathered again, and its gradient is whole until it is dealt out to ranks
        worst += 2 * shape.tokens * config.model.hidden_size * shape.element_bytes
    if layout.recompute == "attention":
        return worst + kept_attention
    if layout.recompute == "full":
        pieces = feed_forward_pieces(config, layout)
        again = _whole_layer(parts) - (_feed_forward_part(parts) if pieces > 1 else 0.0)
        return worst + (again + kept_attention)
    return worst


def memory_use(
    config: Config,
    layout: Layout,
    vocab_size: int,
    hardware: Hardware | None = None,
    listed: float = 1.0,
) -> MemoryUse:
    """Bytes on one GPU at the worst moment of a training step.

    Args:
        config: model, lengths and precision; its own layout is ignored.
        layout: the split.
        vocab_size: rows of the embedding table.
        hardware: what is reserved, and a correction of activations; None: defaults.
        listed: share of past chunks that tiles list, which decides long lists. Training starts at 1.
    """
    hardware = hardware or Hardware()
    parts = _layer_bytes(config, layout, context_shape(config, layout))
    kept_attention = _kept_of_attention(config, layout, parts, listed)
    kept = (
        config.model.layers
        * {
            "none": _whole_layer(parts) + kept_attention,
            "selective": _whole_layer(parts) + kept_attention - _feed_forward_part(parts),
            "attention": _whole_layer(parts),
            "full": parts["stream"],
        }[layout.recompute]
    )
    parameters = rank_parameters(config, layout, vocab_size)
    # a first micro-batch's bf16 gradients are all there only when its activations are gone
    late_gradients = parameters * 2 * (config.training.precision == "bf16" and layout.zero_stage == 1)
    working = max(
        _layer_backward(config, layout, parts, kept_attention, listed, hardware.gpu),
        _loss_bytes(config, layout, vocab_size),
        late_gradients - kept,
    )
    return MemoryUse(
        **_state_bytes(config, layout, parameters),
        activations=kept * hardware.activation_factor,
        working=working * hardware.activation_factor,
        reserved=hardware.reserved_gib * 2**30,
    )
