"""The run's configuration: frozen, typed sections and every rule between them.

Fields come first, each with its docstring; `docs/configuration.md` is generated from them. The rules that
span sections are methods of `Config`; they run when a config is read, before any process group exists.
Reading YAML and overrides lives in `loading.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from dash_megatron.config.attention import AttentionConfig
from dash_megatron.config.curriculum import check_curriculum, context_length_at
from dash_megatron.config.evaluation import EvaluationConfig, check_evaluation
from dash_megatron.config.rope import RopeScaling
from dash_megatron.config.running import CheckpointConfig, FaultsConfig, LoggingConfig
from dash_megatron.config.section import Section


class ModelConfig(Section):
    """The Llama-shaped decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

    layers: int = Field(gt=0)
    """Number of transformer layers."""
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
            raise ValueError(
                f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}; "
                f"{self.heads} = {self.heads // self.kv_heads} x {self.kv_heads} + {self.heads % self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.heads={self.heads} "
                "when model.head_dim is null; set model.head_dim"
            )
        if self.channels_per_head % 2:
            raise ValueError(f"model.head_dim={self.channels_per_head} must be even: RoPE rotates pairs")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, name, None)
            if factors is not None and len(factors) != self.channels_per_head // 2:
                raise ValueError(
                    f"model.rope_scaling.{name} has {len(factors)} numbers and must have model.head_dim / 2 = "
                    f"{self.channels_per_head // 2}, one for each pair of channels"
                )
        return self


class DataConfig(Section):
    """What the model reads."""

    tokenizer: str | None = None
    """Path of what the data was tokenized with: a sentencepiece BPE model, as `data_tools.train_tokenizer` or Llama 2
    has, or a Hugging Face `tokenizer.json` beside its `tokenizer_config.json`, as Llama 3 and Qwen have."""
    train: tuple[str, ...] = ()
    """Training blend: prefixes of `.bin/.idx` pairs, each optionally preceded by its weight and a space
    (`"0.7 data/web"`); without weights, data sets are mixed in proportion to their tokens."""
    valid: tuple[str, ...] = ()
    """Validation blend, in the form of `train`; empty means no validation."""
    seq_length: int = Field(gt=1)
    """Tokens in one training sequence."""
    seq_length_curriculum: dict[int, int] | None = None
    """Most tokens of context by the step from which on it holds, such as `{0: 2048, 1000: 8192, 4000: 16384}`; the last one
    is `seq_length`. Rows keep `seq_length` tokens, in the same order, with the same targets: they are cut at multiples of
    the length, as if documents ended there, but for the loss, which still asks the last token before a cut for the one
    after it. Validation always has whole rows."""
    pack_documents: bool = True
    """Keep documents packed into one sequence apart: no attention across, positions restart at each.
    False attends across them."""
    num_workers: int = Field(default=1, ge=0)
    """Background threads per process that read batches ahead; 0 reads in the training thread."""
    cache_dir: str | None = None
    """Where sample-order indices are kept; null means `<run_dir>/index_cache`."""

    def context_length_at(self, step: int) -> int:
        """Most tokens of context of the step after `step` finished ones."""
        return context_length_at(self.seq_length_curriculum, self.seq_length, step)


class ParallelConfig(Section):
    """How one model is split over processes; the rest of the processes are data parallel."""

    tensor: int = Field(default=1, gt=0)
    """Tensor-parallel size: processes that share every matrix; divides `model.kv_heads`."""
    sequence: bool = False
    """Share also the tokens among tensor-parallel processes wherever each token is computed alone (norms, residual
    stream): less memory, the same communication."""
    context: int = Field(default=1, gt=0)
    """Context-parallel size: processes that share one sequence."""
    context_comm: Literal["all_gather", "a2a", "p2p", "sparse"] = "all_gather"
    """What context-parallel processes exchange: all keys and values at once (`all_gather`), heads for tokens (`a2a`),
    keys and values around a ring (`p2p`), or the selected chunks only (`sparse`). Layers with full attention need `a2a`."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 replicates everything, 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed through to DeepSpeed's `zero_optimization` section, for example `overlap_comm: true`."""


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms, summary queries and learned factors are not decayed."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 means no clipping."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must both lie in [0, 1), such as (0.9, 0.95)")
        return self


class ScheduleConfig(Section):
    """Learning rate over steps, as a fraction of `optimizer.lr`."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: a half cosine, warm-up-stable-decay (constant, then linear), or constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = Field(default=None, gt=0)
    """wsd: steps of the final decay; null means a fifth of `training.steps`."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step over the peak (cosine and wsd)."""


class TrainingConfig(Section):
    """How long, how much at once, and in which arithmetic."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch: int = Field(gt=0)
    """Sequences per optimizer step, over all processes and micro-batches."""
    micro_batch: int = Field(default=1, gt=0)
    """Sequences per forward pass of one process."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights and moments; fp32 is for small models and parity tests."""
    seed: int = Field(default=1234, ge=0)
    """Seeds weights, data order and every random generator."""
    init_from: str | None = None
    """Weights that a new run starts from: another run's folder, whose newest checkpoint is taken, or a folder that
    `python -m dash_megatron convert from-hf` wrote; null draws them. A run that resumes does not read it."""
    recompute: Literal["none", "attention", "full"] = "none"
    """What backward recomputes instead of keeping: nothing, core attention, or whole layers."""


class Config(Section):
    """One run."""

    run_dir: str
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
        self._check_layers()
        self._check_schedule()
        self._check_parallel()
        self._check_zero()
        return self

    def _check_layers(self) -> None:
        wrong = [index for index in self.attention.full_layers if not 0 <= index < self.model.layers]
        if wrong:
            raise ValueError(
                f"attention.full_layers={list(self.attention.full_layers)} names layer {wrong[0]}, but "
                f"model.layers={self.model.layers}: layers are counted from 0 to {self.model.layers - 1}"
            )
        factors = self.attention.scaling_factor
        if isinstance(factors, tuple) and len(factors) != self.model.layers:
            raise ValueError(
                f"attention.scaling_factor lists {len(factors)} numbers and must list model.layers={self.model.layers}, "
                "or be one number for all layers"
            )

        for targets in self.attention.target_density_lists:
            if len(targets) != self.model.layers:
                raise ValueError(
                    f"attention.target_density lists {len(targets)} numbers and must list model.layers={self.model.layers}, "
                    "or be one number for all layers"
                )

    def _check_schedule(self) -> None:
        warmup, decay, steps = self.schedule.warmup_steps, self.schedule.decay_steps or 0, self.training.steps
        if self.schedule.kind != "wsd":
            decay = 0
        if warmup + decay > steps:
            raise ValueError(
                f"schedule.warmup_steps={warmup} + schedule.decay_steps={decay} = {warmup + decay} must not "
                f"exceed training.steps={steps}; shorten them or train longer"
            )
        if self.data.seq_length_curriculum is not None:
            chunk = 1 if self.attention.kind == "full" else self.attention.chunk_size
            check_curriculum(self.data.seq_length_curriculum, self.data.seq_length, steps, chunk)
        check_evaluation(self.evaluation, self.data.valid, self.data.seq_length)

    def _check_parallel(self) -> None:
        parallel, model = self.parallel, self.model
        divisible = [
            ("model.kv_heads", model.kv_heads, "a group of heads routes together, so no group may be split"),
            ("model.ffn_hidden_size", model.ffn_hidden_size, "each process holds as many columns"),
            ("model.vocab_size", model.vocab_size, "each process holds as many words"),
        ]
        for name, value, reason in divisible:
            if value is not None and value % parallel.tensor:
                raise ValueError(
                    f"{name}={value} must be a multiple of parallel.tensor={parallel.tensor}: {reason}; "
                    f"try parallel.tensor={math.gcd(value, parallel.tensor)}"
                )
        if parallel.sequence and parallel.tensor == 1:
            raise ValueError(
                "parallel.sequence=true needs parallel.tensor > 1, among whose processes it shares the tokens; "
                "set parallel.sequence=false, or parallel.tensor"
            )
        self._check_context()
        shares = parallel.context * parallel.tensor
        if parallel.sequence and self.data.seq_length % shares:
            raise ValueError(
                f"data.seq_length={self.data.seq_length} must be a multiple of {shares} (parallel.context="
                f"{parallel.context} x parallel.tensor={parallel.tensor}) with parallel.sequence; "
                f"try {max(shares, self.data.seq_length // shares * shares)}"
            )

    def _check_context(self) -> None:
        parallel, attention = self.parallel, self.attention
        if parallel.context > 1 and attention.kind in ("infllmv2", "nsa"):
            raise ValueError(
                f"parallel.context={parallel.context} must be 1 with attention.kind={attention.kind}, which chooses among "
                "all keys of a sequence on one process; use parallel.tensor, or attention.kind=dash or full"
            )
        if parallel.context > 1 and self.logging.routing_every:
            raise ValueError(
                f"logging.routing_every={self.logging.routing_every} must be 0 with parallel.context={parallel.context}, "
                "where no process has all keys of a sequence; set it to 0 and measure checkpoints, of any layout, with "
                "`python -m dash_megatron study routing RUN_DIR`"
            )
        unit = 2 * parallel.context * attention.chunk_size
        if parallel.context > 1 and self.data.seq_length % unit:
            raise ValueError(
                f"data.seq_length={self.data.seq_length} must be a multiple of {unit} (2 x parallel.context="
                f"{parallel.context} x attention.chunk_size={attention.chunk_size}): each process takes a piece from "
                f"the front and one from the back, of whole chunks; try "
                f"{max(unit, self.data.seq_length // unit * unit)}"
            )
        some_full = attention.kind == "full" or bool(attention.full_layers)
        if parallel.context > 1 and parallel.context_comm != "a2a" and some_full:
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
                f"whole kv heads; use {fitting if some_full else 'parallel.context_comm=all_gather'}"
            )

    def _check_zero(self) -> None:
        reserved = sorted({"stage"} & set(self.zero.options))
        if reserved:
            raise ValueError(f"zero.options={self.zero.options} must not set {reserved}; use zero.stage")
        if self.parallel.tensor == 1:
            return
        if self.zero.stage == 0:
            raise ValueError(
                f"zero.stage=0 must be 1, 2 or 3 with parallel.tensor={self.parallel.tensor}: without ZeRO, "
                "DeepSpeed's gradient norm and clipping do not reach every tensor-parallel process; use zero.stage=1"
            )
        # groups of neighbouring processes, which here hold shards of different weights
        neighbours = {"zero_hpz_partition_size", "zero_quantized_gradients", "mics_shard_size"}
        wrong = sorted(neighbours & set(self.zero.options))
        if wrong:
            raise ValueError(
                f"zero.options={self.zero.options} must not set {wrong} with parallel.tensor={self.parallel.tensor}: "
                "DeepSpeed shards over neighbouring processes then, which hold different weights; remove it"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Processes that read different data.

        Raises:
            ValueError: `world_size` does not divide by tensor x context.
        """
        model_size = self.parallel.tensor * self.parallel.context
        if world_size % model_size:
            raise ValueError(
                f"parallel.tensor={self.parallel.tensor} x parallel.context={self.parallel.context} = "
                f"{model_size} must divide the {world_size} processes started; start a multiple of {model_size}"
            )
        return world_size // model_size

    def layout(self, world_size: int) -> dict[str, int]:
        """How many processes share what, and the ZeRO stage: what a checkpoint's files depend on."""
        return {
            "data": self.data_parallel_size(world_size),
            "context": self.parallel.context,
            "tensor": self.parallel.tensor,
            "zero": self.zero.stage,
        }

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches each process runs per optimizer step.

        Raises:
            ValueError: `training.global_batch` is no multiple of micro-batch x data-parallel size.
        """
        per_pass = self.training.micro_batch * self.data_parallel_size(world_size)
        count, rest = divmod(self.training.global_batch, per_pass)
        if rest or not count:
            nearest = max(1, round(self.training.global_batch / per_pass)) * per_pass
            raise ValueError(
                f"training.global_batch={self.training.global_batch} must be a multiple of {per_pass} = "
                f"training.micro_batch={self.training.micro_batch} x {self.data_parallel_size(world_size)} "
                f"data-parallel processes; try {nearest}"
            )
        return count
