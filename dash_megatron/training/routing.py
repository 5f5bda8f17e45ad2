"""What routers select while a run trains: measured in rank 0's own forward pass, for `routing.jsonl` and TensorBoard.

Nothing here communicates, so that no process waits in a collective for one that measures, and nothing is computed again:
core attentions show queries and keys that they have anyway.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dash_megatron.layers import DashCoreAttention
from dash_megatron.ops.diagnostics import MEASURES, RoutingSamples, sample_routing
from dash_megatron.training.metrics import MetricsWriter

logger = logging.getLogger(__name__)

# Measures whose samples TensorBoard gets as histograms; all have their means there as scalars.
_HISTOGRAMS = ("density", "entropy", "own_share", "near_threshold_mass")


class RoutingProbe:
    """Measures the routers of this process's layers in the first micro-batch of every `every`-th step.

    Args:
        every: steps from one measurement to the next; 0: never.
        layers: core attentions with a router by layer, counted from 0.
    """

    def __init__(self, every: int, layers: Mapping[int, DashCoreAttention]) -> None:
        self._every, self._layers = every, layers
        self._found: dict[int, RoutingSamples] = {}
        if every and not layers:
            logger.warning("logging.routing_every=%d is ignored: no layer has DashAttention's router", every)

    @contextlib.contextmanager
    def watching(self, step: int, micro_batch: int) -> Iterator[None]:
        """Measure the forward pass within, if it is due. The backward pass, which may compute it again, must be outside."""
        if micro_batch == 0:
            self._found = {}  # also of a step that was given up
        due = self._every and step % self._every == 0 and micro_batch == 0
        if not due:
            yield
            return
        for layer, core in self._layers.items():
            core.observer = functools.partial(self._observe, layer)
        try:
            yield
        finally:
            for core in self._layers.values():
                core.observer = None

    def _observe(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        summary_query: Tensor,
        cu_seqlens: Tensor | None,
        routing_q: Tensor | None,
        routing_k: Tensor | None,
    ) -> None:
        router = self._layers[layer].router
        try:
            self._found[layer] = sample_routing(q, k, summary_query, router, routing_q, routing_k, cu_seqlens)
        except torch.OutOfMemoryError as error:
            self._every = 0
            logger.error(
                "logging.routing_every: no memory to measure layer %d, so it stops here and training goes on: %s",
                layer,
                error,
            )

    def report(self, step: int, num_layers: int, writer: MetricsWriter) -> None:
        """Write what was measured in this step, if anything was."""
        found, self._found = self._found, {}
        if not found:
            return
        any_samples = next(iter(found.values()))
        line = {
            "step": step,
            "queries": len(any_samples.token),
            "edges": any_samples.edges,
            "layers": [layer_record(found[i]) if i in found else None for i in range(num_layers)],
        }
        histograms, scalars = {}, {}
        for layer, samples in found.items():
            for name in MEASURES:
                mean = samples.head_means(name).nanmean().item()
                if math.isfinite(mean):
                    scalars[f"routing_{name}/layer_{layer:02d}"] = mean
                values = samples.values[name]
                if name in _HISTOGRAMS and values.isfinite().any():
                    histograms[f"routing_{name}_samples/layer_{layer:02d}"] = values[values.isfinite()].cpu()
        writer.write_routing(line, histograms, scalars)


def layer_record(samples: RoutingSamples) -> dict[str, Any]:
    """The measures of one layer for `routing.jsonl`: numbers of 4 digits, null where nothing is known.

    Returns:
        `heads`: for each measure a list by kv head; `buckets`: for each measure a list of buckets by kv head.
    """
    return {
        "heads": {name: _rounded(samples.head_means(name).tolist()) for name in MEASURES},
        "buckets": {name: _rounded(samples.bucket_means(name).tolist()) for name in MEASURES},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if math.isfinite(value) else None
