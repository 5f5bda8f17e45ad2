import json
import os
from pathlib import Path

import pytest

from data_tools.atomic import sole_writer
from data_tools.make_corpus import main, make_corpus, stdlib_documents
from data_tools.readers import TooManyBadLines, find_inputs


def read_corpus(folder: Path) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().split("\n")[:-1]
    ]


def test_each_kind_of_input_gives_the_same_documents(tmp_path, write_input, texts, input_name):
    manifest = make_corpus(tmp_path / "out", inputs=[str(write_input(tmp_path / input_name, texts))])
    lines = read_corpus(tmp_path / "out")
    assert [line["text"] for line in lines] == texts
    assert all(line["source"].startswith(str(tmp_path / input_name)) for line in lines)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (manifest["documents"], manifest["bytes"], manifest["bad_lines"]) == (len(texts), num_bytes, 0)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_sources_are_counted_apart_and_the_shards_are_the_same_each_time(tmp_path, write_input, texts):
    inputs = [
        str(write_input(tmp_path / "b.jsonl", texts[:100], text_key="body")),
        str(write_input(tmp_path / "a.parquet", texts[100:], text_key="body")),
    ]
    manifests = [
        make_corpus(tmp_path / name, inputs=inputs, text_key="body", shard_mb=0.01) for name in ("one", "two")
    ]
    assert manifests[0] == manifests[1]
    assert len(manifests[0]["shards"]) > 3
    assert {path: count["documents"] for path, count in manifests[0]["sources"].items()} == dict(
        zip(inputs, (100, len(texts) - 100), strict=True)
    )
    assert [line["text"] for line in read_corpus(tmp_path / "one")] == texts


def test_the_standard_library_alone_exceeds_ten_megabytes(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--stdlib", "--max-mb", "10"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["bytes"] >= 10_000_000
    assert set(manifest["sources"]) == {"stdlib"}
    assert manifest["sources"]["stdlib"]["documents"] > 100
    assert "10.0 MB of text" in capsys.readouterr().out


def test_sources_and_documentation_strings_of_modules_are_taken(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    (tmp_path / "empty.py").touch()
    (tmp_path / "wrong.py").write_text("def (:")
    source = '"""The module."""\nclass A:\n    """A class."""\n    def f(self):\n        "\\ud800"\n'
    (tmp_path / "a.py").write_text(source)
    documents = [(document.source, document.text) for document in stdlib_documents(tmp_path)]
    assert documents == [
        ("stdlib/a.py", source + "\nThe module.\n\nA\n\nA class.\n"),
        ("stdlib/wrong.py", "def (:\n"),
    ]


def test_a_bad_line_fails_the_run_unless_it_is_tolerated(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbad\n{"text": "also good"}\n')
    arguments = ["--output", str(tmp_path / "out"), "--input", str(path)]
    assert main(arguments) == 1
    assert f"bad line: {path}:2: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main([*arguments, "--max-bad-lines", "1"]) == 0
    assert f"bad line: {path}:2: not JSON" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bad_lines"] == 1


def test_bad_lines_are_counted_over_all_inputs(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('bad\n{"text": "good"}\n')
    with pytest.raises(TooManyBadLines, match=r"b\.jsonl:1.* is bad line 2"):
        make_corpus(
            tmp_path / "out", inputs=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], max_bad_lines=1
        )


def test_a_corpus_that_was_not_finished_cannot_be_used(tmp_path, write_input, texts):
    good, bad = write_input(tmp_path / "a.jsonl", texts), tmp_path / "b.jsonl"
    bad.write_text("bad\n")
    with pytest.raises(TooManyBadLines):
        make_corpus(tmp_path / "out", inputs=[str(good), str(bad)], shard_mb=0.01)
    assert list((tmp_path / "out").glob("*.jsonl"))
    with pytest.raises(ValueError, match="must be a whole corpus"):
        find_inputs([tmp_path / "out"])
    make_corpus(tmp_path / "out", inputs=[str(good)])
    assert find_inputs([tmp_path / "out"]) == [str(tmp_path / "out" / "corpus-00000.jsonl")]
    assert [line["text"] for line in read_corpus(tmp_path / "out")] == texts


def test_a_smaller_corpus_leaves_no_shard_of_a_larger_one_and_no_other_file_is_touched(
    tmp_path, write_input, texts
):
    output = tmp_path / "out"
    make_corpus(output, inputs=[str(write_input(tmp_path / "a.jsonl", texts))], shard_mb=0.01)
    for name in ("corpus-mine.jsonl", "mine.tmp"):
        (output / name).touch()
    make_corpus(output, inputs=[str(write_input(tmp_path / "b.jsonl", texts[:3]))])
    assert sorted(path.name for path in output.iterdir()) == [
        "corpus-00000.jsonl",
        "corpus-mine.jsonl",
        "manifest.json",
        "mine.tmp",
    ]


def test_an_input_inside_the_output_folder_is_refused(tmp_path, write_input, texts):
    make_corpus(tmp_path / "out", inputs=[str(write_input(tmp_path / "a.jsonl", texts))])
    with pytest.raises(ValueError, match="must not hold the inputs"):
        make_corpus(tmp_path / "out", inputs=[str(tmp_path / "out")])
    assert [line["text"] for line in read_corpus(tmp_path / "out")] == texts


def test_no_document_comes_twice_where_inputs_overlap_or_have_the_output_below_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a/one.txt", "in/b/two.txt"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(name)
    # a shard is finished after each document, before the next input is read
    inputs = ["in/a", "in", "./in/b", str(tmp_path / "in/a/one.txt")]
    manifest = make_corpus(Path("in/out"), inputs=inputs, shard_mb=1e-6)
    assert [line["text"] for line in read_corpus(Path("in/out"))] == ["in/a/one.txt", "in/b/two.txt"]
    assert {name: count["documents"] for name, count in manifest["sources"].items()} == {"in/a": 1, "in": 1}


@pytest.mark.parametrize("join_folders", [False, True])
def test_names_of_files_need_not_be_utf8(tmp_path, join_folders):
    folder = tmp_path / "in" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"na\xefve.txt")).write_text("text")
    make_corpus(tmp_path / "out", inputs=[str(tmp_path / "in")], join_folders=join_folders)
    (line,) = read_corpus(tmp_path / "out")
    assert line["text"] == ("na\ufffdve.txt\n\ntext" if join_folders else "text")
    assert line["source"].startswith(f"{tmp_path}/in/caf?")


def test_two_processes_do_not_write_one_corpus(tmp_path, write_input, texts):
    path = str(write_input(tmp_path / "a.jsonl", texts))
    manifest = make_corpus(tmp_path / "out", inputs=[path])
    with sole_writer(tmp_path / "out"), pytest.raises(ValueError, match="one process at a time, and another"):
        make_corpus(tmp_path / "out", inputs=[path])
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert make_corpus(tmp_path / "out", inputs=[path]) == manifest


def test_an_empty_or_missing_input_is_an_error(tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    for arguments, message in [
        ([], "--input is empty"),
        (["--input", str(tmp_path / "a.txt")], "at least one document"),
        (["--input", str(tmp_path / "no.txt")], "does not exist"),
        (["--stdlib", "--shard-mb", "0"], "must be numbers above 0"),
        (["--stdlib", "--shard-mb", "nan"], "--shard-mb=nan and --max-mb=None must be numbers above 0"),
        (["--stdlib", "--max-mb", "nan"], "--max-mb=nan must be numbers above 0"),
    ]:
        assert main(["--output", str(tmp_path / "out"), *arguments]) == 1
        assert message in capsys.readouterr().err


def test_files_of_one_folder_can_be_one_document(tmp_path, write_input, texts):
    sources = tmp_path / "sources"
    (sources / "inner").mkdir(parents=True)
    for name, text in {
        "b.py": "b = 1\n",
        "a.md": "# A\n",
        "inner/c.py": "c = 2\n",
        "z.py": "z = 3\n",
    }.items():
        (sources / name).write_text(text)
    (sources / "inner" / "latin.py").write_bytes(b"# caf\xe9")
    write_input(sources / "more.jsonl", texts[:2])
    options = ["--join-folders", "--max-bad-lines", "1", "--output", str(tmp_path / "out")]
    assert main(["--input", str(sources), *options]) == 0
    documents = {Path(line["source"]).name: line["text"] for line in read_corpus(tmp_path / "out")}
    assert documents["sources"] == "a.md\n\n# A\n\nb.py\n\nb = 1\n\nz.py\n\nz = 3\n"
    assert documents["inner"] == "c.py\n\nc = 2\n"
    assert len(documents) == 4
