"""The rows of the embedding table of a config."""

from typing import Any

import pytest

from dash_megatron.config import Config, config_from_dict
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.data.vocabulary import vocabulary_rows


def config_of(model: dict[str, Any], tokenizer: str | None, tensor: int = 1) -> Config:
    sizes = {"layers": 1, "hidden_size": 12, "heads": 6, "kv_heads": 6, "ffn_hidden_size": 24}
    return config_from_dict(
        {
            "run_dir": "run",
            "model": sizes | model,
            "data": {"seq_length": 64, "tokenizer": tokenizer},
            "training": {"steps": 1, "global_batch": 1},
            "parallel": {"tensor": tensor},
        }
    )


def test_rows_come_from_the_config_or_the_padded_tokenizer(tokenizer: Tokenizer) -> None:
    assert vocabulary_rows(config_of({"vocab_size": 96}, None)) == 96
    rows = [vocabulary_rows(config_of({}, str(tokenizer.path), tensor)) for tensor in (1, 3)]
    assert rows == [320, 384]
    with pytest.raises(ValueError, match=r"vocab_size is null, and data\.tokenizer=none\.model is not there"):
        vocabulary_rows(config_of({}, "none.model"))


def test_a_table_smaller_than_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    config = config_of({"vocab_size": 96}, str(tokenizer.path))
    with pytest.raises(ValueError, match=r"model\.vocab_size=96 must be at least 300"):
        config.padded_vocabulary(300)
