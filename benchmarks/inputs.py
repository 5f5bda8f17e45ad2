"""Random inputs whose density can be dialled, and the shape of a model that any machine can run."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

# Queries are this much noise around their topic.
QUERY_NOISE = 0.35
# `section.key=value` overrides of a config: two narrow layers in float32.
TINY_MODEL = [
    "parallel.context=1",
    "model.layers=2", "model.hidden_size=64", "model.heads=8", "model.kv_heads=2", "model.ffn_hidden_size=96",
    "model.vocab_size=320", "attention.chunk_size=16", "training.precision=fp32",
]  # fmt: skip
# And of a step, of a row of 256 tokens.
TINY_STEP = [*TINY_MODEL, "data.seq_length=256", "training.micro_batch=1"]


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def kernels_run(device: torch.device) -> bool:
    """Whether Triton kernels can run on the device: on a GPU, or anywhere in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


class Inputs:
    """Reproducible random tensors; keys and queries around common topics, whose number is the dial on density.

    A key and a query of the same topic score high, so that a router selects about one chunk in `topics`.

    Args:
        topics: how many there are for each key/value head.
        kv_heads, head_dim: of the keys.
        device, dtype: of all tensors.
        seed: of the random numbers.
    """

    def __init__(
        self,
        topics: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.topics_HtD = self.noise(kv_heads, topics, head_dim)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype, generator=self.generator)

    def topic_of_runs(self, batch: int, tokens: int, run: int) -> Tensor:
        """A random topic for every `run` tokens in a row: [batch, tokens, kv heads, head dim]."""
        heads, topics, _ = self.topics_HtD.shape
        size = batch, math.ceil(tokens / run), heads
        which = torch.randint(topics, size, device=self.device, generator=self.generator)
        picked = self.topics_HtD[torch.arange(heads, device=self.device), which]
        return picked.repeat_interleave(run, dim=1)[:, :tokens]

    def gather_keys(self, k: Tensor, chunk_size: int) -> Tensor:
        """Keys [B, N, Hkv, D] moved around topics, one topic a chunk."""
        return k + self.topic_of_runs(k.shape[0], k.shape[1], chunk_size)

    def gather_queries(self, q: Tensor, run: int) -> Tensor:
        """Queries [B, N, Hq, D] moved around topics, which `run` queries in a row and the heads of a group share."""
        topic = self.topic_of_runs(q.shape[0], q.shape[1], run)
        return QUERY_NOISE * q + topic.repeat_interleave(q.shape[2] // topic.shape[2], dim=2)
