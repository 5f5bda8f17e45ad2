"""Evaluation: tasks that can be solved, results that stay, and the same numbers for both kinds of model."""

import gzip
import json
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dash_megatron.__main__ import main
from dash_megatron.checkpoint.weights import whole_model
from dash_megatron.config import RopeScaling
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation import models
from dash_megatron.evaluation.items import check_items, make_sample, task_items
from dash_megatron.evaluation.models import RunModel, open_model
from dash_megatron.evaluation.samples import Sample
from dash_megatron.evaluation.tasks import COMMON_WORDS, CUE_TOKENS, FREQUENT_WORDS, TASKS
from dash_megatron.evaluation.text import LocalText
from dash_megatron.hf.export import export_run

LENGTH = 1400
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return Tokenizer(tiny_data / "tokenizer.model")


@pytest.fixture(scope="module")
def text(tiny_data: Path, tokenizer: Tokenizer) -> LocalText:
    return LocalText.from_data([str(tiny_data / "train")], tokenizer, 8 * LENGTH)


@pytest.fixture
def run(write_run: Callable[..., Any]) -> Path:
    """The folder of a run with random weights, which selects chunks."""
    config, _ = write_run("dash")
    return Path(config.run_dir)


def solve(name: str, sample: Sample, prompt: str) -> list[str]:
    """Answer from the prompt alone."""
    if name.startswith(("needle", "niah")):
        found = re.findall(r"The number of (\w+) is (\d+)\.", prompt)
        asked = re.findall(r"\w+", prompt.rpartition("In the text above, ")[2].partition(" of ")[2])
        return [number for word in asked for key, number in found if key == word]
    if name == "variable_tracking":
        value = re.findall(r"\d{7}", prompt)[-1]
        known = {value}
        order = []
        for target, source in re.findall(r"VAR (\w+) = (\w+)", prompt):
            if source in known:
                known.add(target)
                order.append(target)
        return order
    if name == "associative_recall":
        lines = prompt.split("\n")
        return [dict(line.split(" ") for line in lines[:-1])[lines[-1]]]
    listed = prompt.split("\n\n")[1].split()
    ranked = [word for word, _ in Counter(listed).most_common()]
    if name == "frequent_words":
        return ranked[:FREQUENT_WORDS]
    return sorted(ranked[:COMMON_WORDS], key=listed.index)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "copy"])
def test_who_reads_the_prompt_finds_the_answer(name: str, text: LocalText, tokenizer: Tokenizer) -> None:
    depth = 0.5 if TASKS[name].by_depth else None
    sample = TASKS[name].sample("3", LENGTH, depth, text, tokenizer)
    assert 0.85 * LENGTH < len(sample.ids) <= LENGTH
    prompt = tokenizer.decode(sample.ids[: sample.prompt_tokens])
    assert solve(name, sample, prompt.rstrip()) == sample.texts
    spans = [tokenizer.decode(sample.ids[a:b]).strip(" ,") for a, b in sample.spans]
    assert spans == sample.texts
    again = TASKS[name].sample("3", LENGTH, depth, text, tokenizer)
    assert again == sample
    assert TASKS[name].sample("4", LENGTH, depth, text, tokenizer).ids != sample.ids


def test_a_copy_repeats_what_followed_its_cue(text: LocalText, tokenizer: Tokenizer) -> None:
    sample = TASKS["copy"].sample("3", 300, None, text, tokenizer)
    assert len(sample.ids) == 300
    ids, first = sample.ids, sample.prompt_tokens
    cue = ids[first - CUE_TOKENS : first]
    places = [n for n in range(first - CUE_TOKENS) if ids[n : n + CUE_TOKENS] == cue]
    assert len(places) == 1
    begin = places[0] + CUE_TOKENS
    assert ids[begin : begin + 300 - first] == ids[first:]
    assert sample == TASKS["copy"].sample("3", 300, None, text, tokenizer)


def test_a_sample_that_cannot_be_made_is_told_before_any_is_computed(tokenizer: Tokenizer) -> None:
    # a tenth of the samples begins with the long line
    text = cast(LocalText, SimpleNamespace(lines=["a line"] * 9 + ["long " * 60]))
    items = task_items("niah_single", 40)
    lengths = []
    for item in items:
        try:
            lengths.append(len(make_sample("niah_single", 180, item, text, tokenizer).ids))
        except ValueError:
            lengths.append(0)
    assert lengths[0] > 0
    assert 0 in lengths
    with pytest.raises(
        ValueError, match=r"task niah_single: --lengths 180 must be at least \d+.* such as 512$"
    ):
        check_items("niah_single", 180, items, text, tokenizer)
    check_items("niah_single", 180, items[: lengths.index(0)], text, tokenizer)


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_a_needle_stands_at_its_depth(depth: float, text: LocalText, tokenizer: Tokenizer) -> None:
    sample = TASKS["needle"].sample("3", LENGTH, depth, text, tokenizer)
    lines = tokenizer.decode(sample.ids).strip().split("\n")
    place = next(n for n, line in enumerate(lines) if line.startswith("The number of"))
    assert place == (2 if depth == 0 else len(lines) - 3)


def evaluate(source: Path, output: Path, *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", str(source), "--output", str(output), *arguments]) == 0
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("score", ["answer", "generate"])
def test_a_run_and_its_export_get_the_same_numbers(
    score: str,
    run: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    export_run(run, tmp_path / "out", dtype="float32")
    tasks = ("perplexity", "needle", "copy")
    # needles need the longer length alone, which documents do not have
    words = tmp_path / "words.txt"
    words.write_text("".join(path.read_text() + "\n" for path in sorted(tiny_data.glob("documents/01*.txt"))))
    arguments = ["--tasks", ",".join(tasks), "--lengths", "640", "--samples", "2", "--depths", "2"]
    arguments += ["--score", score, "--text", str(words)]
    ours = evaluate(run, tmp_path / "ours", *arguments)
    theirs = evaluate(tmp_path / "out", tmp_path / "theirs", *arguments)
    assert ours["model"]["fingerprint"] != theirs["model"]["fingerprint"]
    for task in tasks:
        lines = [
            [json.loads(line) for line in (tmp_path / side / f"{task}.jsonl").read_text().splitlines()]
            for side in ("ours", "theirs")
        ]
        assert len(lines[0]) == len(lines[1]) > 0
        for one, other in zip(*lines, strict=True):
            assert one.pop("key") != other.pop("key")
            for name in ("nll", "nll_sums"):
                if name in one:
                    assert np.allclose(one.pop(name), other.pop(name), rtol=1e-4)
            assert one == other
    assert {path.name for path in (tmp_path / "ours").glob("*.png")} == {
        "perplexity.png",
        "needle.png",
        "tasks.png",
    }
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "ours").glob("*.png"))


def test_losses_of_documents_are_those_of_each_document_alone(
    run: Path, tiny_data: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    arguments = ["--tasks", "documents", "--lengths", "100", "--samples", "40", "--batch-tokens", "250"]
    found = evaluate(run, tmp_path / "out", *arguments)["tasks"]["documents"]["100"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    assert len({line["index"] for line in lines}) == 40
    documents = LocalText.from_data([str(tiny_data / "valid")], tokenizer, 1).documents
    with open_model(run) as model:
        for line in lines:
            ids = torch.tensor(documents[line["index"]][:101].tolist())[None]
            losses = model.losses(ids)[0].double()
            parts = [losses[:64], losses[64:]] if len(losses) > 64 else [losses]
            assert line["tokens"] == len(losses)
            assert line["nll_sums"] == pytest.approx([float(part.sum()) for part in parts], rel=1e-5)
    assert max(line["tokens"] for line in lines) == 100
    assert len({line["tokens"] for line in lines}) > 3
    tokens = sum(line["tokens"] for line in lines)
    assert (found["documents"], found["tokens"]) == (40, tokens)
    assert found["nll"] == pytest.approx(sum(sum(line["nll_sums"]) for line in lines) / tokens)
    late = [line for line in lines if line["tokens"] > 64]
    assert found["buckets"][1]["nll"] == pytest.approx(
        sum(line["nll_sums"][1] for line in late) / sum(line["tokens"] - 64 for line in late)
    )
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["documents.png"]


def test_windows_say_which_document_they_are_of(
    run: Path, tiny_data: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    arguments = ["--tasks", "perplexity", "--lengths", "50", "--samples", "30"]
    evaluate(run, tmp_path / "out", *arguments)
    lines = [json.loads(line) for line in (tmp_path / "out" / "perplexity.jsonl").read_text().splitlines()]
    text = LocalText.from_data([str(tiny_data / "valid")], tokenizer, 1)
    windows = text.windows(50, 30, 0)
    assert [line["document"] for line in lines] == [number for number, _ in windows]
    assert len({number for number, _ in windows}) < len(windows)
    for number, window in windows:
        document = text.documents[number]
        assert any((document[n : n + 51] == window).all() for n in range(0, len(document) - 50, 50))


def test_a_killed_evaluation_goes_on_where_it_was(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--tasks", "perplexity,copy", "--lengths", "100", "--samples", "3"]
    whole = evaluate(run, tmp_path / "out", *arguments)
    # a kill in the middle of the third line
    path = tmp_path / "out" / "copy.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    (tmp_path / "out" / "results.json").unlink()
    capsys.readouterr()
    assert evaluate(run, tmp_path / "out", *arguments) == whole
    printed = capsys.readouterr().out
    assert "(0 of 3 computed" in printed
    assert "(1 of 3 computed" in printed
    assert path.read_text().splitlines(keepends=True) == lines
    path.write_text("".join(["{damaged\n", *lines[1:]]))
    assert evaluate(run, tmp_path / "out", *arguments) == whole
    assert path.read_text().splitlines(keepends=True) == ["{damaged\n", *lines[1:], lines[0]]
    path.write_text("".join(lines))
    evaluate(run, tmp_path / "out", *arguments, "--seed", "1")
    assert len(path.read_text().splitlines()) == 6  # of other settings, beside the old ones


def test_of_the_usual_lengths_each_task_leaves_out_those_that_it_cannot_have(
    write_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = write_run("dash", data={"seq_length": 128})
    words = tmp_path / "words.txt"
    words.write_text("a few words, fewer than a row has\n" * 3)
    arguments = ["--samples", "1", "--text", str(words)]
    tasks = "copy,perplexity,needle"
    results = evaluate(Path(config.run_dir), tmp_path / "out", "--tasks", tasks, *arguments)
    assert {task: list(found) for task, found in results["tasks"].items()} == {
        "copy": ["128"],
        "perplexity": ["32", "64"],
    }
    told = capsys.readouterr().out
    left_out = [
        line.removeprefix("left out: ") for line in told.splitlines() if line.startswith("left out: ")
    ]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["left_out"] == left_out
    assert len(left_out) == 6
    assert "left out: task copy: --lengths 64 must be at least 80\n" in told
    assert "left out: task perplexity: --lengths 128 needs documents of 129 tokens" in told
    assert "left out: task needle: --lengths 128 must be at least" in told
    # a task alone that fits nowhere is an error, as before
    nowhere = ["evaluate", config.run_dir, "--output", str(tmp_path / "none"), "--tasks", "needle"]
    assert main([*nowhere, *arguments]) == 2
    assert not (tmp_path / "none").exists()


def test_what_is_wrong_with_a_task_at_any_length_is_an_error_beside_others_that_fit(
    write_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = write_run("dash", data={"seq_length": 256})
    (tmp_path / "one.txt").write_text("a")
    arguments = ["--tasks", "copy,documents", "--samples", "1", "--text", str(tmp_path / "one.txt")]
    assert main(["evaluate", config.run_dir, "--output", str(tmp_path / "out"), *arguments]) == 2
    assert "task documents: no document of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_second_evaluation_into_a_folder_is_refused_while_the_first_is_at_work(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--tasks", "perplexity", "--lengths", "100", "--samples", "3"]
    load, codes = models.load_weights, []

    def load_after_another_began(*places: Any) -> Any:
        codes.append(main(["evaluate", str(run), "--output", str(tmp_path / "out"), *arguments]))
        return load(*places)

    monkeypatch.setattr(models, "load_weights", load_after_another_began)
    whole = evaluate(run, tmp_path / "out", *arguments)
    assert codes == [2]
    told = f"error: process {os.getpid()} on {socket.gethostname()} evaluates into {tmp_path / 'out'}; wait for it"
    assert told in capsys.readouterr().err
    monkeypatch.undo()
    assert evaluate(run, tmp_path / "out", *arguments) == whole


def test_results_of_a_diverged_model_are_strict_json_and_are_read_again(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logits = RunModel.logits
    monkeypatch.setattr(RunModel, "logits", lambda model, hidden: logits(model, hidden) * math.nan)
    arguments = ["--tasks", "perplexity,copy", "--lengths", "100", "--samples", "2"]
    first = evaluate(run, tmp_path / "out", *arguments)
    assert first["tasks"]["perplexity"]["100"]["nll"] is None
    assert first["tasks"]["copy"]["100"]["nll"] is None
    assert evaluate(run, tmp_path / "out", *arguments) == first
    assert capsys.readouterr().out.count("(0 of 2 computed") == 2
    for path in (tmp_path / "out").glob("*.json*"):
        assert "NaN" not in path.read_text()


def test_a_stretched_rope_scores_as_a_run_with_it_in_its_own_folder(
    write_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = write_run("dash")
    arguments = ["--tasks", "copy", "--lengths", "200", "--samples", "2"]
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    plain = evaluate(Path(config.run_dir), tmp_path / "plain", *arguments)
    assert main(["evaluate", config.run_dir, *arguments, "--rope-scaling", yaml.safe_dump(scaling)]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.parent == Path(config.run_dir) / "evaluation" / "step_00000001_yarn_4"
    stretched = json.loads(path.read_text())
    assert stretched["model"]["rope_scaling"] == scaling
    assert plain["model"]["rope_scaling"] is None
    # a run whose config has it
    tokens = torch.arange(200)[None] % 50
    with open_model(config.run_dir) as model:
        before = model.losses(tokens)
    with open_model(config.run_dir, rope_scaling=RopeScaling(**scaling)) as model:
        after = model.losses(tokens)
    shape = config.model.model_copy(update={"rope_scaling": RopeScaling(**scaling)})
    with whole_model(config.model_copy(update={"model": shape}), weights) as (trained, device):
        wanted = RunModel(trained, config, "", "", device).losses(tokens)
    assert torch.equal(after, wanted)
    assert not torch.equal(after, before)
    nll = [results["tasks"]["copy"]["200"]["nll"] for results in (plain, stretched)]
    assert nll[0] != nll[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "niah,copy"], "--tasks niah: the known ones are perplexity, needle"),
        (["--score", "best"], "--score best must be one of answer, generate"),
        (["--lengths", "5000", "--tasks", "perplexity"], "needs documents of 5001 tokens, and the longest"),
        (["--lengths", "60", "--tasks", "needle"], "task needle: --lengths 60 must be at least"),
        (["--lengths", "60", "--tasks", "copy"], "task copy: --lengths 60 must be at least 80"),
        (["--lengths", "9000000", "--tasks", "niah_single"], "needs more text"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--step", "7"], "no checkpoint of step 7"),
        (["--rope-scaling", "{rope_type: yarn}"], "rope_type=yarn needs ['factor', 'original_max"),
        (["--rope-scaling", "{rope_type: yarn"], "--rope-scaling '{rope_type: yarn' is not valid YAML"),
        (
            ["--rope-scaling", "yarn"],
            "--rope-scaling 'yarn' must be a mapping; its keys are rope_type, factor",
        ),
    ],
)
def test_what_cannot_work_is_told(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # told before weights are read, which takes minutes where they are large
    monkeypatch.setattr(models, "load_weights", None)
    assert main(["evaluate", str(run), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_path_to_the_wrong_kind_of_thing_is_told(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "load_weights", None)
    arguments = ["evaluate", str(run), "--tasks", "copy", "--lengths", "100", "--samples", "1"]
    (tmp_path / "a_file").touch()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"text"))
    for more, message in (
        (["--text", str(tmp_path)], f"Is a directory: {tmp_path}"),
        (["--output", str(tmp_path / "a_file")], f"File exists: {tmp_path}/a_file"),
        (["--output", str(tmp_path / "a_file" / "out")], "Not a directory"),
        (["--text", str(tmp_path / "none.txt")], f"error: --text {tmp_path}/none.txt does not exist"),
        (["--text", "none.txt"], f"error: --text none.txt (relative to {Path.cwd()}) does not exist"),
        (["--text", str(tmp_path / "a_file")], "a_file is empty"),
        (
            ["--text", str(tmp_path / "text.gz")],
            "text.gz must be UTF-8 text, which its byte 1 is not; decompress it",
        ),
        (
            ["--text", str(tmp_path / "a.jsonl")],
            "a.jsonl must be plain text, read as one document, and not JSONL",
        ),
        (["--data", str(tmp_path / "none")], f"{tmp_path}/none.idx does not exist"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "model.yaml").touch()
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "of imported weights give the folder that they came from" in capsys.readouterr().err


def test_lm_eval_scores_local_tasks_on_an_export_as_transformers_does(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (docs/evaluation.md)")
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "out"
    export_run(run, folder, dtype="float32")
    monkeypatch.chdir(ROOT)  # the tasks' data are named from there
    # left by the training model; accelerate would look for peers
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True, "dtype": "float32"},
        tasks=["local_completion", "local_needle"],
        task_manager=TaskManager(include_path="examples/lm_eval", include_defaults=False),
        batch_size=4,  # rows of a batch differ in length: they are padded, on the left to generate
        device="cpu",
        bootstrap_iters=0,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    right = []
    for sample in results["samples"]["local_completion"]:
        document = sample["doc"]
        losses = [
            log_probability(model, tokenizer, document["prompt"], choice) for choice in document["choices"]
        ]
        assert [value for value, _ in sample["filtered_resps"]] == pytest.approx(losses, abs=1e-3)
        right.append(losses.index(max(losses)) == document["answer"])
    assert len(right) == 4
    assert results["results"]["local_completion"]["acc,none"] == np.mean(right)
    for sample in results["samples"]["local_needle"]:
        row = tokenizer(sample["doc"]["prompt"], return_tensors="pt")
        new = model.generate(**row, max_new_tokens=16, do_sample=False)[0, row["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert sample["resps"] == [[text.split("\n")[0]]]


def log_probability(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """Of a continuation's tokens, behind a prompt alone in its batch."""
    start, row = tokenizer(prompt)["input_ids"], tokenizer(prompt + continuation)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
    return sum(float(logits[at - 1, row[at]]) for at in range(len(start), len(row)))
