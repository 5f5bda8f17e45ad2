"""Rows of whole conversations, alone and beside plain text."""

import json
import logging
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dash_megatron.data.batches import BatchSource, num_target_tokens, pack_samples
from dash_megatron.data.blend import chat_template
from dash_megatron.data.chat import MARKED_PLAIN_TEMPLATE, PLAIN_TEMPLATE
from dash_megatron.data.conversations import _best_fit, order_of_conversations
from dash_megatron.data.dataset import build_dataset
from dash_megatron.data.sidecar import Sidecar, answers_path, check_data, sidecar_path

SEQ_LENGTH = 32


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(blend, **changes):
        settings = {"seq_length": SEQ_LENGTH, "num_samples": 10, "seed": 1, "tokenizer": tokenizer}
        return build_dataset(blend, **(settings | {"cache_dir": tmp_path / "cache"} | changes))

    return build


def conversations(seed: int, count: int, most: int, eod: int) -> tuple[list[list[int]], list[list[int]]]:
    """Documents that begin with a number of their own, some with ends of sequence inside, and marks of their answers."""
    rng = np.random.default_rng(seed)
    documents, answers = [], []
    for number in range(count):
        length = int(rng.integers(4, most))
        document = [3 + number, *rng.integers(150, 300, length - 1).tolist()]
        marks = (rng.random(length + 1) < 0.3).astype(int).tolist()
        marks[0], marks[2] = 0, 1
        if number % 2:
            document[length // 2] = eod
        documents.append(document)
        answers.append(marks)
    return documents, answers


def documents_of(batch) -> list[tuple[list[int], list[int]]]:
    """Tokens of each document of a batch, and the labels that count."""
    found = []
    borders = batch.cu_seqlens.tolist()
    for start, end in pairwise(borders):
        counted = batch.labels[0, start:end][batch.loss_mask[0, start:end]].tolist()
        found.append((batch.tokens[0, start:end].tolist(), counted))
    return found


def test_conversations_whose_index_is_damaged_are_not_packed(write_data, tmp_path, tokenizer):
    documents, answers = conversations(0, 10, 20, tokenizer.eod)
    prefix = write_data(tmp_path / "a", documents, answers=answers)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(34)  # the first length
        file.write(np.array([2], dtype=np.int32).tobytes())
    with pytest.raises(ValueError, match=r"a\.idx is damaged"):
        order_of_conversations(prefix, SEQ_LENGTH, 1)


def test_a_pass_has_every_conversation_once_and_whole_and_counts_its_answers_alone(
    write_data, build, tmp_path, tokenizer
):
    documents, answers = conversations(0, 100, 20, tokenizer.eod)
    dataset = build([write_data(tmp_path / "a", documents, answers=answers)], num_samples=None)
    expected = {
        3 + number: (
            [*document, tokenizer.eod],
            [t for t, mark in zip([*document, tokenizer.eod], marks, strict=True) if mark],
        )
        for number, (document, marks) in enumerate(zip(documents, answers, strict=True))
    }
    seen = Counter()
    for index in range(len(dataset)):
        batch = pack_samples([dataset[index]], tokenizer.eod)
        assert batch.tokens.shape == (1, SEQ_LENGTH)
        for tokens, counted in documents_of(batch):
            if tokens[0] == tokenizer.eod:  # what is left of the row
                assert set(tokens) == {tokenizer.eod}
                assert not counted
                continue
            assert (tokens, counted) == expected[tokens[0]]
            seen[tokens[0]] += 1
    assert seen == Counter(expected.keys())
    total = sum(len(tokens) for tokens, _ in expected.values())
    assert len(dataset) * SEQ_LENGTH <= 1.1 * total  # rows are filled


def test_rows_of_conversations_are_ordered_once_and_again_for_other_marks(
    write_data, build, tmp_path, tokenizer, monkeypatch, caplog
):
    documents, answers = conversations(0, 100, 40, tokenizer.eod)
    prefix = write_data(tmp_path / "a", documents, answers=answers)
    first = build([prefix], num_samples=None)
    made = []
    monkeypatch.setattr(
        "dash_megatron.data.dataset.order_of_conversations",
        lambda *arguments: made.append(arguments) or order_of_conversations(*arguments),
    )
    caplog.clear()
    again = build([prefix], num_samples=None)
    assert not made
    assert "conversations are longer than data.seq_length=32" in caplog.text  # at every start
    for index in range(len(first)):
        assert all(torch.equal(first[index][name], again[index][name]) for name in first[index])
    answers[-1][-1] ^= 1
    write_data(tmp_path / "a", documents, answers=answers)
    build([prefix], num_samples=None)
    assert len(made) == 1


def test_a_conversation_goes_where_it_leaves_least_room_and_there_to_the_last_row():
    for seed in range(20):
        drawn = np.random.default_rng(seed)
        seq_length = int(drawn.integers(5, 60))
        lengths = drawn.integers(1, seq_length + 1, 200).tolist()
        rooms: list[int] = []
        got_last: list[int] = []  # when each row got a document
        expected = []
        for number, length in enumerate(lengths):
            fitting = [row for row, room in enumerate(rooms) if room >= length]
            row = min(fitting, key=lambda row: (rooms[row], -got_last[row]), default=len(rooms))
            if row == len(rooms):
                rooms.append(seq_length)
                got_last.append(0)
            rooms[row] -= length
            got_last[row] = number
            expected.append(row)
        assert _best_fit(lengths, seq_length).tolist() == expected


def test_packing_takes_as_long_for_each_conversation_however_many_there_are():
    begin = time.monotonic()
    rows = _best_fit([1] + [60] * 400_000, 100)  # which leave rows with room for the first
    assert rows.max() == 399_999
    assert time.monotonic() - begin < 10


def test_rows_attend_across_conversations_where_documents_are_not_packed(
    write_data, build, tmp_path, tokenizer
):
    documents, answers = conversations(0, 10, 8, tokenizer.eod)
    dataset = build([write_data(tmp_path / "a", documents, answers=answers)], num_samples=None)
    apart, across = (pack_samples([dataset[0]], tokenizer.eod, packed) for packed in (True, False))
    assert across.cu_seqlens.tolist() == [0, SEQ_LENGTH]
    assert torch.equal(apart.loss_mask, across.loss_mask)


def test_a_longer_conversation_is_cut_or_left_out_and_counted(write_data, build, tmp_path, tokenizer, caplog):
    # with its end one more than a row, of which the last is a label
    fits = [list(range(100, 100 + SEQ_LENGTH))]
    cut = [list(range(100, 100 + SEQ_LENGTH + 1))]
    late = [list(range(100, 180))]
    marks = [[0, 1] + [0] * (SEQ_LENGTH - 2) + [1]]
    marks.append([0, 1] + [0] * (SEQ_LENGTH - 2) + [1, 1])
    marks.append([0] * 60 + [1] * 21)
    empty: list[list[int]] = [[]]  # its end alone, which is not told: it is not long
    prefix = write_data(tmp_path / "a", fits + cut + late + empty, answers=[*marks, [0]])
    with caplog.at_level(logging.WARNING):
        dataset = build([prefix], num_samples=None)
    assert (
        "2 of 4 conversations are longer than data.seq_length=32: 1 are cut there, and 1 are left out"
        in caplog.text
    )
    found = sorted(documents_of(pack_samples([dataset[i]], tokenizer.eod))[0] for i in range(len(dataset)))
    assert found == sorted([(fits[0], [101, tokenizer.eod]), (cut[0][:-1], [101, cut[0][-1]])])
    with pytest.raises(ValueError, match=r"no conversation .* in its first data\.seq_length=16"):
        build([write_data(tmp_path / "b", late, answers=marks[2:])], seq_length=16)


def test_rows_are_mixed_with_those_of_plain_text_and_go_on_where_they_ended(
    write_data, build, tmp_path, tokenizer
):
    documents, answers = conversations(0, 60, 20, tokenizer.eod)
    plain = [[int(t) for t in np.random.default_rng(i).integers(150, 300, 40)] for i in range(40)]
    prefixes = [write_data(tmp_path / "a", documents, answers=answers), write_data(tmp_path / "b", plain)]
    blend = [f"0.5 {prefix}" for prefix in prefixes]
    rows = build(blend, num_samples=200)
    longer = build(blend, num_samples=300)
    for index in range(200):
        assert all(torch.equal(rows[index][name], longer[index][name]) for name in rows[index])
    kinds = Counter("starts" in rows[index] for index in range(200))
    assert kinds == {True: 100, False: 100}
    # of every kind once, where one pass is read
    once = build(prefixes, num_samples=None, split_name="valid")
    assert 0 < sum("starts" in once[index] for index in range(len(once))) < len(once)
    source = BatchSource(rows, global_batch=8, micro_batch=4, eod=tokenizer.eod)
    batch = source.next_batch()
    alone = [pack_samples([rows[index]], tokenizer.eod) for index in range(4)]
    assert num_target_tokens(batch) == sum(num_target_tokens(one) for one in alone)
    assert documents_of(batch) == [document for one in alone for document in documents_of(one)]


def test_lost_replaced_and_useless_marks_are_refused(write_data, tmp_path, tokenizer):
    documents, answers = conversations(0, 20, 20, tokenizer.eod)
    prefix = write_data(tmp_path / "a", documents, answers=answers)
    assert check_data(prefix, tokenizer, 1000).answer_tokens == sum(map(sum, answers))
    marks = answers_path(prefix)
    shutil.copy(marks, tmp_path / "kept")
    marks.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.answers\.bin does not exist; it says which tokens"):
        check_data(prefix, tokenizer, 10)
    marks.write_bytes(bytes(len((tmp_path / "kept").read_bytes())))
    with pytest.raises(ValueError, match=r"a\.answers\.bin was replaced since"):
        check_data(prefix, tokenizer, 10)
    # marks beside data that was described without them
    plain = write_data(tmp_path / "b", documents)
    shutil.copy(tmp_path / "kept", answers_path(plain))
    with pytest.raises(ValueError, match=r"b\.answers\.bin was replaced since"):
        check_data(plain, tokenizer, 10)
    with pytest.raises(ValueError, match="marks no token"):
        check_data(write_data(tmp_path / "c", [[5, 6]], answers=[[0, 0, 0]]), tokenizer, 10)
    with pytest.raises(ValueError, match=r"has 2 bytes and must have 3, one for each token"):
        write_data(tmp_path / "d", [[5, 6]], answers=[[0, 1]])


def test_sidecars_of_before_have_no_answers_and_a_blend_speaks_one_template(write_data, tmp_path):
    prefixes = [write_data(tmp_path / name, [[5, 6, 7]]) for name in "abc"]
    path = sidecar_path(prefixes[0])
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if not k.startswith(("answer", "chat"))}))
    assert Sidecar.read(prefixes[0]).answer_tokens is None
    assert chat_template(prefixes) is None
    for prefix, template in zip(prefixes[1:], "xy", strict=True):
        Path(sidecar_path(prefix)).write_text(json.dumps({**values, "chat_template": template}))
    assert chat_template(prefixes[:2]) == "x"
    with pytest.raises(ValueError, match=r"b and .*c were rendered by different chat templates"):
        chat_template(prefixes)
    for prefix, template in zip(prefixes[1:], (MARKED_PLAIN_TEMPLATE, PLAIN_TEMPLATE), strict=True):
        Path(sidecar_path(prefix)).write_text(json.dumps({**values, "chat_template": template}))
    assert chat_template(prefixes) == PLAIN_TEMPLATE
