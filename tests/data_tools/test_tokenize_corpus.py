import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dash_megatron.data.index_file import read_lengths
from dash_megatron.data.sidecar import Sidecar
from dash_megatron.data.tokenizer import Tokenizer
from data_tools.atomic import sole_writer
from data_tools.make_corpus import make_corpus
from data_tools.tokenize_corpus import SHORT_VALIDATION, main, tokenize_corpus
from data_tools.write_sidecar import main as write_sidecar

ROOT = Path(__file__).resolve().parents[2]
FINAL_FILES = [
    "manifest.json",
    *(f"{split}.{end}" for split in ("train", "valid") for end in ("bin", "idx", "idx.json")),
]


def documents_of(prefix: Path) -> list[list[int]]:
    lengths, dtype, _ = read_lengths(prefix)
    tokens = np.fromfile(f"{prefix}.bin", dtype=dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.json"))


@pytest.fixture
def run(tmp_path, tokenizer_path):
    def run(path, name="out", **changes):
        settings = {"valid_fraction": 0.1, "workers": 1} | changes
        return tokenize_corpus([str(path)], tokenizer_path, tmp_path / name, **settings)

    return run


def test_documents_are_split_without_loss_or_overlap_and_end_in_eod(
    tmp_path, write_input, run, texts, tokenizer_path
):
    tokenizer = Tokenizer(tokenizer_path)
    manifest = run(write_input(tmp_path / "a.jsonl", texts))
    found = {}
    for split in ("train", "valid"):
        documents = documents_of(tmp_path / "out" / split)
        assert all(
            document[-1] == tokenizer.eod and tokenizer.eod not in document[:-1] for document in documents
        )
        found[split] = [tokenizer.decode(document) for document in documents]
        assert manifest[f"{split}_documents"] == len(documents)
        assert manifest[f"{split}_tokens"] == sum(map(len, documents))
    assert not set(found["train"]) & set(found["valid"])
    assert sorted(found["train"] + found["valid"]) == sorted(texts)
    # each split keeps the order of the input
    assert found["train"] == [text for text in texts if text in set(found["train"])]
    assert 15 <= len(found["valid"]) <= 70
    assert sorted(contents_of(tmp_path / "out")) == sorted(FINAL_FILES)


def test_copies_of_a_document_never_lie_on_both_sides(tmp_path, write_input, run, texts):
    run(write_input(tmp_path / "a.jsonl", texts * 3), valid_fraction=0.5)
    train, valid = (documents_of(tmp_path / "out" / split) for split in ("train", "valid"))
    assert not {tuple(document) for document in train} & {tuple(document) for document in valid}
    assert len(train) + len(valid) == 3 * len(texts)


def test_another_seed_splits_otherwise(tmp_path, write_input, run, texts):
    path = write_input(tmp_path / "a.jsonl", texts)
    run(path, "one", seed=1)
    run(path, "two", seed=2)
    assert documents_of(tmp_path / "one" / "valid") != documents_of(tmp_path / "two" / "valid")


def test_each_kind_of_input_gives_the_same_tokens(tmp_path, write_input, run, texts, input_name):
    run(write_input(tmp_path / "plain.jsonl", texts), "expected")
    # shards so small that each file is divided
    run(write_input(tmp_path / input_name, texts), shard_mb=0.001)
    for split in ("train", "valid"):
        expected, found = (documents_of(tmp_path / folder / split) for folder in ("expected", "out"))
        assert sorted(found) == sorted(expected)


def test_one_worker_and_two_write_identical_files(tmp_path, write_input, run, texts):
    path = write_input(tmp_path / "a.jsonl", texts)
    run(path, "one", shard_mb=0.005, workers=1)
    run(path, "two", shard_mb=0.005, workers=2)
    assert contents_of(tmp_path / "one") == contents_of(tmp_path / "two")


def test_the_sidecar_describes_the_data(tmp_path, write_input, run, texts, tokenizer_path):
    run(write_input(tmp_path / "a.jsonl", texts))
    prefix = tmp_path / "out" / "train"
    sidecar, tokens = Sidecar.read(prefix), np.concatenate(documents_of(prefix))
    shares = np.bincount(tokens) / tokens.size
    assert sidecar.tokenizer_fingerprint == Tokenizer(tokenizer_path).fingerprint
    assert (sidecar.tokens, sidecar.max_token_id, sidecar.dtype) == (tokens.size, tokens.max(), "uint16")
    assert sidecar.unigram_entropy_nats == pytest.approx(-sum(p * np.log(p) for p in shares if p))
    before = contents_of(tmp_path / "out")
    os.unlink(f"{prefix}.idx.json")
    assert write_sidecar(["--prefix", str(prefix), "--tokenizer", str(tokenizer_path)]) == 0
    assert contents_of(tmp_path / "out") == before


def test_a_sidecar_is_not_written_for_data_of_a_larger_vocabulary(
    tmp_path, write_input, run, texts, tokenizer_path, capsys
):
    run(write_input(tmp_path / "a.jsonl", texts))
    prefix = tmp_path / "out" / "train"
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(20)
        file.write(np.uint16(330).tobytes())
    assert write_sidecar(["--prefix", str(prefix), "--tokenizer", str(tokenizer_path)]) == 1
    assert "has id 330 at token 10; ids must lie in [0, 330)" in capsys.readouterr().err


def test_a_second_call_does_nothing_and_says_so(tmp_path, write_input, run, texts, capsys):
    path = write_input(tmp_path / "a.jsonl", texts)
    first = run(path)
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert run(path) == first
    assert "is complete: nothing to do" in capsys.readouterr().err
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == times


def test_changed_input_or_options_replace_the_output(tmp_path, write_input, run, texts):
    path = write_input(tmp_path / "a.jsonl", texts)
    run(path)
    assert run(path, valid_fraction=0)["valid_documents"] == 0
    assert sorted(contents_of(tmp_path / "out")) == [
        "manifest.json",
        "train.bin",
        "train.idx",
        "train.idx.json",
    ]
    write_input(path, texts[:200])
    assert run(path, valid_fraction=0)["train_documents"] == 200


def test_two_processes_do_not_write_into_one_folder(tmp_path, write_input, run, texts):
    path = write_input(tmp_path / "a.jsonl", texts)
    with sole_writer(tmp_path / "out"), pytest.raises(ValueError, match="one process at a time, and another"):
        run(path)
    run(path)
    assert sorted(contents_of(tmp_path / "out")) == sorted(FINAL_FILES)
    with sole_writer(tmp_path / "out"):
        run(path)  # finished: nothing to write


def test_a_corpus_and_its_tokens_do_not_overwrite_each_others_manifest(tmp_path, write_input, run, texts):
    source = write_input(tmp_path / "docs.jsonl", texts)
    corpus = tmp_path / "corpus"
    kept = make_corpus(corpus, inputs=[str(source)])
    with pytest.raises(
        ValueError, match=f"--output={corpus} must not be the folder of another tool, whose manifest.json"
    ):
        run(corpus, name="corpus")
    assert json.loads((corpus / "manifest.json").read_text()) == kept
    tokens = run(corpus)
    with pytest.raises(ValueError, match="must not be the folder of another tool"):
        make_corpus(tmp_path / "out", inputs=[str(source)])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == tokens


def test_files_of_others_in_the_output_folder_are_left_alone(tmp_path, write_input, run, texts):
    for name in ("out/mine.tmp", "out/shards/mine.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run(write_input(tmp_path / "a.jsonl", texts))
    assert [path.name for path in (tmp_path / "out" / "shards").iterdir()] == ["mine.bin"]
    assert (tmp_path / "out" / "mine.tmp").exists()


def test_a_bad_line_fails_the_run_unless_it_is_tolerated(
    tmp_path, write_input, texts, tokenizer_path, capsys
):
    path = write_input(tmp_path / "a.jsonl", texts)
    lines = path.read_bytes().split(b"\n")
    lines[100], lines[300] = b"bad", b'{"text": 1}'
    path.write_bytes(b"\n".join(lines))
    arguments = ["--input", str(path), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    arguments += ["--valid-fraction", "0.1", "--shard-mb", "0.005", "--workers", "2", "--max-bad-lines"]
    for limit in ("0", "1"):
        assert main([*arguments, limit]) == 1
        assert f"--max-bad-lines={limit} must not be exceeded" in capsys.readouterr().err
        assert not (tmp_path / "out" / "train.bin").exists()
    assert main([*arguments, "2"]) == 0
    output = capsys.readouterr()
    # those of the shards that the failed runs had finished are reported and counted again
    assert f"bad line: {path}:101: not JSON" in output.err
    assert f"bad line: {path}:301: 'text' is not a string" in output.err
    assert "2 bad lines" in output.out


def test_shards_of_other_input_or_options_are_not_used(tmp_path, write_input, run, texts):
    path = write_input(tmp_path / "a.jsonl", texts)
    whole = path.read_bytes()
    for seed, content in ((1, whole), (0, whole.replace(b"alpha", b"omega"))):
        path.write_bytes(content + b"bad\n")
        with pytest.raises(ValueError, match="bad line 1"):
            run(path, shard_mb=0.005, seed=seed)
        assert len(shards_of(tmp_path / "out")) > 3
    path.write_bytes(whole)
    run(path, shard_mb=0.005)
    run(path, "fresh", shard_mb=0.005)
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--valid-fraction", "1"], "--valid-fraction=1.0 must be at least 0 and below 1"),
        (
            ["--valid-fraction", "0.000001"],
            "must give a document to validation, but none of 30 fell to it; raise it to 0.17, give more documents, try another "
            "--seed, or set it to 0 and train with data.valid=[] evaluation.every=0",
        ),
        (["--valid-fraction", "0.999999"], "must leave documents to train on, but all 30 fell"),
        (["--workers", "0"], "--workers=0 must be at least 1"),
        (["--seed", "-1"], "--seed=-1 must lie in"),
        (["--shard-mb", "0"], "--shard-mb=0.0 must be above 0"),
        (["--shard-mb", "nan"], "--shard-mb=nan must be above 0 and finite"),
        (["--max-bad-lines", "-1"], "--max-bad-lines=-1 must be at least 0"),
        (["--tokenizer", "nothing.model"], f"nothing.model (relative to {os.getcwd()}) does not exist"),
        (["--text-key", "body"], "a.jsonl:1: no key 'body'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_named(tmp_path, write_input, texts, tokenizer_path, capsys, arguments, message):
    path = write_input(tmp_path / "a.jsonl", texts[:30])
    common = ["--input", str(path), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    assert main([*common, "--workers", "1", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_validation_that_may_be_shorter_than_a_row_is_told_with_a_fraction_that_is_not(
    tmp_path, write_input, texts, tokenizer_path, capsys
):
    path = write_input(tmp_path / "a.jsonl", [f"{number} {text * 20}" for number, text in enumerate(texts)])

    def told(fraction):
        output = tmp_path / str(fraction)
        common = ["--input", str(path), "--tokenizer", str(tokenizer_path), "--output", str(output)]
        assert main([*common, "--workers", "1", "--valid-fraction", str(fraction)]) == 0
        return capsys.readouterr().err, json.loads((output / "manifest.json").read_text())

    error, manifest = told(0.01)
    documents, tokens = manifest["valid_documents"], manifest["valid_tokens"]
    assert 0 < tokens <= SHORT_VALIDATION
    assert f"leaves {documents} of {len(texts)} documents to validation, {tokens} tokens, and" in error
    raised = re.search(r"data.seq_length=(\d+); --valid-fraction=(\S+) gives more", error)
    assert int(raised[1]) == tokens - 1
    error, manifest = told(float(raised[2]))
    assert manifest["valid_tokens"] > SHORT_VALIDATION
    assert "warning" not in error
    assert "warning" not in told(0)[0]


def test_an_empty_corpus_is_an_error(tmp_path, run, write_input):
    with pytest.raises(ValueError, match="the corpus is empty"):
        run(write_input(tmp_path / "a.jsonl", ["", ""]))


@pytest.fixture
def start(tmp_path, tokenizer_path):
    """A function that starts the tool as a process of its own, on a corpus of many small shards."""
    source = tmp_path / "a.jsonl"
    with open(source, "w") as file:
        for number in range(2400):
            file.write(
                json.dumps({"text": f"text {number} " + "alpha beta def f(x):\n    return x " * 20}) + "\n"
            )
    processes = []

    def start(name: str, workers: int = 2) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "data_tools.tokenize_corpus",
            "--input",
            str(source),
            "--shard-mb",
            "0.02",
        ]
        command += [
            "--tokenizer",
            str(tokenizer_path),
            "--output",
            str(tmp_path / name),
            "--workers",
            str(workers),
        ]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition, seconds: float = 30.0):
    stop = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < stop, "waited too long"
        time.sleep(0.002)
    return value


def test_a_killed_run_resumes_without_redoing_finished_shards(tmp_path, start):
    process = start("killed")
    wait_for(lambda: len(shards_of(tmp_path / "killed")) >= 5)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # no worker goes on without its parent, and no file has its final name yet
    wait_for(
        lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    )
    finished = len(shards_of(tmp_path / "killed"))
    assert finished >= 5
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [".writing", "shards"]

    # a mark in a finished shard is still there after resuming: the shard was not made again
    shutil.copytree(tmp_path / "killed", tmp_path / "marked")
    first = sorted((tmp_path / "marked" / "shards").glob("*.json"))[0].with_suffix(".train.bin")
    with open(first, "r+b") as file:
        file.write(np.uint16(327).tobytes())
    for name in ("killed", "marked", "uninterrupted"):
        process = start(name)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors
        assert (f"resuming: {finished} of" in errors) == (name != "uninterrupted")
    assert contents_of(tmp_path / "killed") == contents_of(tmp_path / "uninterrupted")
    assert contents_of(tmp_path / "marked")["train.bin"] != contents_of(tmp_path / "killed")["train.bin"]
    assert sorted(contents_of(tmp_path / "killed")) == sorted(FINAL_FILES)


def test_a_shard_that_was_cut_short_is_made_again(tmp_path, start):
    process = start("out")
    wait_for(lambda: len(shards_of(tmp_path / "out")) >= 3)
    process.kill()
    process.communicate()
    finished = len(shards_of(tmp_path / "out"))
    damaged = shards_of(tmp_path / "out")[0].with_suffix(".train.bin")
    os.truncate(damaged, damaged.stat().st_size - 2)
    process = start("out")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert f"resuming: {finished - 1} of" in errors


def test_a_worker_that_dies_is_an_error_and_not_a_hang(tmp_path, start):
    process = start("out")
    wait_for(lambda: len(shards_of(tmp_path / "out")) >= 2)
    children = psutil.Process(process.pid).children()
    worker = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
    worker.kill()
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "error: a tokenising process died" in errors
    assert not (tmp_path / "out" / "train.bin").exists()
