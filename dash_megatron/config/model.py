"""Section `model` and its subsection `model.rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from dash_megatron.config.section import Section


class RopeScaling(Section):
    """How the rotary frequencies were rescaled for contexts longer than those first trained on. Field names are those of
    transformers."""

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    """The rule: all frequencies divided alike (`linear`), that of Llama 3.1, YaRN, or LongRoPE."""
    factor: float | None = Field(default=None, gt=0)
    """How many times longer the contexts became; with longrope it only sets `attention_factor`."""
    original_max_position_embeddings: int | None = Field(default=None, gt=1)
    """llama3, yarn, longrope: the number of positions before scaling. longrope uses `long_factor`, at every position, where
    `data.seq_length` exceeds it."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: frequencies whose wavelength exceeds `original_max_position_embeddings` / `low_freq_factor` are divided by
    `factor`."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: frequencies whose wavelength is below `original_max_position_embeddings` / `high_freq_factor` stay; those in
    between are interpolated."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn, longrope: multiplies rotated queries and keys; null computes it from `factor`."""
    beta_fast: float | None = Field(default=None, gt=0)
    """yarn: pairs of channels that rotate more often than this within the original positions stay; null means 32."""
    beta_slow: float | None = Field(default=None, gt=0)
    """yarn: pairs of channels that rotate less often than this are divided by `factor`; null means 1."""
    mscale: float | None = Field(default=None, ge=0)
    """yarn: weight of log `factor` in `attention_factor`; used together with `mscale_all_dim` only."""
    mscale_all_dim: float | None = Field(default=None, ge=0)
    """yarn: the weight of log `factor` in the divisor of `attention_factor`."""
    truncate: bool | None = None
    """yarn: round the bounds that `beta_fast` and `beta_slow` set to whole pairs of channels; null means true."""
    short_factor: tuple[float, ...] | None = None
    """longrope: the divisors of the frequencies, one for every two channels of a head, up to the original positions."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the divisors of the frequencies for longer sequences."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What messages show: the fields that are set."""
        return ((name, value) for name, value in super().__repr_args__() if value is not None)

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        needed, optional = _ROPE_FIELDS[self.rope_type]
        given = {name for name, value in self if value is not None} - {"rope_type"}
        if missing := sorted(needed - given):
            raise ValueError(f"model.rope_scaling: rope_type={self.rope_type} needs {missing}; set them")
        if extra := sorted(given - needed - optional):
            raise ValueError(
                f"model.rope_scaling: rope_type={self.rope_type} does not use {extra}; remove them"
            )
        if self.rope_type == "longrope" and not given & {"factor", "attention_factor"}:
            raise ValueError(
                "model.rope_scaling: rope_type=longrope needs factor or attention_factor; set one"
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not low < high:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor={low} must be below high_freq_factor={high}; Llama 3.1 has 1 and 4"
            )
        for name in ("short_factor", "long_factor"):
            if not all(value > 0 for value in getattr(self, name) or ()):
                raise ValueError(
                    f"model.rope_scaling.{name} must hold numbers above 0: they divide frequencies"
                )
        return self


# for each rule the fields that it needs, and those that it may have
_ROPE_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (
        {"original_max_position_embeddings", "short_factor", "long_factor"},
        {"factor", "attention_factor"},
    ),
}


class ModelConfig(Section):
    """The Llama-shaped decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases but those of `qkv_bias`."""

    layers: int = Field(gt=0, lt=2**16)
    """Number of transformer layers; the bound is there because plans and pictures go over all, one after the other."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    heads: int = Field(gt=0)
    """Number of query heads."""
    kv_heads: int = Field(gt=0)
    """Number of key/value heads; divides `heads`."""
    head_dim: int | None = Field(default=None, gt=0)
    """Width of one head; null means `hidden_size / heads`."""
    ffn_hidden_size: int = Field(gt=0)
    """Inner width of the SwiGLU feed-forward layer."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the embedding table; null means the tokenizer's vocabulary rounded up to a multiple of 64 and of
    `parallel.tensor`."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base period of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Stretches the rotary position embedding, as the weights that a run starts from were trained with; null does not.
    Its fields are below."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before RoPE."""
    qkv_bias: bool = False
    """Biases on queries, keys and values, which Qwen2 has; they start at zero and have no weight decay."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection too."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; projections into the residual stream use
    `init_std / sqrt(2 * layers)`."""

    @property
    def channels_per_head(self) -> int:
        """Width of one head, after resolving `head_dim: null`."""
        return self.head_dim or self.hidden_size // self.heads

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            fitting = next(n for n in range(min(self.kv_heads, 1024), 0, -1) if self.heads % n == 0)
            raise ValueError(
                f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}; "
                f"{self.heads} = {self.heads // self.kv_heads} x {self.kv_heads} + {self.heads % self.kv_heads}; "
                f"try model.kv_heads={fitting}"
            )
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.heads={self.heads} "
                "when model.head_dim is null; set model.head_dim"
            )
        if self.channels_per_head % 2:
            where = (
                "" if self.head_dim else f" = model.hidden_size={self.hidden_size} / model.heads={self.heads}"
            )
            raise ValueError(
                f"model.head_dim={self.channels_per_head}{where} must be even: RoPE rotates pairs; try "
                f"model.head_dim={self.channels_per_head + 1}"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, name, None)
            if factors is not None and len(factors) != self.channels_per_head // 2:
                raise ValueError(
                    f"model.rope_scaling.{name} has {len(factors)} numbers and must have model.head_dim / 2 = "
                    f"{self.channels_per_head // 2}, one for each pair of channels"
                )
        return self

    def check_tensor(self, tensor: int) -> None:
        """Refuse sizes that tensor-parallel processes cannot share evenly.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        divisible = [
            ("model.kv_heads", self.kv_heads, "a group of heads routes together, so no group may be split"),
            ("model.ffn_hidden_size", self.ffn_hidden_size, "each process holds as many columns"),
            ("model.vocab_size", self.vocab_size, "each process holds as many rows of the embedding table"),
        ]
        for name, value, reason in divisible:
            if value is not None and value % tensor:
                raise ValueError(
                    f"{name}={value} must be a multiple of parallel.tensor={tensor}: {reason}; "
                    f"try parallel.tensor={math.gcd(value, tensor)}"
                )
