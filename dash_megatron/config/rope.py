"""The configuration's `model.rope_scaling`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dash_megatron.config.section import Section


class RopeScaling(Section):
    """How rotary frequencies were stretched beyond the positions first trained on; names are transformers'."""

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    """Rule: every frequency alike, Llama 3.1's, YaRN, or LongRoPE."""
    factor: float | None = Field(default=None, gt=0)
    """How many times longer contexts became; with longrope it only gives `attention_factor`."""
    original_max_position_embeddings: int | None = Field(default=None, gt=1)
    """llama3, yarn, longrope: positions before scaling. longrope takes `long_factor` where `data.seq_length` exceeds
    it, at every position."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths above original positions / this are divided by `factor`."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths below original positions / this stay; in between, both are mixed."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn, longrope: multiplies rotated queries and keys; null computes it from `factor`."""
    beta_fast: float | None = Field(default=None, gt=0)
    """yarn: pairs that turn more often in the original positions stay; null means 32."""
    beta_slow: float | None = Field(default=None, gt=0)
    """yarn: pairs that turn less often are divided by `factor`; null means 1."""
    mscale: float | None = Field(default=None, ge=0)
    """yarn: weight of log `factor` in `attention_factor`; used with `mscale_all_dim` only."""
    mscale_all_dim: float | None = Field(default=None, ge=0)
    """yarn: the same weight in the divisor of `attention_factor`."""
    truncate: bool | None = None
    """yarn: round the borders that the betas set to whole pairs; null means true."""
    short_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency, one for every two channels of a head."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the same for longer sequences."""

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


# of each rule, the fields that it needs and those it can do without
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
