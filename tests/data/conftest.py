"""A small tokenizer, and a maker of indexed data."""

from pathlib import Path

import numpy as np
import pytest

from dash_megatron.data.index_file import token_dtype, write_index
from dash_megatron.data.sidecar import answers_path, describe
from dash_megatron.data.tokenizer import Tokenizer
from data_tools.train_tokenizer import train


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(
        "\n".join(f"    def number_{i}(self): return {i}  # caf\u00e9" for i in range(2000))
    )
    return train([str(folder / "text.txt")], folder / "tokenizer.model", vocab_size=320)[0]


@pytest.fixture
def write_data(tokenizer):
    """A function that writes documents of token ids (without eod) to PREFIX.bin, .idx and the sidecar.

    With answers, which have a mark for each token, the end included, they are conversations.
    """

    def write(
        prefix: Path,
        documents: list[list[int]],
        sidecar: bool = True,
        answers: list[list[int]] | None = None,
    ) -> str:
        dtype = token_dtype(tokenizer.vocab_size)
        ended = [[*document, tokenizer.eod] for document in documents]
        np.array([token for document in ended for token in document], dtype=dtype).tofile(f"{prefix}.bin")
        write_index(f"{prefix}.idx", np.array([len(document) for document in ended], dtype=np.int32), dtype)
        if answers is not None:
            answers_path(prefix).write_bytes(bytes(mark for document in answers for mark in document))
        if sidecar:
            describe(
                prefix,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod=tokenizer.eod,
            ).write(prefix)
        return str(prefix)

    return write
