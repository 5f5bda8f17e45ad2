"""The whole weights of a run's checkpoint, whatever layout saved it, and a model on one process that has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dash_megatron.checkpoint.files import agreed_damage
from dash_megatron.checkpoint.folder import agreed_steps, checkpoint_folder, tag_of
from dash_megatron.checkpoint.stored import CheckpointWeights, StoredState
from dash_megatron.config import AttentionConfig, Config, ParallelConfig, config_of_stored_run
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.files import check_run_folder
from dash_megatron.layers import DashGPTModel, build_model
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups


def open_weights(run_dir: str | Path, step: int | None = None) -> tuple[Config, int, CheckpointWeights]:
    """Read a run's config and step, and open its whole weights on CPU; needs no process groups.

    Where processes have joined it is collective: they divide the check for damage, and all open the same checkpoint or
    raise the same error.

    Args:
        run_dir: the run's folder.
        step: which checkpoint; None: the newest.

    Raises:
        FileNotFoundError: there is no such folder, or it has no such checkpoint.
        ValueError: it is damaged.
    """
    step = _existing_step(run_dir, step)
    folder = checkpoint_folder(run_dir) / tag_of(step)
    problem = agreed_damage(folder)
    if problem is not None:
        raise ValueError(
            f"{folder} is damaged: {problem}; restore it from a copy, name an earlier step, or move this one away"
        )
    stored = StoredState(folder)
    config = _config_of(stored, run_dir)
    factors = stored.facts.get("trainer", {}).get("density", {}).get("factors", {})
    attention = _with_factors(config.attention, config.model.layers, factors)
    return config.model_copy(update={"attention": attention}), step, CheckpointWeights(stored)


def stored_config(run_dir: str | Path, step: int | None = None) -> tuple[Config, int]:
    """The config and step of a run's checkpoint, without a look at its weights; arguments as in `open_weights`.

    Raises:
        FileNotFoundError: as `open_weights`.
        ValueError: the checkpoint's description is damaged.
    """
    step = _existing_step(run_dir, step)
    return _config_of(StoredState(checkpoint_folder(run_dir) / tag_of(step)), run_dir), step


def stored_tokenizer(config: Config, step: int) -> Tokenizer:
    """The tokenizer that a checkpoint's weights learnt, from where the run's config has it.

    Args:
        config, step: of `open_weights` or `stored_config`.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: it has been replaced since by another.
    """
    tokenizer = Tokenizer(str(config.data.tokenizer))
    StoredState(checkpoint_folder(config.run_dir) / tag_of(step)).check_tokenizer(tokenizer)
    return tokenizer


def _existing_step(run_dir: str | Path, step: int | None) -> int:
    steps = agreed_steps(run_dir)
    if not steps:
        check_run_folder(run_dir)
        raise FileNotFoundError(
            f"{run_dir} has no checkpoint; give the folder of a run that saved one, which an exported folder is not"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{run_dir} has no checkpoint of step {step}; it has {steps}")
    return steps[-1] if step is None else step


def _config_of(stored: StoredState, run_dir: str | Path) -> Config:
    return config_of_stored_run({**stored.facts["config"], "run_dir": str(run_dir)})


def _with_factors(attention: AttentionConfig, layers: int, factors: Mapping[str, float]) -> AttentionConfig:
    """The config with the scaling factors that the weights were trained with last, by layer, where training moved them."""
    if not factors:
        return attention
    moved = tuple(factors.get(str(layer), attention.layer_scaling_factor(layer)) for layer in range(layers))
    return attention.model_copy(update={"scaling_factor": moved})


def load_weights(run_dir: str | Path, step: int | None = None) -> tuple[Config, int, dict[str, Tensor]]:
    """As `open_weights`, but read all weights into memory."""
    config, step, weights = open_weights(run_dir, step)
    return config, step, dict(weights)


@contextmanager
def whole_model(
    config: Config, weights: Mapping[str, Tensor], on_cpu: bool = False
) -> Iterator[tuple[DashGPTModel, torch.device]]:
    """Build the model with whole weights on this process alone, in evaluation mode; gives it and its device.

    On the GPU it is in bfloat16 if it was trained in bf16.

    Args:
        config, weights: of `load_weights`.
        on_cpu: not on the GPU, although there is one.
    """
    config = config.model_copy(update={"parallel": ParallelConfig()})
    device = init_process_groups(Launch(rank=0, world_size=1, local_rank=0), config.parallel)
    try:
        if on_cpu:
            device = torch.device("cpu")
        model = build_model(config, weights["embedding.word_embeddings.weight"].shape[0], device)
        model.load_state_dict(weights, strict=False)
        if config.training.precision == "bf16" and device.type == "cuda":
            model.bfloat16()
        yield model.eval(), device
    finally:
        destroy_process_groups()
