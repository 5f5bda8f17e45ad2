"""Compares an export with the training model: both must select the same chunks and give the same logits.

Both models run in float64, so that rounding decides nothing, and one matrix at a time is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dash_megatron.config import Config, ParallelConfig
from dash_megatron.hf.folder import FolderWeights
from dash_megatron.hf.modeling_dash import DashConfig, DashForCausalLM
from dash_megatron.layers import DashCoreAttention, build_model
from dash_megatron.ops import sharded_reference
from dash_megatron.ops.pooling import pool_queries
from dash_megatron.ops.shards import QueryChunks
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups

# Largest difference of two float64 runs, in logits; a wrong row or constant shows in whole units.
TOLERANCE = 1e-4
# Root mean square of what rounding weights to bfloat16 may change, over that of the logits' deviation from their mean.
BF16_TOLERANCE = 0.05
# Rows of the output projection widened at once.
_ROWS = 2**12


@dataclass(frozen=True)
class _StoredRows:
    """Rows of a tensor in a file, which is opened for each slice: a file that stays open stays in memory."""

    path: Path
    name: str

    def __getitem__(self, rows: slice) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[rows]


class Result(NamedTuple):
    """One model's answer to the probe."""

    hidden: Tensor
    """float64 [N, hidden_size], after the last norm."""
    head: Callable[[], Any]
    """Opens the output projection, [vocabulary, hidden_size]; slices of it are tensors."""
    dtype: torch.dtype
    """Data type to which the projection is rounded."""
    selected: list[Tensor | None]
    """For every layer the chunks that each token attends to, bool [Hkv, N, c]; None: full attention."""

    def logits(self, vocab_size: int, head: Any = None) -> Iterator[Tensor]:
        """Logits float64 [N, rows] of a few rows of the vocabulary after the other: all would fill the memory.

        Args:
            vocab_size: rows of the projection.
            head: the projection, where it is open already.
        """
        head = self.head() if head is None else head
        for first in range(0, vocab_size, _ROWS):
            yield self.hidden @ head[first : first + _ROWS].to(self.dtype).double().T


class Report(NamedTuple):
    """How exactly an export agrees with the training model."""

    num_tokens: int
    logits_difference: float
    """Largest absolute difference between the exported and the training model on the same weights."""
    rounding: float
    """Relative change of the training model's logits by rounding the weights; 0 for float32."""
    selecting: int
    """Layers that select chunks, which were the same ones."""
    layers: int

    @property
    def where(self) -> str:
        """The layers whose chunks were compared, for a sentence; nothing where none selects."""
        if self.selecting == self.layers:
            return "every layer"
        return f"the {self.selecting} of {self.layers} layers that select" if self.selecting else ""


def compare(folder: Path, weights: Mapping[str, Tensor], config: Config, dtype: torch.dtype) -> Report:
    """Run the probe through the exported folder and through the training model.

    Args:
        folder: exported weights with index and config.json.
        weights: the training model's, by its names.
        config: of the run.
        dtype: of the exported weights, to which the training model's are rounded.

    Raises:
        ValueError: logits or selected chunks differ.
    """
    num_tokens = 11 * config.attention.chunk_size + 5
    generator = torch.Generator().manual_seed(0)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(vocab_size, (num_tokens,), generator=generator)
    theirs = run_exported(folder, tokens)
    ours = run_training(weights, config, tokens, dtype)
    for layer, (one, other) in enumerate(zip(ours.selected, theirs.selected, strict=True)):
        if one is None and other is None:
            continue
        if one is None or other is None or not torch.equal(one, other):
            where = "" if one is None or other is None else f" at {int((one != other).sum())} places"
            raise ValueError(
                f"layer {layer} of the export selects other chunks than the training model{where}"
            )
    pairs = zip(ours.logits(vocab_size), theirs.logits(vocab_size), strict=True)
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"logits of the export differ by {difference:.2e} from the training model's, above {TOLERANCE}"
        )
    rounding = 0.0
    if dtype != torch.float32:
        rounding = _relative_change(run_training(weights, config, tokens, torch.float32), ours, vocab_size)
        if not rounding <= BF16_TOLERANCE:
            raise ValueError(
                f"rounding weights to {dtype} changes logits by {rounding:.1%}, above {BF16_TOLERANCE:.0%}; use "
                "--dtype float32"
            )
    selecting = sum(selected is not None for selected in ours.selected)
    return Report(num_tokens, difference, rounding, selecting, len(ours.selected))


def _relative_change(exact: Result, rounded: Result, vocab_size: int) -> float:
    """Root mean square of the change of logits over that of their deviation from each token's mean."""
    change = 0.0
    total_N, square_N = torch.zeros(2, len(exact.hidden), dtype=torch.float64)
    head = exact.head()
    pairs = zip(exact.logits(vocab_size, head), rounded.logits(vocab_size, head), strict=True)
    for one, other in pairs:
        change += float((one - other).square().sum())
        total_N += one.sum(-1)
        square_N += one.square().sum(-1)
    spread = float((square_N - total_N.square() / vocab_size).sum())
    return (change / spread) ** 0.5


@contextmanager
def _weights_of(
    module: torch.nn.Module, name: str, read: Callable[[str], Tensor]
) -> Iterator[torch.nn.Module]:
    """Load the weights of each part of a module in float64 while that part runs, and drop them afterwards.

    The module's own parameters are on the meta device and have shapes only.

    Args:
        name: of the module in its model.
        read: a weight by its name in the model.

    Raises:
        ValueError: a weight has another shape than the module's.
    """
    handles = []
    for prefix, part in module.named_modules(prefix=name):
        shapes = dict(part.named_parameters(recurse=False))
        names = {own: f"{prefix}.{own}" for own in shapes}

        def load(
            part: torch.nn.Module, _: Any, names: dict[str, str] = names, shapes: dict[str, Any] = shapes
        ) -> None:
            for own, full in names.items():
                tensor = read(full)
                if tensor.shape != shapes[own].shape:
                    raise ValueError(f"{full} has shape {list(tensor.shape)}, not {list(shapes[own].shape)}")
                part._parameters[own] = torch.nn.Parameter(tensor.double(), requires_grad=False)

        def drop(part: torch.nn.Module, *_: Any, shapes: dict[str, Any] = shapes) -> None:
            part._parameters.update(shapes)

        handles += [part.register_forward_pre_hook(load), part.register_forward_hook(drop)]
    try:
        yield module.eval()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_exported(folder: Path, tokens: Tensor) -> Result:
    """Logits and chunks of a folder's model for tokens [N]."""
    config = DashConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model: Any = DashForCausalLM(config)
    weights = FolderWeights(folder)
    unread = set(weights)

    def read(name: str) -> Tensor:
        unread.discard(name)
        return weights[name]

    x = read("model.embed_tokens.weight")[tokens].double()[None]
    cos, sin = model.model.rotary(torch.arange(len(tokens))[None], x.dtype)
    start = torch.zeros(1, dtype=torch.int64)
    selected: list[Tensor | None] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.keep_selection = True
        with _weights_of(layer, f"model.layers.{index}", read):
            x = layer(x, cos, sin, start, 0, None)
        selection = layer.self_attn.selection
        selected.append(None if selection is None else selection[0])
    with _weights_of(model.model.norm, "model.norm", read) as norm:
        x = norm(x)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    if extra := sorted(unread - {head}):
        raise ValueError(f"the exported model does not read {extra[0]}, which the export has")

    return Result(x[0], lambda: _StoredRows(folder / weights.files[head], head), torch.float64, selected)


@torch.no_grad()
def run_training(weights: Mapping[str, Tensor], config: Config, tokens: Tensor, dtype: torch.dtype) -> Result:
    """Logits and chunks of the training model, its weights rounded to `dtype`, for tokens [N]."""
    attention = config.attention.model_copy(update={"backend": "reference"})
    config = config.model_copy(update={"parallel": ParallelConfig(), "attention": attention})

    def read(name: str) -> Tensor:
        return weights[name].to(dtype)

    table = weights["embedding.word_embeddings.weight"]
    vocab_size, x = len(table), table[tokens].to(dtype).double()[:, None]
    del table
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), config.parallel)
    try:
        model = build_model(config, vocab_size, "meta").eval()
        rotary = model.rotary(torch.arange(len(tokens))[None])
        selected = []
        for index, layer in enumerate(model.decoder.layers):
            x, selection = _training_layer(layer, index, x, rotary, read)
            selected.append(selection)
        with _weights_of(model.decoder.final_layernorm, "decoder.final_layernorm", read) as norm:
            x = norm(x)
    finally:
        destroy_process_groups()
    head = "embedding.word_embeddings" if config.model.tie_embeddings else "output_layer"
    return Result(x[:, 0], lambda: weights[f"{head}.weight"], dtype, selected)


def _training_layer(
    layer: Any, index: int, x: Tensor, rotary: Tensor, read: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """One layer on x [N, 1, hidden_size]: its output and the chunks selected."""
    core = layer.self_attention.core_attention
    selections: list[Tensor] = []

    def keep(core: torch.nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if isinstance(core, DashCoreAttention):
            selections.append(_selection(core, *inputs[:2]))

    # a hook, since `_weights_of` drops the summary query as soon as the layer has run
    hook = core.register_forward_hook(keep)
    try:
        with _weights_of(layer, f"decoder.layers.{index}", read):
            x, _ = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary)
    finally:
        hook.remove()
    return x, selections[0] if selections else None


def _selection(core: DashCoreAttention, query: Tensor, key: Tensor) -> Tensor:
    """Which chunks each token attends to, bool [Hkv, N, c], of query and key [N, 1, heads, D] after RoPE.

    The attention itself only says how many, which this is held against.
    """
    attention, num_tokens = core.attention, len(query)
    query, key, routing_query, routing_key = core.split(query, key)
    if routing_query is not None and routing_key is not None:
        query, key = routing_query, routing_key
    number = torch.arange(-(-num_tokens // attention.chunk_size))
    start = number * attention.chunk_size
    end = (start + attention.chunk_size).clamp_max(num_tokens)
    chunks = QueryChunks(start, end, number, torch.zeros_like(number), len(number), len(number) ** 2)
    summary = sharded_reference.summarize(key[:, 0], core.summary_query, chunks, attention.chunk_size)
    pooled = pool_queries(query.transpose(0, 1), attention.query_pool, backend="reference")[0]
    routed = sharded_reference.route(pooled, summary, chunks, core.router)
    assert core.routing is not None, "the layer has run"
    torch.testing.assert_close(routed.selected.float().mean(), core.routing.chunks_selected)
    return sharded_reference.State(*routed.state).bias > float("-inf")
