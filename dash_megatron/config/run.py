"""The whole configuration of a run, and the rules that span its sections; they run when a config is read."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from dash_megatron.config.attention import AttentionConfig
from dash_megatron.config.data import DataConfig
from dash_megatron.config.evaluation import EvaluationConfig
from dash_megatron.config.model import ModelConfig
from dash_megatron.config.operation import CheckpointConfig, FaultsConfig, LoggingConfig
from dash_megatron.config.parallel import ParallelConfig, ZeroConfig
from dash_megatron.config.section import Section
from dash_megatron.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig, micro_batches


class Config(Section):
    """One run."""

    run_dir: str = Field(min_length=1)
    """Folder of everything the run writes."""
    model: ModelConfig
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    data: DataConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    training: TrainingConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        steps, seq_length = self.training.steps, self.data.seq_length
        if self.run_dir[0] in "~$":
            raise ValueError(
                f"run_dir={self.run_dir} begins with {self.run_dir[0]}, which only a shell expands; write it out"
            )
        self.attention.check_layers(self.model.layers)
        self.attention.check_density(seq_length)
        self.schedule.check_steps(steps)
        self.logging.check_steps(steps)
        self.data.check_curriculum(steps, 1 if self.attention.kind == "full" else self.attention.chunk_size)
        self.evaluation.check_data(self.data.valid, seq_length)
        self.model.check_tensor(self.parallel.tensor)
        if self.parallel.context > 1:
            self._check_context()
        self._check_exchange()
        shares = self.parallel.context * self.parallel.tensor
        if self.parallel.sequence and seq_length % shares:
            raise ValueError(
                f"data.seq_length={seq_length} must be a multiple of {shares} (parallel.context="
                f"{self.parallel.context} x parallel.tensor={self.parallel.tensor}) with parallel.sequence; "
                f"try {max(shares, seq_length // shares * shares)}"
            )
        self.zero.check_tensor(self.parallel.tensor)
        return self

    def _check_context(self) -> None:
        context, attention = self.parallel.context, self.attention
        if attention.kind == "nsa":
            raise ValueError(
                f"parallel.context={context} must be 1 with attention.kind=nsa, whose weights of heads do not follow the heads "
                "to other processes; use parallel.tensor, or another attention.kind"
            )
        if self.logging.routing_every:
            raise ValueError(
                f"logging.routing_every={self.logging.routing_every} must be 0 with parallel.context={context}, "
                "where no process has all keys of a sequence; set it to 0 and measure checkpoints, of any layout, with "
                "`python -m dash_megatron study routing RUN_DIR`"
            )
        unit = 2 * context * attention.chunk_size
        if self.data.seq_length % unit:
            raise ValueError(
                f"data.seq_length={self.data.seq_length} must be a multiple of {unit} (2 x parallel.context="
                f"{context} x attention.chunk_size={attention.chunk_size}): each process takes one part from "
                f"the front and one from the back, of whole chunks; try "
                f"{max(unit, self.data.seq_length // unit * unit)}"
            )

    def _check_exchange(self) -> None:
        parallel, attention = self.parallel, self.attention
        all_dash = attention.kind == "dash" and not attention.full_layers
        if parallel.context > 1 and parallel.context_comm != "a2a" and not all_dash:
            raise ValueError(
                f"parallel.context_comm={parallel.context_comm} with parallel.context={parallel.context} must be a2a: the "
                f"other exchanges serve DashAttention alone, but attention.kind={attention.kind} and "
                f"attention.full_layers={list(attention.full_layers)} need all keys of a sequence on one process; use "
                "parallel.context_comm=a2a"
            )
        heads = self.model.kv_heads // parallel.tensor
        if parallel.context_comm == "a2a" and heads % parallel.context:
            fitting = f"parallel.context={math.gcd(heads, parallel.context)}"
            raise ValueError(
                f"model.kv_heads={self.model.kv_heads} / parallel.tensor={parallel.tensor} = {heads} must be a "
                f"multiple of parallel.context={parallel.context} with parallel.context_comm=a2a, which deals out "
                f"whole kv heads; use {'parallel.context_comm=all_gather' if all_dash else fitting}"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """The number of processes that read different data.

        Raises:
            ValueError: `world_size` is no multiple of tensor x context.
        """
        model_size = self.parallel.tensor * self.parallel.context
        if world_size % model_size:
            lower = [f"parallel.{name}" for name in ("tensor", "context") if getattr(self.parallel, name) > 1]
            raise ValueError(
                f"parallel.tensor={self.parallel.tensor} x parallel.context={self.parallel.context} = "
                f"{model_size} must divide the {world_size} processes started; start a multiple of {model_size}, "
                f"or lower {' or '.join(lower)}"
            )
        return world_size // model_size

    def layout(self, world_size: int) -> dict[str, int]:
        """The numbers of processes that share each thing, and the ZeRO stage: what a checkpoint's files depend on."""
        return {
            "data": self.data_parallel_size(world_size),
            "context": self.parallel.context,
            "tensor": self.parallel.tensor,
            "zero": self.zero.stage,
        }

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each process runs per optimizer step.

        Raises:
            ValueError: `training.global_batch` is no multiple of micro-batch x data-parallel size.
        """
        return micro_batches(
            self.training.global_batch, self.training.micro_batch, self.data_parallel_size(world_size)
        )

    def padded_vocabulary(self, tokenizer_size: int) -> int:
        """Rows of the embedding table for a tokenizer of so many token ids.

        Raises:
            ValueError: `model.vocab_size` is smaller than the tokenizer's vocabulary.
        """
        size = self.model.vocab_size
        if size is None:
            unit = math.lcm(64, self.parallel.tensor)
            return -(-tokenizer_size // unit) * unit
        if size < tokenizer_size:
            raise ValueError(
                f"model.vocab_size={size} must be at least {tokenizer_size}, the vocabulary of data.tokenizer="
                f"{self.data.tokenizer}; use that, or null"
            )
        return size
