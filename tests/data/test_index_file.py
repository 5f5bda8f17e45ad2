import errno
import resource
import tracemalloc

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from dash_megatron.data import index_file
from dash_megatron.data.index_file import (
    check_bin_size,
    check_lengths,
    read_index,
    token_dtype,
    write_index,
)


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
@pytest.mark.parametrize("vocab_size", [4096, 1 << 16, (1 << 16) + 1])
def test_the_index_equals_megatrons_byte_for_byte(tmp_path, vocab_size, at_once, monkeypatch):
    monkeypatch.setattr(index_file, "_DOCUMENTS_AT_ONCE", at_once)
    dtype = token_dtype(vocab_size)
    assert np.iinfo(dtype).max >= vocab_size - 1
    documents = [[1, 2, 3], [4], list(range(50))]
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "megatron.idx"))

    write_index(tmp_path / "ours.idx", np.array([len(document) for document in documents]), dtype)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "megatron.idx").read_bytes()
    np.array([token for document in documents for token in document], dtype=dtype).tofile(
        tmp_path / "ours.bin"
    )
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[index].tolist() for index in range(len(read))] == documents


def test_writing_an_index_takes_no_memory_for_each_document(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "_DOCUMENTS_AT_ONCE", 1000)
    lengths = np.ones(200_000, dtype=np.int32)
    tracemalloc.start()
    write_index(tmp_path / "data.idx", lengths, token_dtype(100))
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    assert read_index(tmp_path / "data").tokens == 200_000


@pytest.mark.parametrize("missing", [1, 3000, 8500, 16500, 19000])
def test_an_index_for_which_the_disk_has_no_room_is_an_error_of_the_disk(tmp_path, missing):
    lengths = np.ones(1000, dtype=np.int32)
    write_index(tmp_path / "whole.idx", lengths, token_dtype(100))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "whole.idx").stat().st_size - missing
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=r"data\.idx|File too large") as caught:
            write_index(tmp_path / "data.idx", lengths, token_dtype(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_an_index_with_more_than_two_gigatokens_keeps_its_offsets(tmp_path):
    lengths = np.array([2**31 - 1, 2**31 - 1, 5], dtype=np.int32)
    write_index(tmp_path / "big.idx", lengths, token_dtype(100))
    summary = read_index(tmp_path / "big")
    assert (summary.documents, summary.tokens) == (3, 2**32 + 3)
    assert summary.bin_bytes == 2 * (2**32 + 3)


def test_a_truncated_or_foreign_index_is_named(tmp_path):
    path = tmp_path / "data.idx"
    with pytest.raises(FileNotFoundError, match=r"data\.idx does not exist"):
        read_index(tmp_path / "data")
    write_index(path, np.arange(1, 100), token_dtype(100))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated"):
        read_index(tmp_path / "data")
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match="must be a Megatron index"):
        read_index(tmp_path / "data")
    path.write_bytes(b"X" * len(whole))
    with pytest.raises(ValueError, match="must be a Megatron index"):
        read_index(tmp_path / "data")


def test_an_index_is_summed_up_by_its_end_and_damage_before_that_by_who_reads_all(tmp_path):
    lengths = np.array([3, 0, 4], dtype=np.int32)
    write_index(tmp_path / "data.idx", lengths, token_dtype(100))
    check_lengths(tmp_path / "data")
    with open(tmp_path / "data.idx", "r+b") as file:
        file.seek(34)  # the first length
        file.write(np.array([5], dtype=np.int32).tobytes())
    assert read_index(tmp_path / "data").tokens == 7
    with pytest.raises(ValueError, match=r"data\.idx is damaged: .* add up to 9 tokens, and must to 7"):
        check_lengths(tmp_path / "data")


def test_an_index_without_documents_has_no_tokens(tmp_path):
    write_index(tmp_path / "data.idx", np.zeros(0, dtype=np.int32), token_dtype(100))
    assert read_index(tmp_path / "data").bin_bytes == 0


def test_a_bin_of_another_size_is_named(tmp_path):
    write_index(tmp_path / "data.idx", np.array([3, 4]), token_dtype(100))
    index = read_index(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"data\.bin does not exist"):
        check_bin_size(tmp_path / "data", index)
    for size, state in ((13, "truncated"), (16, "longer than its index")):
        (tmp_path / "data.bin").write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"data\.bin has {size} bytes and must have 14 .*{state}"):
            check_bin_size(tmp_path / "data", index)


def test_a_file_or_a_folder_in_place_of_a_prefix_is_told_what_to_write(tmp_path):
    (tmp_path / "train.bin").touch()
    with pytest.raises(FileNotFoundError, match=rf"write {tmp_path}/train, without \.bin"):
        read_index(tmp_path / "train.bin")
    with pytest.raises(FileNotFoundError, match=rf"is a folder: .* such as {tmp_path}/train$"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"make it with `python -m data_tools\.tokenize_corpus`"):
        read_index(tmp_path / "valid")
