"""What one rank sends in a step of a layout, and how long it takes: tensor parallelism, context exchange and ZeRO."""

from __future__ import annotations

from dataclasses import dataclass

from dash_megatron.config import Config
from dash_megatron.planning.layout import Group, Hardware, Layout
from dash_megatron.planning.memory import BUCKET_ELEMENTS, context_shape, first_products
from dash_megatron.planning.routing import AssumedRouting, sent_coverage
from dash_megatron.planning.traffic import (
    PassBytes,
    context_exchange,
    query_halo,
    tensor_parallel_layer,
    zero_step,
)


@dataclass(frozen=True)
class Transfer:
    """Bytes one rank sends in a step, and the time they take."""

    sent: float
    seconds: float
    network_share: float
    """Share that leaves the node."""


def tensor_transfer(
    config: Config, layout: Layout, group: Group, hardware: Hardware, batches: int
) -> Transfer:
    """What tensor parallelism sends around each layer, forward, backward and where it is recomputed.

    Args:
        config, layout, hardware: as in `step_time.estimate_step`.
        group: the ranks that share a layer.
        batches: micro-batches of a step.
    """
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
    return Transfer(sent, group.ring_seconds(sent, hardware, calls), group.network_share(all_to_all=False))


def _context_seconds(layout: Layout, group: Group, sent: float, calls: float, hardware: Hardware) -> float:
    if layout.context_comm == "p2p":
        return group.neighbour_seconds(sent, hardware, calls)
    if layout.context_comm == "all_gather":
        return group.ring_seconds(sent, hardware, calls)
    return group.all_to_all_seconds(sent, hardware, calls)


def _halo_queries(config: Config, layout: Layout) -> int:
    """Tokens whose queries the busiest rank lends to others: the last before the ends of its two pieces."""
    attention = config.attention
    if attention.kind != "dash" or layout.context_comm == "a2a":
        return 0
    return min(2, layout.context - 1) * (attention.query_pool - 1)


def context_transfer(
    config: Config, layout: Layout, routing: AssumedRouting, group: Group, hardware: Hardware, batches: int
) -> Transfer:
    """What context ranks exchange in each layer; arguments are those of `tensor_transfer`, and what the router does."""
    shape = context_shape(config, layout)
    triples = shape.peers * shape.num_chunks * shape.kv_heads * sent_coverage(config, layout, routing)
    layer: PassBytes = context_exchange(layout.context_comm, shape, sent_chunks=triples)
    halo = _halo_queries(config, layout)
    layer += query_halo(shape, halo, halo)
    forwards = layout.attention_forwards
    sent = batches * config.model.layers * (forwards * layer.forward + layer.backward)
    # what to send is asked for first
    calls = batches * config.model.layers * (forwards + 2) * (2 if layout.context_comm == "sparse" else 1)
    calls += batches * config.model.layers * (forwards + 1) if halo else 0
    ring = layout.context_comm in ("all_gather", "p2p")
    seconds = _context_seconds(layout, group, sent, calls, hardware)
    return Transfer(sent, seconds, group.network_share(all_to_all=not ring))


def zero_transfer(
    config: Config, layout: Layout, parameters: float, group: Group, hardware: Hardware, batches: int
) -> Transfer:
    """What ZeRO gathers and reduces; arguments are those of `tensor_transfer`, and the parameters of a tensor-parallel rank."""
    share = first_products(config) / layout.tensor / parameters
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
    return Transfer(sent, group.ring_seconds(sent, hardware, calls), group.network_share(all_to_all=False))
