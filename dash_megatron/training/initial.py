"""Start a run from the weights of another run, or of a folder that `convert from-hf` made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import Tensor

from dash_megatron.agreement import agreed
from dash_megatron.checkpoint.folder import (
    MODEL_SECTIONS,
    agreed_steps,
    check_initial_folder,
    check_same_model,
    run_and_step,
)
from dash_megatron.checkpoint.stored import CheckpointWeights, check_learnt_tokenizer
from dash_megatron.checkpoint.weights import open_weights
from dash_megatron.config import AttentionConfig, ModelConfig
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf.folder import FolderWeights, read_tensors
from dash_megatron.layers import DashCoreAttention, DashGPTModel
from dash_megatron.layers.router_projections import add_routing_rows
from dash_megatron.layers.sharding import shard, split_of, whole_shape

logger = logging.getLogger(__name__)

_FUSED = (".linear_qkv.weight", ".linear_qkv.bias")
_CORE_ATTENTION = ".core_attention."
"""In the names of weights that belong to `attention.kind`."""


@torch.no_grad()
def load_initial_weights(
    model: DashGPTModel, folder: str | Path, config: ModelConfig, tokenizer: Tokenizer | None = None
) -> AttentionConfig | None:
    """Fill a model with a folder's weights, of which each process keeps its tensor-parallel shard; collective.

    Every process reads all weights, which the processes of a machine together take from its disk once, as files are mapped into
    memory; they divide the check of a run's checkpoint for damage.

    A dense model has none of what sparse attention itself learns: the summary queries of DashAttention, or the compression
    and gates of NSA. Where the folder lacks them they keep their initial values; a summary query of zero averages keys.
    Projections of the router that it lacks begin as attention's (`add_routing_rows`): until they learn, they route as a router
    without them does, but for `model.qk_norm`, which is then of the mean query. Learned factors of kv heads stay what they are
    where `attention.learned_scaling` is another number here.

    Args:
        model: on any device, its weights initialized and not yet sharded by ZeRO.
        folder: of a run, whose newest checkpoint is taken, saved by any layout; of such a checkpoint; or of `convert from-hf`.
        config: the run's `model` section.
        tokenizer: the run's; where the folder's weights learnt another, a warning tells. None: nothing is compared.

    Returns:
        The `attention` section that the weights are of, scaling factors where their run had moved them; None of a dense model.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a checkpoint is damaged, a tensor is missing, unknown or of another shape, or the run's model is another one.
    """
    folder = Path(folder)
    saved, attention, weights = _open(folder)
    check_same_model(config, saved, folder)
    if tokenizer is not None:
        try:
            _check_tokenizer(tokenizer, weights, folder)
        except ValueError as error:
            logger.warning("training.init_from: %s, unless both mean the same by their token ids", error)
    group = model.pg_collection.tp
    parameters = dict(model.named_parameters())
    extra = sorted(set(weights) - set(parameters))
    if extra:
        raise ValueError(
            f"training.init_from={folder} has tensor {extra[0]}, which this model does not have; {_remedy(extra[0], attention)}"
        )
    fresh: dict[str, int] = {}
    copied = 0
    for name, parameter in parameters.items():
        if _CORE_ATTENTION in name and name not in weights:
            kind = name.rpartition(".")[2]
            fresh[kind] = fresh.get(kind, 0) + 1
            continue
        split = split_of(parameter)
        shape = tuple(whole_shape(parameter.shape, split, group.size()))
        whole, begins = _read(weights, name, shape, config, f"training.init_from={folder}")
        copied += begins and whole.dim() > 1
        if name.endswith(".log_scaling") and attention is not None:
            rate = cast(
                DashCoreAttention, model.get_submodule(name.rpartition(".")[0])
            ).attention.learned_scaling
            whole = whole * (attention.learned_scaling / rate)
        parameter.copy_(shard(whole, split, group.rank(), group.size()))
    _tell_lacking(folder, fresh, copied)
    return attention


def _read(
    weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...], config: ModelConfig, source: str
) -> tuple[Tensor, bool]:
    """A whole weight, and whether it lacked rows of the router's projections, which then begin as attention's.

    Raises:
        ValueError: it is missing or of another shape, or has such rows where this run has none.
    """
    if not name.endswith(_FUSED) or name not in weights:
        return read_tensors(weights, {name: shape}, source)[name], False
    found = weights[name]
    missing, routing_rows = shape[0] - len(found), 2 * config.kv_heads * config.channels_per_head
    if missing == -routing_rows:
        raise ValueError(
            f"{source} has the router's own projections in {name}, and this run has none in that layer; set "
            "attention.router_projections=true, and attention.kind and attention.full_layers as that run has them"
        )
    if missing == routing_rows:
        found = add_routing_rows(found, config.kv_heads, config.channels_per_head)
    return read_tensors({name: found}, {name: shape}, source)[name], missing == routing_rows


def _remedy(name: str, attention: AttentionConfig | None) -> str:
    """What makes room for a weight: the settings of a folder's attention on which it depends."""
    if attention is None or _CORE_ATTENTION not in name:
        return "compare model and attention with the config there"
    keys = ["learned_scaling"] if name.endswith(".log_scaling") else []
    settings = attention.model_dump(mode="json")
    told = (f"attention.{key}={settings[key]}" for key in (*keys, "kind", "full_layers"))
    return f"set {', '.join(told)} as there"


def _tell_lacking(folder: Path, fresh: dict[str, int], copied: int) -> None:
    """Log of how many layers weights were not there."""
    if copied:
        message = "%s has no projections of routers: those of %d layers begin as copies of attention's"
        logger.info(message, folder, copied)
    if fresh:
        message = "%s has no %s for %d layers: these weights start as they do in a new run"
        logger.info(message, folder, ", ".join(sorted(fresh)), max(fresh.values()))


def _open(folder: Path) -> tuple[ModelConfig, AttentionConfig | None, Mapping[str, Tensor]]:
    """The model section, the attention section but of a dense model's folder, and the weights, read when asked for."""
    agreed(lambda: check_initial_folder(folder))
    run, step = run_and_step(folder)
    if agreed_steps(run):
        config, _, weights = open_weights(run, step)
        return config.model, config.attention, weights
    sections = yaml.safe_load((folder / MODEL_SECTIONS).read_text())
    given = sections.get("attention")
    attention = None if given is None else AttentionConfig.model_validate(given)
    return ModelConfig.model_validate(sections["model"]), attention, FolderWeights(folder)


def _check_tokenizer(tokenizer: Tokenizer, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Compare with the tokenizer that the folder's weights learnt, as far as it is known.

    Raises:
        ValueError: it is another.
    """
    if isinstance(weights, CheckpointWeights):
        weights.state.check_tokenizer(tokenizer)
        return
    for name in ("tokenizer.model", "tokenizer.json"):  # `convert from-hf` leaves one
        path = folder / name
        # most runs take the folder's own, which is read already
        if path.is_file() and path.resolve() != Path(tokenizer.path).resolve():
            check_learnt_tokenizer(tokenizer, Tokenizer(path).fingerprint, folder)
