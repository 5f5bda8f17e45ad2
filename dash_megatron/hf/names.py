"""Tensors of the training model under Hugging Face's names, and back: exact rearrangements of rows, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.config import AttentionConfig, ModelConfig


class Piece(NamedTuple):
    """Tensors that convert together: a layer, or what stands before or after all layers."""

    ours: dict[str, tuple[int, ...]]
    """Shapes under the training model's names."""
    theirs: dict[str, tuple[int, ...]]
    """Shapes under Hugging Face's names."""
    layer: int | None
    """Number of the layer; None outside layers."""


def pieces(model: ModelConfig, attention: AttentionConfig, vocab_size: int) -> list[Piece]:
    """The pieces of a model, which together have all of its tensors, in the order of the forward pass."""
    width = model.hidden_size
    table = (vocab_size, width)
    first = Piece({"embedding.word_embeddings.weight": table}, {"model.embed_tokens.weight": table}, None)
    last = Piece({"decoder.final_layernorm.weight": (width,)}, {"model.norm.weight": (width,)}, None)
    if not model.tie_embeddings:
        last.ours["output_layer.weight"] = table
        last.theirs["lm_head.weight"] = table
    return [first, *(_layer(model, attention, index) for index in range(model.layers)), last]


def _layer(model: ModelConfig, attention: AttentionConfig, index: int) -> Piece:
    width, inner, D = model.hidden_size, model.ffn_hidden_size, model.channels_per_head
    q, kv = model.heads * D, model.kv_heads * D
    kinds = _PROJECTED[5 if attention.has_router_projections(index) else 3]
    projected = {name: q if name == "q" else kv for name in kinds}
    fused = sum(projected.values())
    ours: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attention.linear_qkv.weight": (fused, width),
        "self_attention.linear_proj.weight": (width, q),
        "pre_mlp_layernorm.weight": (width,),
        "mlp.linear_fc1.weight": (2 * inner, width),
        "mlp.linear_fc2.weight": (width, inner),
    }
    theirs: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        **{f"self_attn.{name}_proj.weight": (rows, width) for name, rows in projected.items()},
        "self_attn.o_proj.weight": (width, q),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    if model.qkv_bias:
        ours["self_attention.linear_qkv.bias"] = (fused,)
        theirs |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in projected.items()}
    if model.qk_norm:
        ours |= {f"self_attention.{name}_layernorm.weight": (D,) for name in "qk"}
        theirs |= {f"self_attn.{name}_norm.weight": (D,) for name in "qk"}
    if attention.kind_of(index) != "full":
        ours["self_attention.core_attention.summary_query"] = (model.kv_heads, D)
        theirs["self_attn.indexer_q"] = (kv,)
        if attention.learned_scaling:
            ours["self_attention.core_attention.log_scaling"] = (model.kv_heads,)
            theirs["self_attn.indexer_log_scaling"] = (model.kv_heads,)
    return Piece(
        {f"decoder.layers.{index}.{name}": shape for name, shape in ours.items()},
        {f"model.layers.{index}.{name}": shape for name, shape in theirs.items()},
        index,
    )


# tensors that are only renamed: their rows stay as they are
_RENAMED_ONLY = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.core_attention.log_scaling": "self_attn.indexer_log_scaling",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV = "self_attention.linear_qkv."
# what a group's heads in the fused projection are, by how many kinds there are: the router's own stand behind attention's
_PROJECTED = {3: ("q", "k", "v"), 5: ("q", "indexer_q", "k", "indexer_k", "v")}
_GATE_UP = "mlp.linear_fc1.weight"
_SUMMARY_QUERY = "self_attention.core_attention.summary_query"


def to_hugging_face(ours: Mapping[str, Tensor], piece: Piece, model: ModelConfig) -> dict[str, Tensor]:
    """Rearrange a piece's tensors, whose shapes are `piece.ours`, into those of `piece.theirs`."""
    before, after = _prefixes(piece)
    result: dict[str, Tensor] = {}
    for name in piece.ours:
        short, tensor = name.removeprefix(before), ours[name]
        if short.startswith(_QKV):
            pattern = "self_attn.{}_proj." + short.removeprefix(_QKV)
            parts = _split_qkv(tensor, model)
            result |= zip(_names(after, pattern, _PROJECTED[len(parts)]), parts, strict=True)
        elif short == _GATE_UP:
            # the rows of the gate stand above those of the other factor
            result |= zip(_names(after, "mlp.{}_proj.weight", ("gate", "up")), tensor.chunk(2), strict=True)
        elif short == _SUMMARY_QUERY:
            result[f"{after}self_attn.indexer_q"] = tensor.flatten()
        else:
            result[after + _RENAMED_ONLY[short]] = tensor
    return {name: tensor.contiguous() for name, tensor in result.items()}


def from_hugging_face(theirs: Mapping[str, Tensor], piece: Piece, model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`."""
    after, before = _prefixes(piece)
    result: dict[str, Tensor] = {}
    for name, shape in piece.ours.items():
        short = name.removeprefix(after)
        if short.startswith(_QKV):
            pattern = "self_attn.{}_proj." + short.removeprefix(_QKV)
            own = before + pattern.format("indexer_q") in theirs
            names = _names(before, pattern, _PROJECTED[5 if own else 3])
            result[name] = _join_qkv([theirs[each] for each in names], model)
        elif short == _GATE_UP:
            result[name] = torch.cat(
                [theirs[each] for each in _names(before, "mlp.{}_proj.weight", ("gate", "up"))]
            )
        elif short == _SUMMARY_QUERY:
            result[name] = theirs[f"{before}self_attn.indexer_q"].view(shape)
        else:
            result[name] = theirs[before + _RENAMED_ONLY[short]]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _prefixes(piece: Piece) -> tuple[str, str]:
    if piece.layer is None:
        return "", ""
    return f"decoder.layers.{piece.layer}.", f"model.layers.{piece.layer}."


def _names(prefix: str, pattern: str, parts: tuple[str, ...] | str) -> list[str]:
    return [prefix + pattern.format(part) for part in parts]


def _split_qkv(qkv: Tensor, model: ModelConfig) -> list[Tensor]:
    """Rows of each of `_PROJECTED`, of a matrix or a bias: Megatron keeps each group's query heads beside its key and value
    head."""
    heads = qkv.view(model.kv_heads, -1, model.channels_per_head, *qkv.shape[1:])
    group = model.heads // model.kv_heads
    return [x.flatten(0, 2) for x in heads.split([group, *[1] * (heads.shape[1] - group)], dim=1)]


def _join_qkv(parts: list[Tensor], model: ModelConfig) -> Tensor:
    heads = [x.view(model.kv_heads, -1, model.channels_per_head, *x.shape[1:]) for x in parts]
    return torch.cat(heads, dim=1).flatten(0, 2)
