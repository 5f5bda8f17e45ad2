"""A small model in a run's layout and a batch for it, which several checks compute with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from dash_megatron.config import Config, config_from_dict
from dash_megatron.data.batches import PackedBatch, pack_samples
from dash_megatron.layers import DashGPTModel, build_model, init_weights
from dash_megatron.parallel import context_rank

EOD = 0
NUM_DOCUMENTS = 4
# at the usual 0.02 so small a model computes with little but rounding
_INIT_STD = 0.2


def scaled_down(config: Config, **sections: dict[str, Any]) -> Config:
    """The same run with a model of two layers and a narrow residual stream.

    Heads, chunks and everything about processes stay. A mixture of attentions keeps one layer of each.

    Args:
        config: the run.
        sections: further changes, by section.
    """
    tree = config.model_dump(mode="json")
    model, tensor = config.model, config.parallel.tensor
    tree["model"] |= {
        "layers": 2,
        "hidden_size": 64,
        "head_dim": model.channels_per_head,
        "ffn_hidden_size": 32 * tensor,
    }
    sparse_layers = config.attention.sparse_layers(model.layers)
    tree["attention"]["full_layers"] = [0] if 0 < len(sparse_layers) < model.layers else []
    if not sparse_layers:
        tree["attention"]["kind"] = "full"
    factors = config.attention.scaling_factor
    if isinstance(factors, tuple):
        tree["attention"]["scaling_factor"] = [min(factors), max(factors)]
    tree["attention"]["target_density"] = None  # a list or a schedule is of the run's layers and steps
    tree["data"]["seq_length_curriculum"] = None
    tree["evaluation"] |= {"tasks_every": 0, "task_lengths": []}
    tree["training"]["init_from"] = None
    for name, changes in sections.items():
        tree[name] |= changes
    return config_from_dict(tree)


def tiny_config(
    config: Config, precision: Literal["bf16", "fp32"] = "fp32", backend: str | None = None
) -> Config:
    """`scaled_down`, with a small vocabulary and sequences just long enough for documents to straddle every border."""
    parallel, chunk = config.parallel, config.attention.chunk_size
    unit = math.lcm(2 * parallel.context * chunk, parallel.context * parallel.tensor)
    return scaled_down(
        config,
        model={"vocab_size": 256 * parallel.tensor, "tie_embeddings": False, "init_std": _INIT_STD},
        # mean keys are the smaller the longer the chunks; like this about half of the chunks are selected
        attention={"backend": backend or config.attention.backend, "scaling_factor": 1.5 * chunk**0.5},
        data={"seq_length": unit * -(-32 * chunk // unit)},
        training={"precision": precision, "recompute": "none"},
    )


def vocabulary_of(document: int, vocab_size: int) -> range:
    """Token ids of one document of `documents_batch`: no other document has them."""
    size = (vocab_size - 1) // NUM_DOCUMENTS
    return range(1 + document * size, 1 + (document + 1) * size)


def documents_batch(config: Config, changed: Sequence[int] = ()) -> PackedBatch:
    """This context rank's share of one row of four random documents, whose ends lie inside chunks.

    Args:
        config: as `tiny_config` makes it.
        changed: documents that have other tokens than usual.
    """
    length, vocab_size = config.data.seq_length, config.model.vocab_size
    assert vocab_size is not None
    ends = [length // 8 + 3, length // 2 + 1, length // 2 + 1 + length // 4 + 5, length + 1]
    tokens = torch.empty(length + 1, dtype=torch.int64)
    start = 0
    for document, end in enumerate(ends):
        ids = vocabulary_of(document, vocab_size)
        generator = torch.Generator().manual_seed(100 * (document in changed) + document)
        tokens[start:end] = torch.randint(ids.start, ids.stop, (end - start,), generator=generator)
        tokens[end - 1] = EOD
        start = end
    batch = pack_samples(
        [{"tokens": tokens[:-1], "labels": tokens[1:]}], EOD, pack_documents=config.data.pack_documents
    )
    chunk = config.attention.chunk_size if config.attention.kind == "dash" else None
    return batch.shard(context_rank(), config.parallel.context, chunk, config.attention.query_pool)


def build(config: Config, device: torch.device) -> DashGPTModel:
    """Build the model of a config with initial weights, in training mode; needs Megatron's groups of the layout."""
    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, device)
    init_weights(model, 0, config.model.init_std)
    return model.train()
