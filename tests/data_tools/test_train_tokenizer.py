import pytest

from dash_megatron.data.tokenizer import Tokenizer
from data_tools.readers import TooManyBadLines
from data_tools.train_tokenizer import _pieces, main, train


def test_the_same_text_gives_the_same_file_wherever_it_lies(tmp_path, write_input, texts):
    models = []
    for name in ("one.jsonl", "two.parquet"):
        train([str(write_input(tmp_path / name, texts))], tmp_path / f"{name}.model", vocab_size=330)
        models.append((tmp_path / f"{name}.model").read_bytes())
    assert models[0] == models[1]


def test_indentation_and_newlines_get_pieces_of_their_own(tmp_path, write_input):
    code = "def f(x):\n    if x:\n        return x\n\n"
    path = write_input(tmp_path / "a.jsonl", [code * (number + 1) for number in range(100)])
    tokenizer, bytes_per_token = train([str(path)], tmp_path / "tokenizer.model", vocab_size=290)
    assert len(tokenizer.encode(" " * 8)) == 1
    assert len(tokenizer.encode(":\n    ")) <= 2
    assert bytes_per_token > 2.5
    assert (tokenizer.bos, tokenizer.eod, tokenizer.vocab_size) == (1, 2, 290)
    assert len(tokenizer.encode("12345")) == 5


def test_pieces_are_the_whole_text_and_never_end_in_a_newline():
    text = (
        "".join(f"line {number}\n" + " " * (number % 50) for number in range(1000))
        + "\n\n\n" * 3
        + "x" * 5000
    )
    pieces = list(_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2000
    assert not any(piece.endswith("\n") for piece in pieces)


def test_texts_with_the_trainers_own_marks_are_not_lost(tmp_path, write_input):
    path = write_input(tmp_path / "a.jsonl", ["\u2585 marked\x00word marked\tword"] * 300)
    tokenizer, _ = train([str(path)], tmp_path / "tokenizer.model", vocab_size=270)
    assert len(tokenizer.encode("marked")) < 6


def test_a_vocabulary_that_does_not_fit_the_corpus_says_what_would(tmp_path, write_input, texts, capsys):
    path = write_input(tmp_path / "a.jsonl", texts[:20])
    arguments = ["--input", str(path), "--output", str(tmp_path / "tokenizer.model"), "--vocab-size"]
    assert main([*arguments, "5000"]) == 1
    error = capsys.readouterr().err
    assert "error: --vocab-size=5000 must be at most" in error
    highest = error.split("set --vocab-size ")[1].split()[0]
    assert main([*arguments, highest]) == 0
    assert f"{highest} pieces" in capsys.readouterr().out
    assert main([*arguments, "265"]) == 1
    assert "--vocab-size=265 must be at least" in capsys.readouterr().err
    assert main([*arguments, "100"]) == 1
    assert "--vocab-size=100 must be at least 260" in capsys.readouterr().err


def test_an_empty_corpus_is_an_error_and_leaves_no_file(tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    output = tmp_path / "tokenizer.model"
    assert main(["--input", str(tmp_path / "a.txt"), "--output", str(output), "--vocab-size", "300"]) == 1
    assert "no document with text" in capsys.readouterr().err
    assert not output.exists()


def test_an_output_that_is_no_model_file_is_told_before_anything_is_read(tmp_path, capsys):
    for output, kind in ((tmp_path, "a folder"), (tmp_path / "tokenizer.json", "JSON")):
        assert main(["--input", str(tmp_path / "no"), "--output", str(output), "--vocab-size", "300"]) == 1
        expected = f"{output} must be a model file, not {kind}, such as {tmp_path / 'tokenizer.model'}"
        assert expected in capsys.readouterr().err


def test_a_single_document_is_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 100)
    for number in range(60):
        # one in fifty is the document that would be held out
        (tmp_path / "a.txt").write_text(f"some words {number} " * 100)
        tokenizer, _ = train([str(tmp_path / "a.txt")], tmp_path / "tokenizer.model", vocab_size=275)
        assert isinstance(tokenizer, Tokenizer)


def test_bad_lines_stop_the_training(tmp_path, texts, write_input):
    path = write_input(tmp_path / "a.jsonl", texts)
    path.write_bytes(path.read_bytes() + b"bad\n")
    with pytest.raises(TooManyBadLines, match=rf"a\.jsonl:{len(texts) + 1}: not JSON"):
        train([str(path)], tmp_path / "tokenizer.model", vocab_size=300)
    assert not (tmp_path / "tokenizer.model").exists()
    train([str(path)], tmp_path / "tokenizer.model", vocab_size=330, max_bad_lines=1)


def test_a_sample_is_drawn_from_the_whole_corpus(tmp_path, write_input):
    first, second = (
        ["aaaa bbbb cccc " * 20 + str(n) for n in range(500)],
        ["xxxx yyyy zzzz " * 20 + str(n) for n in range(500)],
    )
    path = write_input(tmp_path / "a.jsonl", first + second)
    tokenizer, _ = train([str(path)], tmp_path / "tokenizer.model", vocab_size=290, max_mb=0.05)
    assert len(tokenizer.encode("aaaa")) == len(tokenizer.encode("xxxx")) == 1
