"""The text that is scored."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dash_megatron.data.index_file import write_index
from dash_megatron.data.sidecar import describe
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.text import LocalText


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return Tokenizer(tiny_data / "tokenizer.model")


def write(prefix: Path, lengths: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    """Write documents of these lengths, and give those that have tokens."""
    ids = np.random.default_rng(len(lengths)).integers(3, 300, sum(lengths), dtype=np.uint16)
    ids.tofile(f"{prefix}.bin")
    write_index(f"{prefix}.idx", np.array(lengths), ids.dtype)
    describe(
        prefix,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    ).write(prefix)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1]) if len(part)]


def test_documents_of_several_data_sets_follow_one_another_without_empty_ones(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    expected = write(tmp_path / "a", [3, 5, 2], tokenizer) + write(tmp_path / "b", [0, 4, 0, 1, 0], tokenizer)
    prefixes = [str(tmp_path / name) for name in "ab"]
    documents = LocalText.from_data(prefixes, tokenizer, 1).documents
    assert [document.tolist() for document in documents] == expected
    assert len(documents) == 5
    assert {type(document) for document in documents} == {np.ndarray}  # a million `memmap` take seconds
    assert [documents[number].tolist() for number in (4, 3, -1)] == [expected[4], expected[3], expected[4]]
    with pytest.raises(IndexError):
        documents[5]


def test_text_takes_no_memory_for_each_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a", [5] * 50_000, tokenizer)
    assert LocalText.from_data(
        [str(tmp_path / "a")], tokenizer, 100
    ).vocabulary  # numpy imports parts of it when first used
    tracemalloc.start()
    text = LocalText.from_data([str(tmp_path / "a")], tokenizer, 100)
    assert text.vocabulary
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()
