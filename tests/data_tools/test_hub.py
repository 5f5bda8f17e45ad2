"""Data sets of Hugging Face's `datasets`, from folders on this machine: what the hub would send."""

import json
import sys

import datasets
import pytest

from data_tools.hub import parse_name
from data_tools.make_corpus import main, make_corpus
from data_tools.readers import find_inputs
from tests.data_tools.test_make_corpus import read_corpus


@pytest.fixture
def local(tmp_path):
    """A data set that `load_dataset` takes by its path, with two splits."""
    folder = tmp_path / "local"
    folder.mkdir()
    for split, texts in (("train", ["one", None, "two"]), ("test", ["three"])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name:test", ("owner/name", None, "test")),
        ("hf:name:sample-10BT", ("name", "sample-10BT", "train")),
        ("hf:name:en:validation", ("name", "en", "validation")),
    ],
)
def test_a_name_may_have_a_config_and_a_split(entry, parts):
    assert parse_name(entry) == parts


def test_a_data_set_is_streamed_into_a_corpus(tmp_path, local, capsys):
    manifest = make_corpus(tmp_path / "out", inputs=[local, f"{local}:test"], max_bad_lines=1)
    assert [(line["text"], line["source"]) for line in read_corpus(tmp_path / "out")] == [
        ("one", f"{local}:1"),
        ("two", f"{local}:3"),
        ("three", f"{local}:test:1"),
    ]
    assert manifest["bad_lines"] == 1
    assert f"bad line: {local}:2: 'text' is not a string but NoneType" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (":nothing:nowhere", "cannot be loaded (ValueError: "),
        (":a:b:c", "must read hf:NAME, hf:NAME:CONFIG"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_one_sentence(change, message, tmp_path, local, capsys):
    assert main(["--output", str(tmp_path / "out"), "--input", local + change]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_column_and_a_missing_package_say_what_to_do(tmp_path, local, capsys, monkeypatch):
    assert main(["--output", str(tmp_path / "out"), "--input", local, "--text-key", "body"]) == 1
    assert "has no column 'body' (it has text); set --text-key" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["--output", str(tmp_path / "out"), "--input", local]) == 1
    assert "pip install 'dash-megatron[hub]'" in capsys.readouterr().err


def test_a_saved_data_set_is_a_folder_of_documents(tmp_path, capsys):
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(3)]})
        for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(find_inputs([tmp_path / "saved" / "train"])) == 1
    make_corpus(tmp_path / "out", inputs=[str(tmp_path / "saved" / "train")])
    assert [line["text"] for line in read_corpus(tmp_path / "out")] == ["train 0", "train 1", "train 2"]
    told = capsys.readouterr().err
    assert "not read" not in told
    assert "several splits" not in told
    make_corpus(tmp_path / "both", inputs=[str(tmp_path / "saved")])
    assert len(read_corpus(tmp_path / "both")) == 6
    assert "several splits, all of which are read" in capsys.readouterr().err
