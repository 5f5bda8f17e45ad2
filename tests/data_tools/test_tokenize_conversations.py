"""`tokenize_corpus --conversations`: records to tokens with their answers marked."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from dash_megatron.data.chat import PLAIN_TEMPLATE
from dash_megatron.data.index_file import read_lengths
from dash_megatron.data.sidecar import Sidecar
from dash_megatron.data.tokenizer import Tokenizer
from data_tools import tokenize_corpus, write_sidecar

NUMBER = 60


def records() -> list[dict]:
    chats = [
        {
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}],
            "id": n,
        }
        for n in range(NUMBER)
    ]
    chats[7]["messages"] += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "done"}]
    return chats


def run(path: Path, output: Path, tokenizer_path: Path, *more: str) -> int:
    arguments = ["--input", str(path), "--tokenizer", str(tokenizer_path), "--output", str(output)]
    return tokenize_corpus.main([*arguments, "--conversations", "--workers", "1", *more])


def read_documents(prefix: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Each document's text, and the text of its answers with ends of documents as |."""
    lengths, dtype, _ = read_lengths(prefix)
    ids = np.fromfile(f"{prefix}.bin", dtype=dtype)
    marks = np.fromfile(f"{prefix}.answers.bin", dtype=np.uint8)
    assert len(ids) == len(marks) == sum(lengths)
    found = []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        part, learnt = ids[end - length : end].tolist(), marks[end - length : end].tolist()
        answers = [token for token, mark in zip(part, learnt, strict=True) if mark]
        found.append(
            (
                tokenizer.decode(part),
                "".join("|" if t == tokenizer.eod else tokenizer.decode([t]) for t in answers),
            )
        )
    return found


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_answers_alone_are_marked_whatever_the_kind_of_file(name, tmp_path, tokenizer_path, capsys):
    tokenizer = Tokenizer(tokenizer_path)
    path, output = write(tmp_path / name, records()), tmp_path / "out"
    assert run(path, output, tokenizer_path, "--valid-fraction", "0.1") == 0
    told = capsys.readouterr().out
    found = {split: read_documents(output / split, tokenizer) for split in ("train", "valid")}
    both = found["train"] + found["valid"]
    assert sorted(answer for _, answer in both) == sorted(
        ["a7|done|", *(f"a{n}|" for n in range(NUMBER) if n != 7)]
    )
    assert ("### User\nq3\n\n### Assistant\na3", "a3|") in both
    facts = {split: Sidecar.read(output / split) for split in found}
    for split, documents in found.items():
        assert facts[split].answer_tokens == sum(
            len(tokenizer.encode(text[:-1])) + 1 for _, text in documents if "done" not in text
        ) + sum(
            len(tokenizer.encode("a7")) + len(tokenizer.encode("done")) + 2
            for _, text in documents
            if "done" in text
        )
        assert facts[split].chat_template == PLAIN_TEMPLATE
        assert f"{facts[split].tokens} tokens, {facts[split].answer_tokens} of them in answers" in told
    # a sidecar that is made anew knows as much
    prefix = str(output / "train")
    assert write_sidecar.main(["--prefix", prefix, "--tokenizer", str(tokenizer_path)]) == 0
    assert Sidecar.read(prefix) == facts["train"]
    capsys.readouterr()
    # finished: nothing is made again
    assert run(path, output, tokenizer_path, "--valid-fraction", "0.1") == 0
    assert "nothing to do" in capsys.readouterr().err


def test_prompts_and_completions_need_no_template_and_none_is_kept(tmp_path, tokenizer_path):
    rows = [{"prompt": f"def f{n}(x):\n", "completion": f"    return {n}\n"} for n in range(20)]
    assert (
        run(write(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer_path, "--valid-fraction", "0") == 0
    )
    found = read_documents(tmp_path / "out" / "train", Tokenizer(tokenizer_path))
    assert ("def f3(x):\n    return 3\n", "    return 3\n|") in found
    assert Sidecar.read(tmp_path / "out" / "train").chat_template is None


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
BAD = {
    "neither": ({"text": "a"}, "must have either 'messages', or 'prompt' and 'completion' (it has 'text')"),
    "prompt alone": ({"prompt": "a"}, "must have either 'messages'"),
    "both": ({"messages": CHAT, "prompt": "a", "completion": "b"}, "must have either 'messages'"),
    "no list": ({"messages": "hello"}, "'messages' is not a list but str"),
    "no object": ({"messages": ["hello"]}, "message 1 is not an object but str"),
    "no role": ({"messages": [{"content": "q"}, CHAT[1]]}, "'role' of message 1 is missing"),
    "content no text": ({"messages": [CHAT[0], {"role": "assistant", "content": ["a"]}]}, "'content' of message 2 is not a string but list"),
    "unknown key": ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [1]}]}, "message 2 has the key 'tool_calls', which is not read"),
    "tools": ({"messages": CHAT, "tools": [{"name": "x"}]}, "'tools', which is not read"),
    "no answer": ({"messages": CHAT[:1]}, "there is no message of role 'assistant'"),
    "empty answer": ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "message 2 is an empty answer"),
    "special token": ({"messages": [{"role": "user", "content": "a</s>"}, CHAT[1]]}, "message 1 has the text '</s>'"),
    "empty completion": ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    "no text": ({"prompt": 1, "completion": "a"}, "'prompt' is not a string but int"),
    "surrogate": ({"prompt": "\ud800", "completion": "a"}, "lone surrogate"),
    "no record": ([1], "not a JSON object but list"),
}  # fmt: skip


def test_each_bad_record_is_one_bad_line_with_its_number(tmp_path, tokenizer_path, capsys):
    path = tmp_path / "a.jsonl"
    good = [
        {"messages": CHAT, "source": "x"},
        {"messages": [{**CHAT[0], "name": None}, CHAT[1]], "prompt": "q"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *(row for row, _ in BAD.values())]))
    arguments = (path, tmp_path / "out", tokenizer_path, "--valid-fraction", "0")
    assert run(*arguments) == 1
    assert f"{path}:3: must have either" in capsys.readouterr().err
    assert run(*arguments, "--max-bad-lines", str(len(BAD))) == 0
    told = re.findall("bad line: .*", capsys.readouterr().err)  # among those of the progress bar
    for number, (line, (_, reason)) in enumerate(zip(told, BAD.values(), strict=True), 3):
        assert line.startswith(f"bad line: {path}:{number}: "), line
        assert reason in line
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["train_documents"] == 2


def test_what_cannot_be_learnt_is_told_before_anything_is_read(tmp_path, tokenizer_path, capsys):
    path = write(tmp_path / "a.jsonl", records())
    (tmp_path / "bad.jinja").write_text("{{ messages[-1].content }}")
    assert run(path, tmp_path / "out", tokenizer_path, "--chat-template", str(tmp_path / "bad.jinja")) == 1
    assert "bad.jinja must render a question and an answer that a special token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "b.txt").write_text("text")
    assert run(tmp_path / "b.txt", tmp_path / "out", tokenizer_path) == 1
    assert "JSONL, JSON, parquet or Arrow with conversations" in capsys.readouterr().err
    arguments = ["--input", str(path), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    assert tokenize_corpus.main([*arguments, "--chat-template", str(tmp_path / "bad.jinja")]) == 1
    assert "must come with --conversations" in capsys.readouterr().err
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "c.parquet")
    assert run(tmp_path / "c.parquet", tmp_path / "out", tokenizer_path) == 1
    assert "c.parquet has no column 'messages'" in capsys.readouterr().err


def test_plain_text_in_the_same_folder_leaves_no_marks_behind(tmp_path, tokenizer_path):
    path = write(tmp_path / "a.jsonl", [{**row, "text": "plain text"} for row in records()])
    assert run(path, tmp_path / "out", tokenizer_path, "--valid-fraction", "0.1") == 0
    arguments = ["--input", str(path), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    assert tokenize_corpus.main([*arguments, "--workers", "1", "--valid-fraction", "0"]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "manifest.json", "train.bin", "train.idx", "train.idx.json"
    ]  # fmt: skip
    assert Sidecar.read(tmp_path / "out" / "train").answer_tokens is None
