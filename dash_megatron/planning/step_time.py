"""Time of one optimizer step of a layout, from operation counts, kernel times and bytes over links.

Two transfers overlap with compute, up to `Hardware.overlap` of them: the p2p ring's, which runs beside attention, and
ZeRO-3's, which DeepSpeed overlaps by default. Every other transfer is waited for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dash_megatron.config import Config
from dash_megatron.config.flops import matmul_parameters
from dash_megatron.planning.baseline_times import baseline_seconds
from dash_megatron.planning.kernel_times import AttentionSeconds, AttentionWork, dash_seconds, dense_seconds
from dash_megatron.planning.layout import Hardware, Layout, groups
from dash_megatron.planning.memory import (
    MemoryUse,
    context_shape,
    first_products,
    memory_use,
    micro_batches,
    rank_parameters,
)
from dash_megatron.planning.routing import AssumedRouting, effective_routing, shares_of_work
from dash_megatron.planning.traffic import exchange_copies
from dash_megatron.planning.transfers import context_transfer, tensor_transfer, zero_transfer
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


def _attention(
    config: Config, layout: Layout, routing: AssumedRouting, hardware: Hardware
) -> AttentionSeconds:
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


def _matmul_flops(config: Config, layout: Layout, vocab_size: int) -> float:
    """Operations of one micro-batch on one rank, recomputation included, attention excluded."""
    tokens = context_shape(config, layout).tokens
    total = matmul_parameters(config, vocab_size)
    without_vocabulary = total - config.model.hidden_size * vocab_size
    again = {"full": without_vocabulary, "selective": first_products(config)}.get(layout.recompute, 0)
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
    copied = copies.forward * layout.attention_forwards + copies.backward
    copied *= COPY_SLOWDOWN[layout.context_comm]
    elements = stream + activation + FORWARD_SHARE * repeated
    return model.layers * (elements * ELEMENTWISE_BYTES + copied) + logits * LOGIT_BYTES


def estimate_step(
    config: Config,
    layout: Layout,
    vocab_size: int,
    routing: AssumedRouting | None = None,
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
    routing, hardware = effective_routing(config, routing or AssumedRouting()), hardware or Hardware()
    batches = micro_batches(config, layout)
    of = groups(layout, hardware)
    parameters = rank_parameters(config, layout, vocab_size)

    matmul = batches * _matmul_flops(config, layout, vocab_size) / hardware.matmul_flops
    moved = batches * _elementwise_bytes(config, layout, vocab_size)
    elementwise = moved / hardware.memory_bandwidth
    once = _attention(config, layout, routing, hardware)
    attention = batches * (layout.attention_forwards * once.forward + once.backward)
    if layout.context > 1:
        attention *= routing.imbalance

    tensor = tensor_transfer(config, layout, of["tensor"], hardware, batches)
    context = context_transfer(config, layout, routing, of["context"], hardware, batches)
    zero = zero_transfer(config, layout, parameters, of["zero"], hardware, batches)
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
        nvlink_bytes=sum(part.sent * (1 - part.network_share) for part in (tensor, context, zero)),
        infiniband_bytes=sum(part.sent * part.network_share for part in (tensor, context, zero)),
        tokens=config.training.global_batch * config.data.seq_length,
    )
