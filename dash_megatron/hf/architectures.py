"""Which models of others training computes exactly, told from their `config.json`: known architectures, known keys."""

from __future__ import annotations

from typing import Any

KNOWN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "minicpm", "internlm3", "dash")
"""Values of `model_type` that are taken; tests compare logits of each. SmolLM2 and Falcon3 are `llama`, and so are exports of earlier
releases; those of this one are `dash`."""

_UNSUPPORTED = {
    "granite": "multipliers on embeddings, residuals, attention and logits",
    "smollm3": "layers without rotary embedding",
    "gemma": "another norm and scaled embeddings",
    "gemma2": "other norms and soft caps on logits",
    "phi3": "fused projections",
    "olmo2": "norms behind attention and feed-forward layers",
    "minicpm3": "latent attention",
    "deepseek_v3": "latent attention and experts",
}
# read by `sections_of` and `multipliers`
_CONVERTED_KEYS = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "num_experts",
    "num_local_experts",
}
_CONVERTED_KEYS_OF = {"minicpm": {"scale_emb", "scale_depth", "dim_model_base"}, "internlm3": {"qkv_bias"}}
ATTENTION_KEYS = (
    "alpha",
    "chunk_size",
    "density_budget",
    "estimate_diagonal",
    "learned_scaling",
    "local_chunks",
    "pool_heads",
    "query_pool",
    "router_projections",
    "sigma",
)
"""Fields of a run's `attention` that an export has by the same names."""
_CONVERTED_KEYS_OF_EXPORTS = {
    *ATTENTION_KEYS,
    "full_attention_layers",
    "layer_scaling_factors",
    "qk_norm",
    "qkv_bias",
    "scaling_factor",
}
# what no logit depends on
_IGNORED_KEYS = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "mup_denominator",
    "neftune_noise_alpha",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
# what training computes as if it were this
_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "activation": "swiglu",
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "qkv_bias": False,
    "rope_interleaved": False,
    "use_mup": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    # of exports of earlier releases
    "length_scaling": 0.0,
}
_KNOWN_CLASSES = ("DashForCausalLM", "MiniCPMForCausalLM", "InternLM3ForCausalLM")
"""Classes of model files beside the weights that compute what this file says."""


def check_architecture(tree: dict[str, Any]) -> None:
    """Refuse a model that may compute something else from tensors of the same names and shapes.

    Args:
        tree: the content of its `config.json`.

    Raises:
        ValueError: its architecture, or a key that is not null, is not known to be computed exactly; the message names it.
    """
    kind = tree.get("model_type")
    if kind not in KNOWN_MODEL_TYPES:
        known = f"must be one of {', '.join(KNOWN_MODEL_TYPES)}, which training computes exactly"
        reason = f"; {kind} has {_UNSUPPORTED[kind]}" if kind in _UNSUPPORTED else ""
        raise ValueError(
            f"config.json: model_type={kind} {known}{reason}; start from one of those, or from scratch"
        )
    code = str((tree.get("auto_map") or {}).get("AutoModelForCausalLM", _KNOWN_CLASSES[0]))
    if not code.endswith(_KNOWN_CLASSES):
        raise ValueError(
            f"config.json: auto_map names {code}, code of the folder's own, and training does not know what it computes"
        )
    carried = _CONVERTED_KEYS | _CONVERTED_KEYS_OF.get(kind, set())
    if "chunk_size" in tree and code.endswith(_KNOWN_CLASSES[0]):
        carried |= _CONVERTED_KEYS_OF_EXPORTS
    _check_values(tree, carried)
    known_keys = carried | _IGNORED_KEYS | _REQUIRED_VALUES.keys()
    unknown = [f"{key}={value}" for key, value in tree.items() if value is not None and key not in known_keys]
    if unknown:
        raise ValueError(
            f"config.json has {', '.join(unknown)}, and training does not know what that changes in {kind}; if it changes nothing, "
            "remove it from config.json"
        )


def _check_values(tree: dict[str, Any], carried: set[str]) -> None:
    for key, value in _REQUIRED_VALUES.items():
        found = tree.get(key)
        if found is not None and found != value and key not in carried:
            told = {True: "true", False: "false"}
            raise ValueError(
                f"config.json: {key}={told.get(found, found)} must be {told.get(value, value)}, which training computes"
            )
    window = _window(tree)
    if window:
        raise ValueError(f"config.json: sliding_window={window} must be null: attention is full or dash")
    layers = set(tree.get("layer_types") or ()) - {"full_attention"}
    if layers:
        raise ValueError(
            f"config.json: layer_types has {sorted(layers)}, but training has full_attention only"
        )
    if tree.get("num_experts") or tree.get("num_local_experts"):
        raise ValueError("config.json: a mixture of experts cannot be trained here")


def _window(tree: dict[str, Any]) -> int | None:
    """Positions that some layer attends to; None where all attend to all. A file that says nothing is read as transformers does."""
    if tree["model_type"] not in ("qwen2", "qwen3"):
        window = tree.get("sliding_window", 4096 if tree["model_type"] == "mistral" else None)
        return window if tree.get("use_sliding_window", True) else None
    # here a window holds from some layer on, and `layer_types` says it again where the file has them
    some = tree.get("max_window_layers", 28) < tree.get("num_hidden_layers", 0)
    windowed = tree.get("use_sliding_window", False) and not tree.get("layer_types")
    return tree.get("sliding_window", 4096) if windowed and some else None
