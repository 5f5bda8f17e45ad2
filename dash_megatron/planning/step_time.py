"""Time of one optimizer step of a layout, from operation counts, kernel times and bytes over links.

Two transfers overlap with compute, up to `Hardware.overlap` of them: the p2p ring's, which runs beside attention, and
ZeRO-3's, which DeepSpeed overlaps by default. Every other transfer is waited for.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dash_megatron.config import Config
from dash_megatron.config.flops import matmul_parameters
from dash_megatron.planning.baseline_times import baseline_seconds, density_of_lists
from dash_megatron.planning.choices import Choices, Shares, check_choices, shares_of_pairs
from dash_megatron.planning.coverage import coverage_of_topics
from dash_megatron.planning.kernel_times import AttentionSeconds, AttentionWork, dash_seconds, dense_seconds
from dash_megatron.planning.layout import Group, Hardware, Layout, groups
from dash_megatron.planning.memory import (
    BUCKET_ELEMENTS,
    MemoryUse,
    context_shape,
    memory_use,
    micro_batches,
    rank_parameters,
)
from dash_megatron.planning.traffic import (
    PassBytes,
    context_exchange,
    exchange_copies,
    query_halo,
    tensor_parallel_layer,
    zero_step,
)
from dash_megatron.planning.workspaces import lists_are_counted

OPTIMIZER_BYTES = {"fused": 31, "separate": 65}
"""Bytes read and written per parameter once a step: float32 gradients, norm, clipping, AdamW's states and weights, and the bf16
weight; in few passes, as bf16 under ZeRO 1 to 3 does it, or one after another."""
GRADIENT_BYTES = {"fused": 10, "separate": 18}
"""And by every micro-batch after the first, whose gradient is added to the float32 sum; widened before that, or with it."""
BUCKETED_BYTES = 42
"""Under ZeRO 2 and 3 instead by every micro-batch: gradients are copied into a bucket, widened, ordered by rank, and added."""
ELEMENTWISE_BYTES = 24
"""Bytes read and written per layer, token and element of hidden and feed-forward size: norms, RoPE, activation, residuals,
forward and backward."""
FORWARD_SHARE = 0.35
"""Share of `ELEMENTWISE_BYTES` that a forward pass alone moves."""
LOGIT_BYTES = 6
"""Bytes read and written per logit by the loss, forward and backward."""
IDLE_SECONDS = 0.006
"""Time of a step in which the GPU runs no kernel: 4 to 15 ms in profiles of steps of 62M, 1B and 8B on one GPU."""
STALL_SECONDS = {"tensor": 2.6e-3, "a2a": 2.8e-3, "all_gather": 4.6e-3, "p2p": 4e-3, "sparse": 9e-3}
"""Time that a layer and micro-batch which ranks share takes beyond that of the bytes sent: waiting for slower ranks and for the host.
Fitted to steps of two and four H200s."""
COPY_SLOWDOWN = {"a2a": 1.8, "all_gather": 2.0, "p2p": 1.65, "sparse": 4.0}
"""How many times as long copies around an exchange take as their bytes at `Hardware.memory_bandwidth`; fitted to the same steps."""
ATTENTION_SLOWDOWN = 1.05
"""Time of attention's kernels within steps, where clocks are lower, over that alone."""

REPEATS_ATTENTION = ("attention", "full")
"""Values of `training.recompute` whose backward runs core attention, and its exchange, a second time."""

PARTS = {
    "matmul": "matmul",
    "elementwise": "elementwise",
    "attention": "attention",
    "tensor": "tensor links",
    "context": "context links",
    "zero": "ZeRO links",
    "optimizer": "optimizer",
    "idle": "launches",
}
"""What a step's time is the sum of: fields of `StepEstimate`, and what a step is bound by where one is the largest."""


@dataclass(frozen=True)
class Routing:
    """What the router does, as far as time depends on it."""

    density: float = 0.1
    """Pairs of tokens attended over causal pairs, in (0, 1]; a mean over tokens as metrics report it is larger where
    the number of selected chunks does not grow with position."""
    peak_density: float = 1.0
    """Largest density of the run, for which memory must suffice: training from scratch starts at 1."""
    choices: Choices = "trained"
    """How alike neighbouring tokens select, which decides how many pairs tiles visit for each that is selected."""
    locality: float = 0.0
    """Probability that a run of queries wants a topic of its own neighbourhood; decides what `sparse` sends."""
    run_tokens: int = 32
    """Consecutive queries that want the same topic."""
    imbalance: float = 1.0
    """Attention time of the busiest context rank over the mean."""

    def __post_init__(self) -> None:
        for name, zero in (("density", False), ("peak_density", False), ("locality", True)):
            value = getattr(self, name)
            if not (0 < value <= 1 or (zero and value == 0)):
                least = "at least" if zero else "above"
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value} must be {least} 0 and at most 1, such as 0.1 for 10%")
        if not 1 <= self.imbalance < math.inf:
            raise ValueError(f"--imbalance {self.imbalance} must be a number of at least 1")
        check_choices(self.choices)


@dataclass(frozen=True)
class StepEstimate:
    """One layout's step; seconds of one optimizer step, bytes that one GPU sends in it."""

    layout: Layout
    memory: MemoryUse
    matmul: float
    elementwise: float
    """Norms, RoPE, activations, residuals, the loss, and copies around the context exchange."""
    attention: float
    tensor: float
    """Waiting for tensor parallelism."""
    context: float
    """Waiting for context exchange."""
    zero: float
    """Waiting for ZeRO, after overlap."""
    optimizer: float
    """Adding up gradients of micro-batches, and updating weights."""
    idle: float
    """Without a kernel."""
    nvlink_bytes: float
    infiniband_bytes: float
    tokens: int
    """Tokens of the step, all GPUs."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each of `PARTS`."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def seconds(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds / self.layout.gpus

    @property
    def bound(self) -> str:
        """What takes the largest share."""
        parts = self.parts
        return PARTS[max(parts, key=parts.__getitem__)]


def sent_coverage(config: Config, layout: Layout, routing: Routing) -> float:
    """Share of its chunks that the busiest rank sends to each peer under `sparse`: the last ranks' chunks all lie in
    every peer's past, so nothing but selection saves there."""
    tokens = config.data.seq_length // layout.context
    return coverage_of_topics(routing.density, routing.locality, tokens / routing.run_tokens)


def shares_of_work(config: Config, routing: Routing, density: float) -> Shares:
    """What is selected and visited at a density, of all pairs of a token and a chunk up to its own."""
    model = config.model
    return shares_of_pairs(
        config.attention, model.heads // model.kv_heads, config.data.seq_length, density, routing.choices
    )


def _attention(config: Config, layout: Layout, routing: Routing, hardware: Hardware) -> AttentionSeconds:
    """One micro-batch, all layers of one rank, without recomputation."""
    model, length = config.model, config.data.seq_length
    batch, context = config.training.micro_batch, layout.context
    by_heads = layout.context_comm == "a2a"
    split = layout.tensor * (context if by_heads else 1)
    rows = length if by_heads else length / context
    pairs = length * rows / 2
    shares = shares_of_work(config, routing, routing.density)
    # as chunks are counted, with the whole of the own one
    available = rows * (length + config.attention.chunk_size) / 2
    work = AttentionWork(
        rows=batch * rows,
        heads=model.heads / split,
        kv_heads=model.kv_heads / split,
        pairs=batch * pairs,
        selected=batch * available * shares.selected,
        visited=batch * available * shares.visited,
        chunk_size=config.attention.chunk_size,
        head_dim=model.channels_per_head,
        pool_heads=config.attention.pool_heads and config.attention.kind == "dash",
        counted=lists_are_counted(config, layout),
        passes=context if layout.context_comm == "p2p" else 1,
        sharded=context > 1 and not by_heads,
        gpu=hardware.gpu,
    )
    routed_layers = len(config.attention.sparse_layers(model.layers))
    dense_layers = model.layers - routed_layers
    routed, dense = dash_seconds(work), dense_seconds(work)
    if config.attention.fixed_lists:
        routed = baseline_seconds(
            work,
            config.attention,
            math.ceil(length / config.attention.chunk_size),
            shares.visited / shares.selected,
            hardware.memory_bandwidth / hardware.speed,
        )
    pooled = config.attention.kind == "dash" and config.attention.query_pool > 1
    heads = work.kv_heads if config.attention.router_projections else work.heads
    # queries once read or written
    once = pooled * work.rows * heads * work.head_dim * 2 / hardware.memory_bandwidth * routed_layers
    slow = ATTENTION_SLOWDOWN / hardware.speed
    return AttentionSeconds(
        (routed_layers * routed.forward + dense_layers * dense.forward) * slow + 2 * once,
        # means are computed again, and then their gradient
        (routed_layers * routed.backward + dense_layers * dense.backward) * slow + 4 * once,
    )


def _first_products(config: Config) -> int:
    """Weights of the first matrix product of every feed-forward part, which `selective` repeats."""
    return config.model.layers * 2 * config.model.hidden_size * config.model.ffn_hidden_size


def _matmul_flops(config: Config, layout: Layout, vocab_size: int) -> float:
    """Operations of one micro-batch on one rank, recomputation included, attention excluded."""
    tokens = context_shape(config, layout).tokens
    total = matmul_parameters(config, vocab_size)
    without_vocabulary = total - config.model.hidden_size * vocab_size
    again = {"full": without_vocabulary, "selective": _first_products(config)}.get(layout.recompute, 0)
    return (6.0 * total + 2.0 * again) * tokens / layout.tensor


def _elementwise_bytes(config: Config, layout: Layout, vocab_size: int) -> float:
    """Bytes that everything else reads and writes in one micro-batch on one rank, recomputation included."""
    model, tokens = config.model, context_shape(config, layout).tokens
    stream_tokens = tokens / layout.tensor if layout.sequence else tokens
    stream, activation = stream_tokens * model.hidden_size, tokens * model.ffn_hidden_size / layout.tensor
    # one of two norms, and the activation
    repeated = {"full": stream + activation, "selective": stream / 2 + activation}.get(layout.recompute, 0.0)
    logits = tokens * vocab_size / layout.tensor
    copies = exchange_copies(layout.context_comm, context_shape(config, layout))
    copied = copies.forward * (2 if layout.recompute in REPEATS_ATTENTION else 1) + copies.backward
    copied *= COPY_SLOWDOWN[layout.context_comm]
    elements = stream + activation + FORWARD_SHARE * repeated
    return model.layers * (elements * ELEMENTWISE_BYTES + copied) + logits * LOGIT_BYTES


def _context_seconds(layout: Layout, group: Group, sent: float, calls: float, hardware: Hardware) -> float:
    if layout.context_comm == "p2p":
        return group.neighbour_seconds(sent, hardware, calls)
    if layout.context_comm == "all_gather":
        return group.ring_seconds(sent, hardware, calls)
    return group.all_to_all_seconds(sent, hardware, calls)


@dataclass(frozen=True)
class _Sent:
    """Bytes one rank sends in a step, and the time they take."""

    sent: float
    seconds: float
    outside: float
    """Share that leaves the node."""


def _tensor_sent(config: Config, layout: Layout, group: Group, hardware: Hardware, batches: int) -> _Sent:
    tokens = context_shape(config, layout).tokens
    element = 2 if config.training.precision == "bf16" else 4
    layer = tensor_parallel_layer(
        tokens,
        config.model.hidden_size,
        layout.tensor,
        sequence=layout.sequence,
        element_bytes=element,
    )
    # `selective` gathers the tokens of its norm again, one of four transfers, where they are sharded
    again = {"full": 1.0, "selective": 0.25 * layout.sequence}.get(layout.recompute, 0.0)
    sent = batches * config.model.layers * ((1 + again) * layer.forward + layer.backward)
    calls = batches * config.model.layers * 4 * (2 + again)
    return _Sent(sent, group.ring_seconds(sent, hardware, calls), group.network_share(all_to_all=False))


def _halo_queries(config: Config, layout: Layout) -> int:
    """Tokens whose queries the busiest rank lends to others: the last before the ends of its two pieces."""
    attention = config.attention
    if attention.kind != "dash" or layout.context_comm == "a2a":
        return 0
    return min(2, layout.context - 1) * (attention.query_pool - 1)


def _context_sent(
    config: Config, layout: Layout, routing: Routing, group: Group, hardware: Hardware, batches: int
) -> _Sent:
    shape = context_shape(config, layout)
    triples = shape.peers * shape.num_chunks * shape.kv_heads * sent_coverage(config, layout, routing)
    layer: PassBytes = context_exchange(layout.context_comm, shape, sent_chunks=triples)
    halo = _halo_queries(config, layout)
    layer += query_halo(shape, halo, halo)
    forwards = 2 if layout.recompute in REPEATS_ATTENTION else 1
    sent = batches * config.model.layers * (forwards * layer.forward + layer.backward)
    # what to send is asked for first
    calls = batches * config.model.layers * (forwards + 2) * (2 if layout.context_comm == "sparse" else 1)
    calls += batches * config.model.layers * (forwards + 1) if halo else 0
    ring = layout.context_comm in ("all_gather", "p2p")
    seconds = _context_seconds(layout, group, sent, calls, hardware)
    return _Sent(sent, seconds, group.network_share(all_to_all=not ring))


def _zero_sent(
    config: Config, layout: Layout, parameters: float, group: Group, hardware: Hardware, batches: int
) -> _Sent:
    share = _first_products(config) / layout.tensor / parameters
    gathers = 2 + {"full": 1.0, "selective": share}.get(layout.recompute, 0.0)
    element = 2 if config.training.precision == "bf16" else 4
    sent = zero_step(
        parameters,
        layout.zero_stage,
        layout.shards,
        micro_batches=batches,
        gathers=gathers,
        element_bytes=element,
    ).total
    calls = 1 + parameters / BUCKET_ELEMENTS
    if layout.zero_stage == 3:
        calls = batches * config.model.layers * (gathers + 1)
    return _Sent(sent, group.ring_seconds(sent, hardware, calls), group.network_share(all_to_all=False))


def effective_routing(config: Config, routing: Routing) -> Routing:
    """The routing given, with the density that `attention.kind` fixes if it does."""
    if not config.attention.fixed_lists:
        return routing
    density = density_of_lists(config.attention, (config.data.seq_length + 1) / 2)
    return dataclasses.replace(routing, density=density, peak_density=density)


def estimate_step(
    config: Config,
    layout: Layout,
    vocab_size: int,
    routing: Routing | None = None,
    hardware: Hardware | None = None,
) -> StepEstimate:
    """Memory, bytes and time of one optimizer step.

    Args:
        config: model, lengths, batch and precision; its own layout is ignored.
        layout: a split that breaks no rule.
        vocab_size: rows of the embedding table.
        routing: density and structure of the router; None: defaults.
        hardware: speeds; None: defaults of 8 x H200 nodes.

    Returns:
        The estimate. Memory is that of the run's peak density.
    """
    routing, hardware = effective_routing(config, routing or Routing()), hardware or Hardware()
    batches = micro_batches(config, layout)
    of = groups(layout, hardware)
    parameters = rank_parameters(config, layout, vocab_size)

    matmul = batches * _matmul_flops(config, layout, vocab_size) / hardware.matmul_flops
    moved = batches * _elementwise_bytes(config, layout, vocab_size)
    elementwise = moved / hardware.memory_bandwidth
    once = _attention(config, layout, routing, hardware)
    again = once.forward if layout.recompute in REPEATS_ATTENTION else 0.0
    attention = batches * (once.forward + again + once.backward)
    if layout.context > 1:
        attention *= routing.imbalance

    tensor = _tensor_sent(config, layout, of["tensor"], hardware, batches)
    context = _context_sent(config, layout, routing, of["context"], hardware, batches)
    zero = _zero_sent(config, layout, parameters, of["zero"], hardware, batches)
    ring = hardware.overlap * context.seconds if layout.context_comm == "p2p" else 0.0
    sharding = hardware.overlap * zero.seconds if layout.zero_stage == 3 else 0.0
    updated = parameters / (layout.shards if layout.zero_stage else 1)
    bucketed = layout.zero_stage >= 2
    passes = "fused" if config.training.precision == "bf16" and layout.zero_stage >= 1 else "separate"
    gradients = batches * BUCKETED_BYTES if bucketed else (batches - 1) * GRADIENT_BYTES[passes]
    layer_calls = batches * config.model.layers
    peak = shares_of_work(config, routing, max(routing.density, routing.peak_density))
    return StepEstimate(
        layout=layout,
        memory=memory_use(config, layout, vocab_size, hardware, listed=peak.visited),
        matmul=matmul,
        elementwise=elementwise,
        attention=attention,
        tensor=tensor.seconds + layer_calls * STALL_SECONDS["tensor"] * (layout.tensor > 1),
        context=context.seconds
        - min(ring, attention)
        + layer_calls * STALL_SECONDS[layout.context_comm] * (layout.context > 1),
        zero=zero.seconds - min(sharding, matmul + elementwise),
        optimizer=(updated * OPTIMIZER_BYTES[passes] + parameters * gradients) / hardware.memory_bandwidth,
        idle=IDLE_SECONDS,
        nvlink_bytes=sum(part.sent * (1 - part.outside) for part in (tensor, context, zero)),
        infiniband_bytes=sum(part.sent * part.outside for part in (tensor, context, zero)),
        tokens=config.training.global_batch * config.data.seq_length,
    )
