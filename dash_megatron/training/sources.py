"""Where a process's batches come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dash_megatron.agreement import agreed
from dash_megatron.config import Config
from dash_megatron.data.batches import BatchSource, RowDataset
from dash_megatron.data.blend import chat_template
from dash_megatron.data.dataset import TokenRows, build_dataset
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.parallel import context_rank, data_rank


def open_rows(config: Config, split: str, num_samples: int, tokenizer: Tokenizer) -> TokenRows:
    """Open the rows of `data.train` or `data.valid`; collective. Raises what `build_dataset` raises."""
    return build_dataset(
        config.data.train if split == "train" else config.data.valid,
        seq_length=config.data.seq_length,
        num_samples=num_samples,
        seed=config.training.seed,
        tokenizer=tokenizer,
        cache_dir=config.data.cache_dir or Path(config.run_dir) / "index_cache",
        split_name=split,
    )


def training_source(config: Config, tokenizer: Tokenizer, device: torch.device) -> BatchSource:
    """Open this process's share of all training batches; collective. Raises what `build_dataset` and `chat_template` raise."""
    num_samples = config.training.steps * config.training.global_batch
    agreed(lambda: chat_template(config.data.train))  # of which there must be one
    return batch_source(
        config,
        open_rows(config, "train", num_samples, tokenizer),
        tokenizer.eod,
        device,
        num_workers=config.data.num_workers,
        max_context=config.data.context_length_at,
    )


def batch_source(
    config: Config, rows: RowDataset, eod: int, device: torch.device, **settings: Any
) -> BatchSource:
    """Make batches of this process's share of some rows.

    Args:
        config: the run.
        rows: of `data.seq_length` tokens each.
        eod: the token that ends a document.
        device: what this process computes on.
        settings: arguments of `BatchSource` that replace those of training.
    """
    return BatchSource(
        rows,
        **{
            "global_batch": config.training.global_batch,
            "micro_batch": config.training.micro_batch,
            "eod": eod,
            "pack_documents": config.data.pack_documents,
            "data_parallel_rank": data_rank(),
            "data_parallel_size": config.data_parallel_size(torch.distributed.get_world_size()),
            "pin_memory": device.type == "cuda",
            "context_rank": context_rank(),
            "context_size": config.parallel.context,
            "chunk_size": config.attention.chunk_size if config.attention.kind == "dash" else None,
            "query_pool": config.attention.query_pool,
            **settings,
        },
    )
