"""What a run costs: parameters, FLOPs, GPU-hours, and the context that its tokens see."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from dash_megatron.config import Config, DataConfig
from dash_megatron.config.flops import peak_flops, training_flops_per_token
from dash_megatron.data.blend import parse_blend
from dash_megatron.data.index_file import read_lengths
from dash_megatron.studies.study_file import Assumptions


@dataclass(frozen=True)
class Cost:
    """What one run costs; FLOPs are of forward and backward, recomputation not counted."""

    flops: float
    """At the assumed density."""
    dense_flops: float
    """As if every layer were full attention."""
    gpu_hours: float
    dense_gpu_hours: float
    price: float

    @property
    def saving(self) -> float:
        """Share of the dense run's GPU-hours that this one does not need."""
        return 1 - self.gpu_hours / self.dense_gpu_hours


_DOCUMENTS_AT_ONCE = 1 << 15
"""Of billions, so many are in memory, and in the processor's cache."""


def mean_piece_context(lengths: np.ndarray, seq_length: int) -> float:
    """Mean number of tokens that a token of packed documents may attend to, itself included.

    Documents are concatenated and cut every `seq_length` tokens, at any place in them alike. A
    document of l tokens then has pieces whose squares add up to l^2 (1 - l / 3L) on average, L^2 (l/L - 1/3) if it
    is longer than L = seq_length; tokens of a piece of p see (p + 1) / 2 on average.

    Args:
        lengths: int [documents], tokens.
        seq_length: tokens of a sequence.
    """
    longest, squares, tokens = float(seq_length), 0.0, 0.0
    for first in range(0, len(lengths), _DOCUMENTS_AT_ONCE):
        whole = lengths[first : first + _DOCUMENTS_AT_ONCE].astype(np.float64)
        pieces = np.where(
            whole <= longest, whole**2 * (1 - whole / (3 * longest)), longest * whole - longest**2 / 3
        )
        squares += pieces.sum()
        tokens += whole.sum()
    return float((squares / tokens + 1) / 2)


@functools.lru_cache
def mean_context(train: tuple[str, ...], seq_length: int, pack_documents: bool) -> tuple[float, str]:
    """Mean number of tokens that a token of training data may attend to, and where the number is from.

    Args:
        train, seq_length, pack_documents: as in the config's `data` section.
    """
    whole = (seq_length + 1) / 2
    if not pack_documents:
        return whole, "half of data.seq_length: documents attend across each other"
    try:
        parts = [(part.weight, read_lengths(part.prefix)[0]) for part in parse_blend(train)]
    except (OSError, ValueError):
        parts = []
    parts = [(weight, lengths) for weight, lengths in parts if lengths.any()]  # training refuses empty data
    if not parts:
        return (
            whole,
            "half of data.seq_length: data.train cannot be read, so a sequence counts as one document",
        )
    weighted = all(weight is not None for weight, _ in parts)
    weights = np.array([weight if weighted else lengths.sum() for weight, lengths in parts], dtype=np.float64)
    contexts = [mean_piece_context(np.asarray(lengths), seq_length) for _, lengths in parts]
    return float(weights @ contexts / weights.sum()), "from the lengths of the documents"


def curriculum_context(data: DataConfig, steps: int, longest: float) -> float:
    """Mean context of a run's tokens under `data.seq_length_curriculum`, as `mean_context` counts it.

    Args:
        data: the config's section.
        steps: of the run.
        longest: mean context at `data.seq_length`.
    """
    if data.seq_length_curriculum is None:
        return longest
    begins = sorted(data.seq_length_curriculum)
    total = 0.0
    for begin, end in itertools.pairwise([*begins, steps]):
        length = data.seq_length_curriculum[begin]
        context = longest
        if length < data.seq_length:
            context = min(longest, mean_context(data.train, length, data.pack_documents)[0])
        total += context * max(0, min(end, steps) - begin)
    return total / steps


def flops_per_token(config: Config, vocab_size: int, context: float, density: float) -> tuple[float, float]:
    """Training FLOPs of a token at a density and as if dense."""
    dense = training_flops_per_token(config, vocab_size, context)
    # a token's chunks lie in [1, available]: its own one is always selected
    available = (context - 0.5) / config.attention.chunk_size + 0.5
    selected = max(1.0, density * max(1.0, available))
    by_layer = dict.fromkeys(config.attention.sparse_layers(config.model.layers), selected)
    return training_flops_per_token(config, vocab_size, context, by_layer), dense


def estimate_cost(
    config: Config, vocab_size: int, context: float, density: float, assume: Assumptions
) -> Cost:
    """FLOPs, hours and price of all `training.steps` of a config.

    Raises:
        ValueError: with `assume.utilization: null`, the layout breaks a rule on `assume.gpus` GPUs.
    """
    tokens = config.training.steps * config.training.global_batch * config.data.seq_length
    flops, dense_flops = (tokens * value for value in flops_per_token(config, vocab_size, context, density))
    if assume.utilization is None:
        hours, dense_hours = (_modelled_hours(config, vocab_size, value, assume) for value in (density, None))
    else:
        rate = assume.utilization * float(peak_flops(assume.gpu) or 0) * 3600
        hours, dense_hours = flops / rate, dense_flops / rate
    return Cost(flops, dense_flops, hours, dense_hours, hours * assume.price)


def _modelled_hours(config: Config, vocab_size: int, density: float | None, assume: Assumptions) -> float:
    from dash_megatron.planning.routing import AssumedRouting
    from dash_megatron.planning.search import estimate_configured

    tree = config.model_dump()
    tree["model"]["vocab_size"] = vocab_size
    if density is None:
        tree["attention"] = {"kind": "full"}
    step = estimate_configured(
        Config.model_validate(tree), assume.gpus, AssumedRouting(density=density or 1.0)
    )
    return step.seconds * config.training.steps * assume.gpus / 3600
