"""Layouts, and which links their groups use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from dash_megatron.config import Config, config_from_dict
from dash_megatron.gpus import GPUS
from dash_megatron.planning.traffic import ContextComm

Recompute = Literal["none", "selective", "attention", "full"]


@dataclass(frozen=True)
class Hardware:
    """GPUs, nodes and links. Nominal figures of 8 x H200 nodes; efficiencies are assumptions."""

    gpu: str = "H200"
    speed: float = 1.0
    """How many times as fast as an H200, on which attention was timed, the GPU computes and reads: by data sheets, or by a profile."""
    gpus_per_node: int = 8
    memory_gib: float = 140.0
    """Memory of one GPU."""
    usable: float = 0.9
    """Share of it that a plan may fill: fragmentation and spikes need the rest."""
    reserved_gib: float = 4.0
    """CUDA context, NCCL buffers and kernels' code."""
    matmul_flops: float = 715e12
    """Operations per second of matrix products in bf16, as profiles of steps have them: 770 of 62M, 750 of 1B, 700 of 8B parameters."""
    activation_factor: float = 1.0
    """Activations and working memory over what is modelled, as a profile found them."""
    memory_bandwidth: float = 3e12
    """Bytes per second that the counts of bytes in `step_time` are fitted with."""
    nvlink: float = 450e9
    """Bytes per second and direction of one GPU inside a node, nominal."""
    infiniband: float = 50e9
    """Bytes per second and direction of one GPU's network card (400 Gb/s), nominal."""
    link_efficiency: float = 0.73
    """Share of either that large transfers reach: measured over NVLink, by the sums of ZeRO between two H200s and between four."""
    hop_seconds: float = 5e-6
    """Latency of one hop of a ring."""
    overlap: float = 0.2
    """ZeRO-3's transfers and those of the p2p ring overlap with compute, which hides this share of the time that they take alone, at most:
    beside kernels they take several times as long, and ranks wait for each other."""

    @classmethod
    def of(cls, gpu: str, memory_gib: float | None = None) -> Hardware:
        """Nodes of 8 such GPUs, whose compute, memory and NVLink are to an H200's as data sheets say.

        Raises:
            ValueError: the GPU is not known, or it has no memory.
        """
        if memory_gib is not None and not 0 < memory_gib < math.inf:
            raise ValueError(f"--memory-gib {memory_gib} must be a number above 0")
        if gpu not in GPUS:
            raise ValueError(
                f"--gpu {gpu} must be one of {', '.join(GPUS)}; take the nearest, and --profile a short run on yours"
            )
        found, default = GPUS[gpu], cls()
        base = GPUS[default.gpu]
        speed = found.peak_flops / base.peak_flops
        return replace(
            default,
            gpu=gpu,
            memory_gib=found.memory_gib if memory_gib is None else memory_gib,
            speed=speed,
            matmul_flops=default.matmul_flops * speed,
            memory_bandwidth=default.memory_bandwidth * found.memory_bandwidth / base.memory_bandwidth,
            nvlink=found.link_bandwidth,
        )

    def slowed(self, factor: float) -> Hardware:
        """The same with compute and memory `factor` times as slow; links stay."""
        return replace(
            self,
            speed=self.speed / factor,
            matmul_flops=self.matmul_flops / factor,
            memory_bandwidth=self.memory_bandwidth / factor,
        )

    @property
    def budget_bytes(self) -> float:
        """Bytes a plan may fill."""
        return self.usable * self.memory_gib * 2**30


@dataclass(frozen=True, order=True)
class Layout:
    """How a model is split over GPUs, and what is recomputed."""

    tensor: int
    context: int
    data: int
    zero_stage: int
    context_comm: ContextComm
    recompute: Recompute
    sequence: bool = False

    @property
    def gpus(self) -> int:
        """Processes, one a GPU."""
        return self.tensor * self.context * self.data

    @property
    def shards(self) -> int:
        """Processes that ZeRO shards over."""
        return self.context * self.data

    @property
    def attention_forwards(self) -> int:
        """How often core attention and its exchange run forward in a step: once more where the backward recomputes them."""
        return 2 if self.recompute in ("attention", "full") else 1


def with_layout(config: Config, layout: Layout) -> Config:
    """The config with another layout.

    Raises:
        ValueError: the layout breaks a rule of the config, or does not divide its batch.
    """
    parallel = {
        "tensor": layout.tensor,
        "context": layout.context,
        "context_comm": layout.context_comm,
        "sequence": layout.sequence,
    }
    tree = config.model_dump()
    tree["parallel"].update(parallel)
    tree["zero"]["stage"] = layout.zero_stage
    tree["training"]["recompute"] = layout.recompute
    changed = config_from_dict(tree)
    changed.accumulation_steps(layout.gpus)
    return changed


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: `size` ranks, `stride` apart, as Megatron's order tensor, context, data places them."""

    size: int
    stride: int
    gpus_per_node: int

    @property
    def in_node(self) -> int:
        """Ranks of the group that share a node, as many as its first node holds."""
        return sum(1 for member in range(self.size) if member * self.stride < self.gpus_per_node)

    @property
    def crosses(self) -> bool:
        """Whether the group leaves its node."""
        return self.in_node < self.size

    def network_share(self, all_to_all: bool) -> float:
        """Share of a rank's bytes, averaged over ranks, that leaves its node.

        In a ring one of a node's ranks sends to the next node. In an all-to-all every rank sends to all others.
        """
        if not self.crosses:
            return 0.0
        return (self.size - self.in_node) / (self.size - 1) if all_to_all else 1 / self.in_node

    def ring_seconds(self, sent: float, hardware: Hardware, calls: float = 1) -> float:
        """Time of collectives in which one rank sends `sent` bytes: all network cards of its ranks in a node work."""
        bandwidth = hardware.nvlink
        if self.crosses:
            bandwidth = min(bandwidth, self.in_node * hardware.infiniband)
        latency = calls * (self.size - 1) * hardware.hop_seconds
        return sent / (bandwidth * hardware.link_efficiency) + latency

    def neighbour_seconds(self, sent: float, hardware: Hardware, calls: float = 1) -> float:
        """Time of point-to-point steps round a ring: the rank at a node's border sends all through its own card."""
        bandwidth = hardware.infiniband if self.crosses else hardware.nvlink
        latency = calls * (self.size - 1) * hardware.hop_seconds
        return sent / (bandwidth * hardware.link_efficiency) + latency

    def all_to_all_seconds(self, sent: float, hardware: Hardware, calls: float = 1) -> float:
        """Time of all-to-alls: both links work at once, the slower decides."""
        outside = self.network_share(all_to_all=True)
        slower = max(outside / hardware.infiniband, (1 - outside) / hardware.nvlink)
        return sent * slower / hardware.link_efficiency + calls * (self.size - 1) * hardware.hop_seconds


def groups(layout: Layout, hardware: Hardware) -> dict[str, Group]:
    """The groups of a layout: tensor innermost, then context, then data; ZeRO shards over context and data."""
    node = hardware.gpus_per_node
    return {
        "tensor": Group(layout.tensor, 1, node),
        "context": Group(layout.context, layout.tensor, node),
        "zero": Group(layout.shards, layout.tensor, node),
    }
