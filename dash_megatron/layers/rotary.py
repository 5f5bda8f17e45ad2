"""Rotary position embedding by position, with the frequency scalings that published models were trained with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dash_megatron.config import RopeScaling


class PackedRotaryEmbedding(torch.nn.Module):
    """Cosines and sines of RoPE's angles by position, so that positions may restart at every packed document.

    Angles are computed in float32 from integer positions; the frequencies are no state and no parameter.

    Args:
        head_dim: channels of a head.
        theta: base period.
        scaling: of the frequencies; None leaves them.
        seq_length: longest sequence of the run.
    """

    def __init__(
        self, head_dim: int, theta: float, scaling: RopeScaling | None = None, seq_length: int = 0
    ) -> None:
        super().__init__()
        self.frequencies = rotary_frequencies(head_dim, theta, scaling, seq_length)
        self.factor = attention_factor(scaling)

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids [B, N] int64 -> cosines and sines, times `attention_factor`, float32 [2, N, B, head_dim / 2]."""
        if self.frequencies.device != position_ids.device:
            self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids.t().float()[:, :, None] * self.frequencies
        return torch.stack([angles.cos(), angles.sin()]) * self.factor


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, seq_length: int) -> Tensor:
    """Radians per position of every pair of channels, float32 [head_dim / 2] on CPU.

    Scaled frequencies are computed in the order in which transformers computes them, and so equal its own bit for bit:
    a router turns the last bit of a key into another chunk.
    """
    # models are also built on the meta device, where there are no numbers
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    if scaling is None:
        return theta**-exponents
    if scaling.rope_type == "longrope":
        assert scaling.original_max_position_embeddings is not None, "checked with the config"
        longer = seq_length > scaling.original_max_position_embeddings
        factors = scaling.long_factor if longer else scaling.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * theta**exponents)
    if scaling.rope_type == "yarn":
        return _yarn(theta**exponents, theta, scaling)
    frequencies = 1.0 / theta**exponents
    assert scaling.factor is not None, "checked with the config"
    return _llama3(frequencies, scaling) if scaling.rope_type == "llama3" else frequencies / scaling.factor


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep short wavelengths, stretch long ones, and mix in between."""
    factor, original = scaling.factor, scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert factor is not None
    assert original is not None
    assert low is not None
    assert high is not None
    wavelength = 2 * math.pi / frequencies
    share = (original / wavelength - low) / (high - low)
    mixed = (1 - share) * frequencies / factor + share * frequencies
    ends = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, mixed, ends)


def _yarn(periods: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Keep pairs that turn often within the original positions, stretch those that hardly do, and mix in between."""
    factor, original = scaling.factor, scaling.original_max_position_embeddings
    assert factor is not None
    assert original is not None
    channels = 2 * len(periods)

    def pair_turning(turns: float) -> float:
        return (channels * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(theta))

    first, last = pair_turning(scaling.beta_fast or 32), pair_turning(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    number = torch.arange(len(periods), dtype=torch.float32, device="cpu")
    stretched = torch.clamp((number - first) / ((last - first) or 0.001), 0, 1)
    # the complement is rounded before it is used, twice, as transformers does
    kept = 1 - stretched
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept


def attention_factor(scaling: RopeScaling | None) -> float:
    """What rotated queries and keys are multiplied by."""
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor, original = scaling.factor, scaling.original_max_position_embeddings
    assert factor is not None
    assert original is not None
    if factor <= 1:
        return 1.0
    if scaling.rope_type == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    weight, divisor_weight = 1.0, 0.0
    if scaling.mscale and scaling.mscale_all_dim:
        weight, divisor_weight = scaling.mscale, scaling.mscale_all_dim
    return (0.1 * weight * math.log(factor) + 1) / (0.1 * divisor_weight * math.log(factor) + 1)
