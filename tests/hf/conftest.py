"""Runs to export without training them, and a place of its own for the model files that transformers copies."""

import os
import tempfile

# read when transformers is imported
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_megatron.checkpoint import files
from dash_megatron.checkpoint.folder import DESCRIPTION
from dash_megatron.checkpoint.stored import describe_fragments
from dash_megatron.config import Config, config_from_dict
from dash_megatron.layers import DashGPTModel, build_model, init_weights
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups

VOCAB_SIZE = 320
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# what the shape of a model may be: changes to `tiny_config`
MODELS: dict[str, dict[str, Any]] = {
    "dash": {},
    "mixed": {
        "model": {
            "qk_norm": True,
            "qkv_bias": True,
            "tie_embeddings": True,
            "layers": 3,
            "head_dim": 24,
            "rope_scaling": YARN,
        },
        "attention": {
            "full_layers": [1],
            "alpha": 1.3,
            "scaling_factor": [20.0, 1.0, 30.0],
            "local_chunks": 1,
            "query_pool": 60,
            "pool_heads": True,
            "learned_scaling": 3.0,
            "density_budget": "model",
        },
    },
    "own_router": {
        "model": {"qk_norm": True, "qkv_bias": True, "layers": 3},
        "attention": {
            "full_layers": [1],
            "scaling_factor": 10.0,
            "local_chunks": 1,
            "query_pool": 20,
            "pool_heads": True,
            "router_projections": True,
        },
    },
    "full": {"attention": {"kind": "full"}},
    "full_with_norms": {"attention": {"kind": "full"}, "model": {"qk_norm": True}},
    "plain_prior": {
        "attention": {"estimate_diagonal": False, "alpha": 2.0},
        "model": {"kv_heads": 4, "rope_scaling": LLAMA3},
    },
}

# those that the Llama of transformers does not compute, so that an export brings its own file
WITH_FILE = [name for name in MODELS if name != "full"]


@contextmanager
def training_model(config: Config, vocab_size: int = VOCAB_SIZE) -> Iterator[DashGPTModel]:
    """The training model of a config in a process group of one."""
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), config.parallel)
    try:
        yield build_model(config, vocab_size).eval()
    finally:
        destroy_process_groups()


@torch.no_grad()
def training_logits(config: Config, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [B, N, vocabulary], computed in the weights' dtype."""
    with training_model(config, len(weights["embedding.word_embeddings.weight"])) as model:
        model.to(weights["embedding.word_embeddings.weight"].dtype).load_state_dict(weights, strict=False)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions)


@pytest.fixture
def write_run(tiny_config: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[Config, dict[str, Tensor]]]:
    """`write_run(name)` writes a checkpoint of random weights of `MODELS[name]` and gives back config and weights.

    Weights are large, so that routers select, and no norm or summary query is left at its initial value.
    """

    def write(name: str, **changes: Any) -> tuple[Config, dict[str, Tensor]]:
        tree = {**tiny_config, "run_dir": str(tmp_path / f"run_{name}")}
        for section in ("model", "attention", "data"):
            tree[section] = {"scaling_factor": 3.0} if section == "attention" else {}
            tree[section] |= tiny_config[section] | MODELS[name].get(section, {}) | changes.get(section, {})
        config = config_from_dict(tree)
        with training_model(config) as model:
            init_weights(model, seed=1, std=0.3)
            generator = torch.Generator().manual_seed(2)
            weights = {key: value.detach().clone() for key, value in model.named_parameters()}
        for key, value in weights.items():
            if value.dim() == 1 or key.endswith("summary_query"):
                value += torch.randn(value.shape, generator=generator) * 0.3
        folder = Path(config.run_dir) / "checkpoints" / "step_00000001"
        folder.mkdir(parents=True)
        name_of = files.state_file(0)
        parts = {f"weight/{key}": value.flatten() for key, value in weights.items()}
        facts = {
            "format": files.FORMAT,
            "step": 1,
            "layout": config.layout(1),
            "splits": {},
            "shapes": {key: list(value.shape) for key, value in weights.items()},
            "fragments": describe_fragments([(0, dict.fromkeys(weights, 0))]),
            "config": config.model_dump(mode="json"),
        }
        entries = {name_of: files.write_tensors(folder / name_of, parts)}
        entries[DESCRIPTION] = files.write_json(folder / DESCRIPTION, facts)
        files.write_json(folder / files.MANIFEST, {"files": entries})
        return config, weights

    return write


@pytest.fixture
def tokens() -> Tensor:
    """Two rows of 200 tokens, more than twelve chunks."""
    return torch.randint(VOCAB_SIZE, (2, 200), generator=torch.Generator().manual_seed(3))
