"""A run's `model` and `attention` sections as a transformers config, and back."""

from __future__ import annotations

from typing import Any, get_args

import torch
from transformers import LlamaConfig

from dash_megatron.config import AttentionConfig, Config, ModelConfig, RopeScaling
from dash_megatron.hf.architectures import ATTENTION_KEYS, check_architecture
from dash_megatron.hf.modeling_dash import DashConfig

MODEL_FILE = "modeling_dash.py"


def is_plain_llama(config: Config) -> bool:
    """Whether the Llama of transformers computes what the run does, so that its export needs no `MODEL_FILE`."""
    model, scaling = config.model, config.model.rope_scaling
    # of longrope transformers takes the short factors for a short text, where training has one set for all lengths
    grows = scaling is not None and scaling.rope_type == "longrope"
    return not (config.attention.sparse_layers(model.layers) or model.qk_norm or model.qkv_bias or grows)


def llama_config(config: Config, vocab_size: int, dtype: torch.dtype, end_token: int) -> LlamaConfig:
    """The transformers config of a run: a Llama's where `is_plain_llama`, else one that `MODEL_FILE` alone reads.

    With a `model_type` of its own, a folder that is loaded without its file is an error, and not a model that attends to everything.
    """
    model, plain = config.model, is_plain_llama(config)
    kind = LlamaConfig if plain else DashConfig
    found = kind(
        # by which others than transformers choose a class
        architectures=["LlamaForCausalLM" if plain else "DashForCausalLM"],
        dtype=dtype,
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.channels_per_head,
        max_position_embeddings=config.data.seq_length,
        initializer_range=min(model.init_std, 1.0),
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", **_scaling_tree(model), "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        # a document starts where the one before it ended
        bos_token_id=end_token,
        eos_token_id=end_token,
        pad_token_id=end_token,
        **({} if plain else _dash_keys(config)),
    )
    # again beside `rope_parameters`: where a rope_scaling is added by hand, transformers reads the base here
    found.rope_theta = model.rope_theta
    return found


def _dash_keys(config: Config) -> dict[str, Any]:
    """What a Llama has not."""
    model, attention = config.model, config.attention
    module = MODEL_FILE.removesuffix(".py")
    return {
        "auto_map": {
            "AutoConfig": f"{module}.DashConfig",
            "AutoModel": f"{module}.DashModel",
            "AutoModelForCausalLM": f"{module}.DashForCausalLM",
        },
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        **{key: getattr(attention, key) for key in ATTENTION_KEYS},
        # nothing where layers differ: a reader of this key alone must not take one layer's for all
        "scaling_factor": None if isinstance(attention.scaling_factor, tuple) else attention.scaling_factor,
        "layer_scaling_factors": [attention.layer_scaling_factor(layer) for layer in range(model.layers)],
        "full_attention_layers": [
            layer for layer in range(model.layers) if attention.kind_of(layer) == "full"
        ],
    }


def _scaling_tree(model: ModelConfig) -> dict[str, Any]:
    if model.rope_scaling is None:
        return {}
    return model.rope_scaling.model_dump(mode="json", exclude_none=True)


def sections_of(tree: dict[str, Any], names: set[str]) -> tuple[ModelConfig, AttentionConfig]:
    """Read the `config.json` of a folder whose model is Llama-shaped.

    Args:
        tree: the file's content.
        names: of the folder's tensors, which tell what the file leaves open.

    Raises:
        ValueError: the model does something that ours does not.
    """
    check_architecture(tree)
    theta, scaling = _rope(tree)
    layers = int(_need(tree, "num_hidden_layers"))
    heads = int(_need(tree, "num_attention_heads"))
    model = ModelConfig(
        layers=layers,
        hidden_size=_need(tree, "hidden_size"),
        heads=heads,
        kv_heads=tree.get("num_key_value_heads") or heads,
        head_dim=tree.get("head_dim"),
        ffn_hidden_size=_need(tree, "intermediate_size"),
        vocab_size=_need(tree, "vocab_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
        qkv_bias=tree["model_type"] == "qwen2" or tree.get("qkv_bias") or False,
        tie_embeddings=tree.get("tie_word_embeddings", False),
        norm_eps=tree.get("rms_norm_eps", 1e-6),
        init_std=tree.get("initializer_range") or 0.02,
    )
    if "chunk_size" not in tree:
        return model, AttentionConfig(kind="full")
    return model, _attention(tree, layers)


def _attention(tree: dict[str, Any], layers: int) -> AttentionConfig:
    full = tree.get("full_attention_layers") or []
    factors = tree.get("layer_scaling_factors") or [_need(tree, "scaling_factor")] * layers
    alike = len(set(factors)) == 1
    everywhere = len(set(full)) == layers
    for key in ("chunk_size", "estimate_diagonal", "sigma"):
        _need(tree, key)
    return AttentionConfig(
        kind="full" if everywhere else "dash",
        scaling_factor=factors[0] if alike else tuple(factors),
        full_layers=() if everywhere else tuple(full),
        # an older export has not all of them
        **{key: tree[key] for key in ATTENTION_KEYS if tree.get(key) is not None},
    )


def _need(tree: dict[str, Any], key: str) -> Any:
    if tree.get(key) is None:
        raise ValueError(f"config.json has no {key}, which a Llama-shaped model needs")
    return tree[key]


def _rope(tree: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE. Transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    names = [name for name in ("rope_parameters", "rope_scaling") if tree.get(name)]
    bases = {name: tree[name]["rope_theta"] for name in names if tree[name].get("rope_theta")}
    if tree.get("rope_theta"):
        bases["rope_theta"] = tree["rope_theta"]
    scalings = {name: _scaling(tree, name) for name in names}
    for found in (bases, scalings):
        if any(value != next(iter(found.values())) for value in found.values()):
            both = " and ".join(f"{name}={tree[name]}" for name in found)
            raise ValueError(
                f"config.json: {both} disagree; keep the one that the model is meant to be computed with, in rope_parameters"
            )
    return float(next(iter(bases.values()), 10_000.0)), next(iter(scalings.values()), None)


def _scaling(tree: dict[str, Any], name: str) -> RopeScaling | None:
    rope = {key: value for key, value in tree[name].items() if value is not None and key != "rope_theta"}
    partial = rope.pop("partial_rotary_factor", None) or tree.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor={partial} must be 1: training rotates whole heads"
        )
    older = rope.pop("type", "default")
    kind = rope.pop("rope_type", older)
    if kind == "default":
        if rope:
            raise ValueError(
                f"config.json: {name} has {', '.join(f'{key}={value}' for key, value in rope.items())}, and training does not "
                f"know what that changes with rope_type={kind}; if it changes nothing, remove it from config.json"
            )
        return None
    known = get_args(RopeScaling.model_fields["rope_type"].annotation)
    if kind not in known:
        raise ValueError(
            f"config.json: {name} has rope_type={kind}, but training knows {list(known)} only; start from a model that "
            "is scaled otherwise, such as the release before its context was extended"
        )
    if kind != "linear":
        # what transformers takes where the file leaves it open, before a run has a length of its own
        longest = tree.get("max_position_embeddings")
        original = tree.get("original_max_position_embeddings") or rope.get(
            "original_max_position_embeddings", longest
        )
        rope["original_max_position_embeddings"] = original
        if kind == "longrope" and "factor" not in rope and longest and original:
            rope["factor"] = longest / original
    return RopeScaling(rope_type=kind, **rope)


def multipliers(tree: dict[str, Any]) -> tuple[float, float, float]:
    """Factors on the embedding, on every residual branch, and on the logits, which MiniCPM has and Llama has not."""
    residual = 1.0
    if tree.get("scale_depth"):
        residual = tree["scale_depth"] / tree["num_hidden_layers"] ** 0.5
    logits = tree["dim_model_base"] / tree["hidden_size"] if tree.get("dim_model_base") else 1.0
    return float(tree.get("scale_emb") or 1.0), residual, logits
