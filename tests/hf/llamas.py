"""Models of others, on disk and as the start of a run."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dash_megatron.config import config_from_dict
from dash_megatron.training.initial import load_initial_weights
from tests.hf.conftest import training_model

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
MINICPM = {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}


def save_llama(folder: Path, changes: dict[str, Any] | None = None, **shape: Any) -> None:
    """Write a small Llama with random weights, with `changes` to what its config.json says."""
    LlamaForCausalLM(LlamaConfig(**SHAPE, **shape)).save_pretrained(folder)
    change_config(folder, changes or {})


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    """Change or add keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run_config(tiny_config: dict[str, Any], folder: Path, **attention: Any) -> Any:
    """The config of a run that starts from `folder`."""
    sections = yaml.safe_load((folder / "model.yaml").read_text())
    training = {**tiny_config["training"], "init_from": str(folder)}
    return config_from_dict(
        {**tiny_config, "model": sections["model"], "attention": attention, "training": training}
    )


@torch.no_grad()
def first_logits(config: Any, tokens: Tensor) -> Tensor:
    """What a run from `training.init_from` computes before its first step, float32."""
    with training_model(config) as model:
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        for name, parameter in model.named_parameters():
            if name.endswith(("summary_query", "log_scaling")):
                parameter.zero_()
        load_initial_weights(model, config.training.init_from, config.model)
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
