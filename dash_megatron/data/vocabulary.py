"""How many rows the embedding table of a config has."""

from __future__ import annotations

import functools
from pathlib import Path

from dash_megatron.config import Config
from dash_megatron.data.tokenizer import Tokenizer


def vocabulary_rows(config: Config) -> int:
    """Rows of the embedding table: `model.vocab_size`, or where that is null, the tokenizer's vocabulary, padded.

    Raises:
        ValueError: `model.vocab_size` is null and there is no tokenizer.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    path = config.data.tokenizer
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"model.vocab_size is null, and data.tokenizer={path} is not there to tell; set model.vocab_size, such as "
            "model.vocab_size=128256, to go without a tokenizer"
        )
    return config.padded_vocabulary(_tokenizer_size(path))


@functools.cache
def _tokenizer_size(path: str) -> int:
    return Tokenizer(path).vocab_size
