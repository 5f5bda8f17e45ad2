import json
import re

import pytest
import torch

from dash_megatron.data.dataset import build_dataset
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.text import LocalText
from data_tools import tokenize_corpus
from data_tools.make_retrieval import main


@pytest.fixture
def arguments(tmp_path, tokenizer_path, texts):
    (tmp_path / "text.txt").write_text("\n".join(texts))
    return [
        "--text", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer_path), "--lengths", "500", "2000",
        "--tokens", "20000",
    ]  # fmt: skip


def _documents(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_documents_have_the_lengths_asked_for_and_every_answer_stands_before_its_question(
    tmp_path, arguments, tokenizer_path, capsys
):
    output = tmp_path / "made" / "retrieval.jsonl"
    assert main([*arguments, "--output", str(output)]) == 0
    documents = _documents(output)
    assert f"{len(documents)} documents" in capsys.readouterr().out
    tokenizer = Tokenizer(tokenizer_path)
    lengths = [len(tokenizer.encode(text)) + 1 for text in documents]
    assert 20000 <= sum(lengths) < 22000
    assert min(lengths) >= 500
    assert max(lengths) <= 2000
    assert max(lengths) > 1.5 * min(lengths)
    needles = [text for text in documents if "Numbers are hidden" in text]
    pairs_to_recall = [text for text in documents if "Numbers are hidden" not in text]
    assert len(needles) > len(pairs_to_recall) > 2
    for text in needles:
        questions = re.findall(r"In the text above, the number of (\w+) is (\d{7})\n", text)
        assert 1 <= len(questions) <= 128
        assert len(questions) == len(re.findall(r"The number of \w+ is \d{7}\.", text))
        for name, secret in questions:
            assert text.index(f"The number of {name} is {secret}.") < text.index("In the text above")
    for text in pairs_to_recall:
        # text of the corpus fills up the beginning
        lines = re.sub(
            r"^.*?\n(?=\w{6} \w{6}\n\w{6} \w{6}\n\w{6} \w{6}\n)", "", text, flags=re.DOTALL
        ).splitlines()
        pairs = list(dict.fromkeys(lines))
        asked = lines[len(pairs) :]
        assert lines[: len(pairs)] == pairs
        assert len(set(asked)) == len(asked)
        assert 0.12 * len(lines) < len(asked) <= len(lines) / 2


def test_documents_of_one_length_are_whole_rows_of_it(tmp_path, arguments, tokenizer_path):
    output = tmp_path / "retrieval.jsonl"
    assert main([*arguments, "--lengths", "640", "640", "--output", str(output)]) == 0
    tokenize = [
        "--input",
        str(output),
        "--tokenizer",
        str(tokenizer_path),
        "--output",
        str(tmp_path / "tokens"),
    ]
    assert not tokenize_corpus.main([*tokenize, "--valid-fraction", "0", "--workers", "1"])
    tokenizer = Tokenizer(tokenizer_path)
    blend, cache = [str(tmp_path / "tokens" / "train")], tmp_path / "cache"
    rows = build_dataset(blend, seq_length=640, num_samples=20, seed=0, tokenizer=tokenizer, cache_dir=cache)
    ends = [torch.nonzero(rows[index]["tokens"] == tokenizer.eod).flatten().tolist() for index in range(20)]
    assert ends == [[639]] * 20


def test_documents_that_tokenize_corpus_holds_out_give_no_filler(tmp_path, arguments, tokenizer_path):
    lines = [f"word{number} stands here alone" for number in range(400)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenize = [
        "--input",
        str(corpus),
        "--tokenizer",
        str(tokenizer_path),
        "--output",
        str(tmp_path / "tokens"),
    ]
    assert not tokenize_corpus.main([*tokenize, "--valid-fraction", "0.5", "--workers", "1"])
    tokenizer = Tokenizer(tokenizer_path)
    held_out = LocalText.from_data([str(tmp_path / "tokens" / "valid")], tokenizer, 1).documents
    names = {tokenizer.decode(ids.tolist()).split()[0] for ids in held_out}
    assert 100 < len(names) < 300
    output = tmp_path / "retrieval.jsonl"
    more = ["--text", str(corpus), "--valid-fraction", "0.5", "--output", str(output)]
    assert main([*arguments[2:], *more]) == 0
    used = set(re.findall(r"word\d+", output.read_text()))
    assert len(used) > 100
    assert not used & names


def test_a_seed_gives_the_same_documents_each_time_and_another_seed_others(tmp_path, arguments):
    outputs = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for output, seed in zip(outputs, ("1", "1", "2"), strict=True):
        assert main([*arguments, "--seed", seed, "--output", str(output)]) == 0
    a, b, c = map(_documents, outputs)
    assert a == b
    assert not set(a) & set(c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--lengths", "2000", "500"],
            "--lengths 2000 500 must be at least 64 tokens, and the second no less than",
        ),
        (["--tokens", "0"], "--tokens 0.0 must be above 0"),
        (["--text", "nowhere.txt"], "nowhere.txt (relative to "),
        (["--output", "made.txt"], "must end in .jsonl"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(
    tmp_path, arguments, change, message, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main([*arguments, "--output", "made.jsonl", *change]) == 1
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
