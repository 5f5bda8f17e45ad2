"""Sections of how one model is split over processes: `parallel` and `zero`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dash_megatron.config.section import Section


class ParallelConfig(Section):
    """How one model is split over processes; the remaining factor of their number is data parallelism."""

    tensor: int = Field(default=1, gt=0)
    """Tensor-parallel size: the number of processes that share every matrix; it divides `model.kv_heads`."""
    sequence: bool = False
    """Also share the tokens among tensor-parallel processes wherever each token is computed alone (norms, residual
    stream): less memory, the same communication."""
    context: int = Field(default=1, gt=0)
    """Context-parallel size: the number of processes that share one sequence."""
    context_comm: Literal["all_gather", "a2a", "p2p", "sparse"] = "all_gather"
    """What context-parallel processes exchange: all keys and values at once (`all_gather`), heads for tokens (`a2a`),
    keys and values around a ring (`p2p`), or the selected chunks only (`sparse`). Layers with full attention need `a2a`."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence=true needs parallel.tensor > 1, among whose processes it shares the tokens; "
                "set parallel.sequence=false, or parallel.tensor"
            )
        return self


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 replicates everything, 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    options: dict[str, Any] = Field(default_factory=dict, examples=["{overlap_comm: true}"])
    """Passed through to DeepSpeed's `zero_optimization` section, for example `overlap_comm: true`."""

    @model_validator(mode="after")
    def _check(self) -> ZeroConfig:
        if "stage" in self.options:
            raise ValueError(f"zero.options={self.options} must not set ['stage']; use zero.stage")
        if self.options.get("zero_quantized_gradients"):
            raise ValueError(
                f"zero.options={self.options} must not set ['zero_quantized_gradients']: DeepSpeed's kernel reads every gradient "
                "as float16, and here they are float32 or bfloat16; remove it"
            )
        return self

    def check_tensor(self, tensor: int) -> None:
        """Refuse what DeepSpeed cannot do where tensor-parallel processes hold shards of different weights.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        if tensor == 1:
            return
        if self.stage == 0:
            raise ValueError(
                f"zero.stage=0 must be 1, 2 or 3 with parallel.tensor={tensor}: without ZeRO, "
                "DeepSpeed's gradient norm and clipping do not reach every tensor-parallel process; use zero.stage=1"
            )
        # groups of neighbouring processes, which here hold shards of different weights
        neighbours = {"zero_hpz_partition_size", "mics_shard_size"}
        wrong = sorted(neighbours & set(self.options))
        if wrong:
            raise ValueError(
                f"zero.options={self.options} must not set {wrong} with parallel.tensor={tensor}: "
                "DeepSpeed shards over neighbouring processes then, which hold different weights; remove it"
            )
