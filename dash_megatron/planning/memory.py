"""Memory of one GPU: what a layout keeps for weights, optimizer, activations, routing lists and exchanges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dash_megatron.config import Config
from dash_megatron.config.flops import norm_parameters, parameter_count, routing_rows
from dash_megatron.planning.baseline_times import BRANCH_BYTES
from dash_megatron.planning.choices import tile_tokens
from dash_megatron.planning.kernel_times import PAIRS_ABOVE, keys_by_pair, pairs_above
from dash_megatron.planning.layout import Hardware, Layout
from dash_megatron.planning.traffic import ContextShape

MAX_LOGITS = 2**29
"""Logits of one process alive at once, in elements: `dash_megatron.layers.vocabulary_loss.MAX_LOGITS`."""
MAX_ACTIVATED = 2**29
"""Activations of a recomputed layer's feed-forward part alive at once, in elements: `dash_megatron.layers.recompute.MAX_ACTIVATED`."""
MAX_BOUNDED_BYTES = 2 * 2**30
"""Lists up to this size have room for every chunk: `dash_megatron.ops.kernels.geometry.MAX_BOUNDED_BYTES`."""
WORKSPACE_BYTES = 2**31
"""Most bytes of partial results by pair: `dash_megatron.ops.kernels.pair_slabs.WORKSPACE_BYTES`."""
MAX_COUNTS, COUNTED_SLABS, COUNT_BYTES = 2**26, 8, 4
"""Most entries of the table in which pairs are counted, most slabs that it is for where it does not hold all tiles, and bytes of an
entry: constants of `dash_megatron.ops.kernels.pair_slabs`."""
MAX_PAIR_GRADIENT_BYTES = 2**34
"""Most of the float32 gradients of keys and values by pair: `dash_megatron.ops.kernels.backward_q.MAX_PAIR_GRADIENT_BYTES`."""
PLACE_BYTES, PLACES_BYTES = {"attend": 12, "queries": 20}, 2**28
"""Bytes of one pair's places, and of the places of several slabs that are there at once: `dash_megatron.ops.kernels.pair_slabs.new_pairs`."""
PARTS = {1: 1056, 4: 528, 16: 528}
"""By query heads of a group, programs that share a slab of pairs: eight or four for each multiprocessor of the GPU that was timed."""
MAX_PAIRS = 2**26
"""Most log priors by chunk, 8 bytes each: `dash_megatron.ops.kernels.pairs.MAX_PAIRS`."""
KEY_PARTS, LEAST_STEPS = 32 * 132, 16
"""Programs that share the pairs of keys and values on an H100 or H200, and the fewest steps of one:
`dash_megatron.ops.kernels.configs.PAIR_PARTS_PER_MULTIPROCESSOR` and `dash_megatron.ops.kernels.pairs.LEAST_STEPS`."""
MIN_RUN_TILES, MAX_RUN_COUNTS = 8, 2**24
"""Tiles that such a pass counts together, at least, and most counts, 8 bytes each: `dash_megatron.ops.kernels.pairs.MIN_RUN_TILES`
and `dash_megatron.ops.kernels.transpose.MAX_COUNTS`."""
KEYS_A_PROGRAM, ROWS_A_STEP = 64, 64
"""Keys of a program and rows of a step in the launch configurations of that pass; smaller chunks are taken side by side."""
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
        """What does not depend on the tokens of a micro-batch, and is known exactly."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.states + self.activations + self.working + self.reserved


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


def _list_entries(config: Config, layout: Layout) -> tuple[float, float, int]:
    """Entries of one rank's routing lists for which the kernels make room, where that is for every past chunk, and those
    that there are; and the tokens of a tile."""
    model, chunk, rows = config.model, config.attention.chunk_size, config.training.micro_batch
    chunks = config.data.seq_length / chunk
    # the rows of a micro-batch are one packed row, of documents as long as the next power of two
    longest = min(rows * config.data.seq_length, 1 << (config.data.seq_length - 1).bit_length()) / chunk
    tile = tile_tokens(model.heads // model.kv_heads, chunk)
    tiles = model.kv_heads / layout.tensor * (chunk / tile) / layout.context
    return rows * chunks * (longest + 1) / 2 * tiles, rows * chunks * (chunks + 1) / 2 * tiles, tile


def lists_are_counted(config: Config, layout: Layout) -> bool:
    """Whether routing lists are too long to have room for every past chunk, so that the router counts before it writes."""
    entries, _, tile = _list_entries(config, layout)
    return entries * 4 * (1 + tile) > MAX_BOUNDED_BYTES


def _entries_made(config: Config, layout: Layout, listed: float) -> tuple[float, int]:
    """Entries of one rank's routing lists for which there is room, and the tokens of a tile."""
    entries, own, tile = _list_entries(config, layout)
    # lists of a fixed length are as long as they are
    if lists_are_counted(config, layout) or config.attention.fixed_lists:
        entries = own * min(1.0, listed)
    return entries, tile


def list_bytes(config: Config, layout: Layout, listed: float) -> tuple[float, float]:
    """Routing lists of one layer call on one rank: bytes in the forward, and what the backward adds.

    An entry is a chunk number and a log prior per token of its tile; the backward adds the prior's gradient and the
    transposed lists. Where every past chunk fits into 2 GiB, room is made for all, else for the share `listed`.
    """
    entries, tile = _entries_made(config, layout, listed)
    return entries * 4 * (1 + tile), entries * (4 * tile + 16)


def pair_bytes(config: Config, layout: Layout, listed: float, gpu: str) -> dict[str, float]:
    """Workspaces of one layer call on one rank in which attention ("attend") and its gradient ("queries") may go over selected pairs.

    Kernels decide on the device, when the workspace is there already: partial results of a group's heads, up to 2 GiB and no
    more than the pairs that tiles may list where pairs are still taken; places of pairs; in the gradient also float32 sums of
    keys and values, which are the buffer's own where keys come from other ranks. What another GPU than the one timed computes goes
    over tiles alone.
    """
    model, chunk = config.model, config.attention.chunk_size
    group, head_dim = model.heads // model.kv_heads, model.channels_per_head
    found = dict.fromkeys(PAIRS_ABOVE, 0.0)
    if config.training.precision != "bf16":
        return found
    entries, tile = _entries_made(config, layout, listed)
    chunks = config.training.micro_batch * config.data.seq_length / chunk
    kv_heads, own_chunks = model.kv_heads / layout.tensor, chunks
    sharded = layout.context > 1 and layout.context_comm != "a2a"
    if sharded:
        own_chunks = chunks / layout.context
        # a ring has half of a rank's keys at a time
        chunks = own_chunks / 2 if layout.context_comm == "p2p" else chunks
    else:
        kv_heads /= layout.context
    # partial results in bf16, and in attention their log-sum-exp
    for stage, of_head in {"attend": 2 * head_dim + 4, "queries": 2 * head_dim}.items():
        above = pairs_above(stage, group, head_dim, chunk, gpu)
        if (
            stage == "queries"
            and not sharded
            and 8 * kv_heads * chunks * chunk * head_dim > MAX_PAIR_GRADIENT_BYTES
        ):
            above = math.inf
        room = WORKSPACE_BYTES // (group * of_head)
        tiles, most_of_tile = own_chunks * (chunk / tile), tile * chunks
        # else a tile's pairs might not fit, and tiles are gone over
        if above < math.inf and 2 * most_of_tile <= room:
            most_taken = min(entries * tile / max(1.0, above), kv_heads * tiles * most_of_tile)
            pairs, places = min(room, most_taken), PLACE_BYTES[stage]
            at_once, slab_tiles = max(1, PLACES_BYTES // (pairs * places)), kv_heads * tiles
            counted = slab_tiles
            if slab_tiles * chunks > MAX_COUNTS:
                at_once = min(at_once, COUNTED_SLABS)
                slab_tiles = max(1, MAX_COUNTS // chunks // at_once)
                counted = slab_tiles * at_once
            slabs = most_taken // (room - most_of_tile) + kv_heads * math.ceil(tiles / slab_tiles)
            at_once = min(at_once, slabs)
            found[stage] = pairs * (group * of_head + at_once * places) + COUNT_BYTES * counted * chunks
            if stage == "queries":
                sums = 2 * PARTS[group] + kv_heads * chunks * (not sharded)
                found[stage] += 2 * sums * chunk * head_dim * 4
    return found


def key_bytes(config: Config, layout: Layout, listed: float) -> float:
    """Workspace of one layer call on one rank in which the gradients of keys and values are summed over selected pairs, in bf16.

    Tokens and log priors of a slab's pairs; where those of each run of tiles begin in each group of chunks; and sums in float32: two
    for each program, whose work may cut chunks at both ends, and one for each chunk.
    """
    model, chunk = config.model, config.attention.chunk_size
    head_dim = model.channels_per_head
    if config.training.precision != "bf16" or not keys_by_pair(head_dim, chunk):
        return 0.0
    entries, tile = _entries_made(config, layout, listed)
    own = (
        config.training.micro_batch * config.data.seq_length * model.kv_heads / layout.tensor / layout.context
    )
    pairs, width = entries * tile + own, max(1, KEYS_A_PROGRAM // chunk)
    parts = min(KEY_PARTS, pairs * (model.heads // model.kv_heads) / ROWS_A_STEP / LEAST_STEPS)
    sums = 2 * parts * width * chunk + own
    groups = math.ceil(config.training.micro_batch * config.data.seq_length / chunk / width)
    counts, most = own / tile / MIN_RUN_TILES * groups, MAX_RUN_COUNTS
    # longer runs, twice as long each time, where there would be more
    counts /= 1 << max(0, math.ceil(math.log2(counts / most)))
    return 8 * (min(MAX_PAIRS, width * pairs) + counts) + 8 * head_dim * sums


def _exchange_bytes(shape: ContextShape, layout: Layout) -> tuple[float, float]:
    """Buffers of one layer's context exchange: forward and backward."""
    if layout.context == 1:
        return 0.0, 0.0
    own = shape.kv_bytes + shape.summary_bytes
    # gathered K and V; in the backward also dK and dV in float32, these in the input dtype, and what all ranks send
    backward = 3 * own + shape.kv_float32_bytes
    if layout.context_comm in ("all_gather", "sparse"):
        # `sparse` fetches all chunks until the router has learnt to select
        return layout.context * own, layout.context * backward
    if layout.context_comm == "p2p":
        return 2 * own, 2 * own + 2 * shape.kv_float32_bytes
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
        # q, k, v and the output, of the router's own the first two; what is normed is kept from before that, too
        "attention": tokens * heads * shape.head_dim * b,
        # the means that the router sees
        "pooled": tokens
        * shape.pooled_heads
        * shape.head_dim
        * b
        * (kind == "dash" and config.attention.query_pool > 1),
        # threshold and log-sum-exp of every query head, float32
        "row_state": tokens * shape.heads * 8,
        # of baselines, whose operands and output are copied into whole chunks first
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
    shape = context_shape(config, layout)
    parts = _layer_bytes(config, layout, shape)
    routed = config.attention.kind != "full"
    lists, backward_lists = list_bytes(config, layout, listed) if routed else (0.0, 0.0)
    forward_exchange, backward_exchange = _exchange_bytes(shape, layout)
    kept_attention = parts["row_state"] + parts["laid_out"] + parts["branches"] + lists
    sharded = layout.context > 1 and layout.context_comm != "a2a"
    if sharded:
        # where queries of other ranks are in them, they are not computed again
        kept_attention += parts["pooled"]
    layer = 4 * parts["stream"] + parts["attention"] + parts["feed_forward"]
    # norm, halves and activation
    feed_forward = parts["stream"] + parts["feed_forward"]
    activations = {
        "none": layer + kept_attention,
        "selective": layer + kept_attention - feed_forward,
        "attention": layer,
        "full": parts["stream"],
    }[layout.recompute]
    # while one layer's backward runs: what was not kept, and gradients of either half of the layer
    heads = 2 * (shape.heads + shape.kv_heads + shape.routing_heads)
    gradient_rows = shape.tokens * heads * shape.head_dim * shape.element_bytes + 2 * parts["pooled"]
    by_pair = dict.fromkeys(("keys", *PAIRS_ABOVE), 0.0)
    if routed:
        by_pair |= pair_bytes(config, layout, listed, hardware.gpu)
        by_pair["keys"] = key_bytes(config, layout, listed)
    attention_phase = gradient_rows + backward_lists + max(forward_exchange, backward_exchange)
    # sums of keys and values that queries leave stay until these are done; of sharded keys they are the gradients of the buffer
    key_sums = 8 * shape.tokens * shape.kv_heads * shape.head_dim * (by_pair["queries"] > 0 and not sharded)
    backward_pairs = max(by_pair["queries"], by_pair["keys"] + key_sums)
    attention_phase = max(attention_phase + backward_pairs, by_pair["attend"])
    # gradients of its input, of both halves and of the activation
    feed_forward_phase = feed_forward * (2 if layout.recompute == "selective" else 1)
    pieces = feed_forward_pieces(config, layout)
    if pieces > 1:
        # of a piece, which is there only now; the whole input's gradient; sums of those of its weights, in float32
        layer -= feed_forward
        weights = 3 * config.model.hidden_size * config.model.ffn_hidden_size / layout.tensor
        feed_forward_phase = 2 * feed_forward / pieces + parts["stream"] + 4 * weights
    layer_phase = max(attention_phase, feed_forward_phase)
    if layout.sequence:
        # in either half a product's input is gathered again, and its whole gradient is there until it is dealt out
        layer_phase += 2 * shape.tokens * config.model.hidden_size * shape.element_bytes
    layer_phase += {"attention": kept_attention, "full": layer + kept_attention}.get(layout.recompute, 0.0)
    parameters = rank_parameters(config, layout, vocab_size)
    kept = config.model.layers * activations
    # of a first micro-batch they are all there when activations are gone
    late_gradients = parameters * 2 * (config.training.precision == "bf16" and layout.zero_stage == 1)
    working = max(layer_phase, _loss_bytes(config, layout, vocab_size), late_gradients - kept)
    return MemoryUse(
        **_state_bytes(config, layout, parameters),
        activations=kept * hardware.activation_factor,
        working=working * hardware.activation_factor,
        reserved=hardware.reserved_gib * 2**30,
    )
