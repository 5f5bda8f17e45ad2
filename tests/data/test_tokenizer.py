import hashlib
import io
import random

import pytest
import sentencepiece

from dash_megatron.checkpoint.weights import load_weights
from dash_megatron.data import sentencepiece_model as tokenizer_module
from dash_megatron.data.index_file import read_index
from dash_megatron.data.sidecar import Sidecar
from dash_megatron.data.tokenizer import Tokenizer
from data_tools.readers import find_inputs

AWKWARD = [
    b"",
    b"\x00",
    b"a\x00b\x00",
    b"\xff\xfe",
    b"\x80",
    b"caf\xc3",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    "\u2581".encode(),
    " \u2581 \u2581\u2581x".encode(),
    "\u2585\u2047\ufffd\ufeff".encode(),
    b"<0x41>",
    b"<0x41><0x0A>\xff<0xFF>",
    b"</s><s><unk> </s>",
    b"  two  spaces  ",
    b"\t\ttabs\r\n\r\n\n",
    "e\u0301\u00e9\uff21\ufb01\u00b2\u200d\U0001f600".encode(),
    b" " * 100 + b"\n" * 100,
    b"12345678901234567890",
]


@pytest.mark.parametrize("data", AWKWARD, ids=repr)
def test_awkward_bytes_round_trip(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_every_byte_string_round_trips(tokenizer):
    rng = random.Random(0)
    alphabet = [bytes([value]) for value in range(256)] + AWKWARD + [b"def ", b"\xe2\x96", b"\x81", b" "]
    for _ in range(5000):
        data = b"".join(rng.choices(alphabet, k=rng.randrange(12)))
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_every_character_round_trips(tokenizer):
    for first in range(0, 0x110000, 64):
        text = "".join(map(chr, range(first, first + 64)))
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode("utf-8", "surrogatepass")


def test_text_and_its_utf8_bytes_give_equal_tokens(tokenizer):
    text = "def f(\u2581): return '\u00e9'\n"
    assert tokenizer.encode(text) == tokenizer.encode(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_yields_control_or_unknown_tokens(tokenizer):
    special = {0, tokenizer.bos, tokenizer.eod}
    for data in AWKWARD:
        assert not special & set(tokenizer.encode(data))


def test_bytes_that_are_not_utf8_decode_to_the_replacement_sign(tokenizer):
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"


def test_a_long_text_is_cut_after_newlines_and_loses_nothing(tokenizer, monkeypatch):
    text = "\n".join(f"line {number}" for number in range(3000)) + "x" * 5000
    monkeypatch.setattr(tokenizer_module, "_MAX_SEGMENT_CHARACTERS", 1000)
    segments = tokenizer_module._segments(text)
    assert "".join(segments) == text
    assert max(map(len, segments)) <= 1000
    assert segments[0].endswith("\n")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_fingerprint_is_that_of_the_model_file(tokenizer):
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_an_id_outside_the_vocabulary_cannot_be_decoded(tokenizer):
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(
            ValueError, match=rf"token id {token_id} must lie in \[0, {tokenizer.vocab_size}\)"
        ):
            tokenizer.decode_bytes([5, token_id])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove_extra_whitespaces": True}, "must keep text as it is"),
        ({"normalization_rule_name": "nmt_nfkc"}, "must keep text as it is"),
        ({"byte_fallback": False}, "256 byte pieces"),
        ({"eos_id": -1}, "end-of-sequence"),
    ],
    ids=["trimmed spaces", "normalized", "no bytes", "no eod"],
)
def test_a_model_that_would_change_text_is_refused(tmp_path, changes, message):
    settings = {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "byte_fallback": True,
    } | changes
    model = io.BytesIO()
    lines = (f"some words, number {number}" for number in range(100))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        minloglevel=2,
        **settings,
    ) if settings["byte_fallback"] else sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
        **settings,
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=message):
        Tokenizer(path)


def test_a_missing_or_damaged_model_is_named(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model does not exist; train one"):
        Tokenizer(path)
    for content in (b"not a model", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model must be a sentencepiece model"):
            Tokenizer(path)


def test_a_folder_in_place_of_a_tokenizer_is_told_which_file_to_name(tmp_path):
    for name in ("tokenizer.model", "tokenizer.json"):
        with pytest.raises(
            ValueError, match=rf"{tmp_path} is a folder; name the file, such as {tmp_path / name}$"
        ):
            Tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").touch()


def test_a_missing_relative_path_is_told_with_the_folder_that_it_is_relative_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for open_it in (Tokenizer, read_index, Sidecar.read, load_weights, lambda name: find_inputs([name])):
        with pytest.raises(FileNotFoundError, match=rf"nothing\S* \(relative to {tmp_path}\) does not exist"):
            open_it("nothing")
