"""Whether exported weights compute what the training model computes: the same logits, by the same chunks.

Both models run layer by layer in float64, so that rounding decides nothing and one layer at a time is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from dash_megatron.config import Config, ParallelConfig
from dash_megatron.hf.modeling_dash import DashForCausalLM
from dash_megatron.layers import DashCoreAttention, DashGPTModel, build_model
from dash_megatron.ops import sharded_reference
from dash_megatron.ops.sharded import QueryChunks
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups

# Largest difference of two float64 runs, in logits; a wrong row or constant shows in whole units.
TOLERANCE = 1e-4
# Root mean square of what rounding weights to bfloat16 may change, over that of the logits' deviation from their mean.
BF16_TOLERANCE = 0.05
# Rows of the output projection widened at once.
_ROWS = 2**14


class Result(NamedTuple):
    """One model's answer to the probe."""

    hidden: Tensor
    """float64 [N, hidden_size], after the last norm."""
    head: Tensor
    """Output projection [vocabulary, hidden_size] in the weights' dtype."""
    selected: list[Tensor | None]
    """Of every layer, the chunks each token attends to, bool [Hkv, N, c]; None: full attention."""

    def logits(self) -> Iterator[Tensor]:
        """Logits float64 [N, rows] of a few rows of the vocabulary after the other: all would fill the memory."""
        for rows in self.head.split(_ROWS):
            yield self.hidden @ rows.double().T


class Report(NamedTuple):
    """What the comparison found."""

    num_tokens: int
    logits_difference: float
    """Largest absolute difference between the exported and the training model on the same weights."""
    rounding: float
    """What rounding the weights did to the training model's logits, relative; 0 for float32."""


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
    pairs = zip(ours.logits(), theirs.logits(), strict=True)
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"logits of the export differ by {difference:.2e} from the training model's, above {TOLERANCE}"
        )
    rounding = 0.0
    if dtype != torch.float32:
        del theirs
        rounding = _relative_change(run_training(weights, config, tokens, torch.float32), ours)
        if not rounding <= BF16_TOLERANCE:
            raise ValueError(
                f"rounding weights to {dtype} changes logits by {rounding:.1%}, above {BF16_TOLERANCE:.0%}; use "
                "--dtype float32"
            )
    return Report(num_tokens, difference, rounding)


def _relative_change(exact: Result, rounded: Result) -> float:
    """Root mean square of the change of logits over that of their deviation from each token's mean."""
    change = 0.0
    total_N, square_N = torch.zeros(2, len(exact.hidden), dtype=torch.float64)
    for one, other in zip(exact.logits(), rounded.logits(), strict=True):
        change += float((one - other).square().sum())
        total_N += one.sum(-1)
        square_N += one.square().sum(-1)
    spread = float((square_N - total_N.square() / len(exact.head)).sum())
    return (change / spread) ** 0.5


@contextmanager
def _loaded(module: torch.nn.Module, state: dict[str, Tensor]) -> Iterator[torch.nn.Module]:
    """Give a module of shapes only its weights, in float64, and take them away again."""
    module.to_empty(device="cpu").double()
    module.load_state_dict(state)
    try:
        yield module.eval()
    finally:
        module.to("meta")


@torch.no_grad()
def run_exported(folder: Path, tokens: Tensor) -> Result:
    """Logits and chunks of a folder's model for tokens [N]."""
    config = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = DashForCausalLM(config)
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name: str) -> Tensor:
        with safe_open(folder / files[name], framework="pt") as file:
            return file.get_tensor(name)

    x = read("model.embed_tokens.weight")[tokens].double()[None]
    cos, sin = model.model.rotary(torch.arange(len(tokens))[None], x.dtype)
    start = torch.zeros(1, dtype=torch.int64)
    selected: list[Tensor | None] = []
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        state = {name.removeprefix(prefix): read(name) for name in files if name.startswith(prefix)}
        layer.self_attn.keep_selection = True
        with _loaded(layer, state):
            x = layer(x, cos, sin, start, 0, None)
        selection = layer.self_attn.selection
        selected.append(None if selection is None else selection[0])
    with _loaded(model.model.norm, {"weight": read("model.norm.weight")}) as norm:
        x = norm(x)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return Result(x[0], read(head), selected)


@torch.no_grad()
def run_training(weights: Mapping[str, Tensor], config: Config, tokens: Tensor, dtype: torch.dtype) -> Result:
    """Logits and chunks of the training model, its weights rounded to `dtype`, for tokens [N]."""
    attention = config.attention.model_copy(update={"backend": "reference"})
    config = config.model_copy(update={"parallel": ParallelConfig(), "attention": attention})

    def read(name: str) -> Tensor:
        return weights[name].to(dtype)

    table = read("embedding.word_embeddings.weight")
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), config.parallel)
    try:
        model = build_model(config, len(table), "meta").eval()
        x = table[tokens].double()[:, None]
        del table
        rotary = model.rotary(torch.arange(len(tokens))[None])
        selected = []
        for index, layer in enumerate(model.decoder.layers):
            x, selection = _training_layer(layer, index, x, rotary, model, read)
            selected.append(selection)
        with _loaded(
            model.decoder.final_layernorm, {"weight": read("decoder.final_layernorm.weight")}
        ) as norm:
            x = norm(x)
    finally:
        destroy_process_groups()
    head = "embedding.word_embeddings" if config.model.tie_embeddings else "output_layer"
    return Result(x[:, 0], read(f"{head}.weight"), selected)


def _training_layer(
    layer: Any, index: int, x: Tensor, rotary: Tensor, model: DashGPTModel, read: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """One layer on x [N, 1, hidden_size]: its output and the chunks selected."""
    prefix = f"decoder.layers.{index}."
    state = {name: read(prefix + name) for name, _ in layer.named_parameters()}
    core = layer.self_attention.core_attention
    seen: list[Tensor] = []
    hook = core.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
    try:
        with _loaded(layer, state):
            x, _ = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary)
            selection = _selection(core, *seen) if isinstance(core, DashCoreAttention) else None
    finally:
        hook.remove()
    return x, selection


def _selection(core: DashCoreAttention, query: Tensor, key: Tensor) -> Tensor:
    """Which chunks each token attends to, bool [Hkv, N, c], of query and key [N, 1, heads, D] after RoPE.

    The attention itself only says how many, which this is held against.
    """
    attention, num_tokens = core.attention, len(query)
    number = torch.arange(-(-num_tokens // attention.chunk_size))
    start = number * attention.chunk_size
    end = (start + attention.chunk_size).clamp_max(num_tokens)
    chunks = QueryChunks(start, end, number, torch.zeros_like(number), len(number), len(number) ** 2)
    router = sharded_reference.Router(
        core.scaling_factor, attention.sigma, attention.estimate_diagonal, attention.alpha
    )
    summary = sharded_reference.summarize(key[:, 0], core.summary_query, start, end, attention.chunk_size)
    routed = sharded_reference.route(query[:, 0], summary, chunks, router, attention.chunk_size)
    assert core.routing is not None, "the layer has run"
    torch.testing.assert_close(routed.selected.float().mean(), core.routing.chunks_selected)
    return routed.bias > float("-inf")
