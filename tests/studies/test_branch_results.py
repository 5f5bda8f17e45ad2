"""What is made of branches that are trained and evaluated: comparisons, tables, sentences, pictures and a page."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dash_megatron import drawing
from dash_megatron.__main__ import main
from dash_megatron.studies.paired import standard_error
from dash_megatron.studies.submit import submit_studies
from data_tools import make_retrieval, tokenize_corpus
from tests.conftest import ForkedPython
from tests.studies.study_runs import SIZES, STUDIES, Write, finish, finish_branch, runs_of

EXTRA = {"full": 0.0, "worse": 0.05, "same": 0.0, "better": -0.02}
SCORE = {"full": 1.0, "worse": 0.25, "same": 1.0, "better": 1.0}
ARMS = [
    {"name": "full", "attention.kind": "full"},
    {"name": "worse", "attention.chunk_size": 32},
    {"name": "same", "attention.chunk_size": 64},
    {"name": "better", "attention.chunk_size": 128},
]


@pytest.fixture
def measured_study(write_study: Write) -> Path:
    path = write_study(
        points=SIZES[:2],
        overrides={"attention.kind": "full"},
        branches={
            "overrides": {"data.seq_length": 256, "training.steps": 100},
            "arms": ARMS,
            "orders": [1, 2, 3],
            "reference": "full",
            "evaluate": {"held_out": "--tasks documents,niah_single --lengths 256"},
        },
    )
    for run in runs_of(path):
        if run.base:
            wobble = 0.0 if run.variant == "full" else 0.002 * (run.config.training.seed - 2)
            finish_branch(run, "held_out", EXTRA[run.variant] + wobble, SCORE[run.variant])
        else:
            finish(run, 3.2, None)
    return path


def lines_of(run: Any, task: str) -> list[dict[str, Any]]:
    path = run.folder / "evaluation" / "held_out" / f"{task}.jsonl"
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["key"] != "other"]


def collected(path: Path) -> list[dict[str, Any]]:
    assert main(["study", "collect", str(path)]) == 0
    return json.loads((path.parent / "out" / "comparisons.json").read_text())


def test_results_are_read_without_checkpoints(measured_study: Path) -> None:
    rows = collected(measured_study)
    for run in runs_of(measured_study):
        shutil.rmtree(run.folder / "checkpoints")
    assert collected(measured_study) == rows


def row_of(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    fields = {"base": "h32_full", "to": None, "step": None, **fields}
    found = [row for row in rows if all(row[key] == value for key, value in fields.items())]
    assert len(found) == 1, found
    return found[0]


def test_comparisons_are_those_computed_from_the_lines(measured_study: Path) -> None:
    rows = collected(measured_study)
    runs = {run.name: run for run in runs_of(measured_study)}
    sums, by_position = {}, {}
    for arm in ("full", "worse"):
        for order in (1, 2, 3):
            lines = lines_of(runs[f"{arm}_order{order}_from_h32_full"], "documents")
            tokens = sum(line["tokens"] for line in lines)
            sums[arm, order] = sum(sum(line["nll_sums"]) for line in lines)
            by_position[arm, order] = sum(line["nll_sums"][1] for line in lines if line["tokens"] > 64)
    differences = [(sums["worse", order] - sums["full", order]) / tokens for order in (1, 2, 3)]
    row = row_of(rows, arm="worse", task="documents")
    assert row["difference"] == pytest.approx(fmean(differences))
    assert row["difference_error_orders"] == pytest.approx(stdev(differences) / 3**0.5)
    assert row["reference_value"] == pytest.approx(fmean(sums["full", order] for order in (1, 2, 3)) / tokens)
    assert row["relative"] == pytest.approx(
        sum(sums["worse", order] for order in (1, 2, 3)) / sum(sums["full", order] for order in (1, 2, 3)) - 1
    )
    assert (row["orders"], row["items"], row["verdict"]) == ([1, 2, 3], 30, "above")
    part = row_of(rows, arm="worse", task="documents", to=128)
    both = [sum(by_position[arm, order] for order in (1, 2, 3)) for arm in ("worse", "full")]
    assert part["relative"] == pytest.approx(both[0] / both[1] - 1)
    verdicts = {arm: row_of(rows, arm=arm, task="documents")["verdict"] for arm in EXTRA}
    assert verdicts == {"full": "reference", "worse": "above", "same": "within", "better": "below"}
    score = row_of(rows, arm="worse", task="niah_single", length=64)
    assert (score["value"], score["reference_value"], score["relative"]) == (0.25, 1.0, -0.75)
    # a share of right answers has the binomial error
    assert score["value_error_items"] == pytest.approx((0.25 * 0.75 / 15) ** 0.5)
    loss = row_of(rows, arm="worse", task="loss")
    assert loss["difference"] == pytest.approx(0.05)
    steps = sorted(row["step"] for row in rows if row["task"] == "valid_loss" and row["arm"] == "same" and row["base"] == "h32_full")  # fmt: skip
    assert steps == np.linspace(1, 100, 10, dtype=int).tolist()
    with open(measured_study.parent / "out" / "comparisons.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_pieces_of_a_document_are_not_taken_to_be_independent(measured_study: Path) -> None:
    before = row_of(collected(measured_study), arm="worse", task="documents")
    pieces = {}
    for run in runs_of(measured_study):
        if run.base == "h32_full":
            lines = lines_of(run, "documents")
            pieces[run.variant, run.config.training.seed] = {line["index"]: line for line in lines}
            text = "".join(json.dumps({**line, "document": line["index"] // 3}) + "\n" for line in lines)
            (run.folder / "evaluation" / "held_out" / "documents.jsonl").write_text(text)
    after = row_of(collected(measured_study), arm="worse", task="documents")
    same = ("value", "difference", "difference_error_orders", "relative")
    assert [after[name] for name in same] == pytest.approx([before[name] for name in same])
    assert (before["items"], after["items"]) == (30, 10)

    def by_document(arm: str, count: Callable[[dict[str, Any]], float]) -> np.ndarray:
        by_piece = [[count(pieces[arm, order][n]) for n in range(30)] for order in (1, 2, 3)]
        return np.array(by_piece).sum(0).reshape(10, 3).sum(1)

    arm, reference = (by_document(name, lambda line: sum(line["nll_sums"])) for name in ("worse", "full"))
    expected = standard_error(arm - reference, by_document("full", lambda line: line["tokens"]))
    assert after["difference_error_items"] == pytest.approx(expected)
    assert abs(after["difference_error_items"] / before["difference_error_items"] - 1) > 0.02


def test_windows_of_unknown_documents_are_not_compared_with_those_of_known_ones(
    measured_study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next(run for run in runs_of(measured_study) if run.variant == "worse" and run.base)
    lines = [{**line, "document": line["index"]} for line in lines_of(run, "documents")]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "evaluation" / "held_out" / "documents.jsonl").write_text(text)
    assert main(["study", "collect", str(measured_study)]) == 2
    told = capsys.readouterr().err
    assert "worse of h32_full, held_out: some lines of documents.jsonl say which `document`" in told
    assert "remove evaluation/held_out of branches where they do not" in told


def test_the_report_says_what_is_beyond_two_standard_errors(
    measured_study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "report", str(measured_study)]) == 0
    out = measured_study.parent / "out"
    assert capsys.readouterr().out.splitlines() == [str(out / "report.html"), str(out / "report.md")]
    text = (out / "report.md").read_text()
    beyond, _, rest = text.partition("Not told apart by two standard errors, branches of h32_full:")
    assert "- worse: loss on held_out (documents up to 256): +3." in beyond
    assert "- better: loss on held_out (documents up to 256): -1." in beyond
    assert "- worse: niah_single at 64 (held_out): 0.250 of full's score (± 0.112 over 16 samples, ± 0.000 over 3 orders)." in beyond  # fmt: skip
    assert "- same: loss on held_out" in rest
    assert re.search(
        r"of the median document \+2\.\d+% \(± 0\.\d+% over 30 documents, ± 0\.\d+% over 3 orders\)\.", beyond
    )
    assert "| worse | 1 2 3 | 25.0% | 1,000 |" in text
    assert "| verdict | median | ± documents | ± orders | training loss |" in text
    page = (out / "report.html").read_text()
    assert "<h3>Beyond two standard errors</h3>" in page
    assert page.count("data:image/png;base64,") == 3
    assert 'src="http' not in page


def test_the_report_names_the_runs_that_it_lacks(
    measured_study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {run.name: run.folder for run in runs_of(measured_study)}
    assert main(["study", "report", str(measured_study)]) == 0
    out = measured_study.parent / "out"
    assert "Not trained" not in (out / "report.md").read_text() + (out / "report.html").read_text()
    assert main(["study", "collect", str(measured_study)]) == 0
    assert "Not trained" not in capsys.readouterr().out
    for order in (1, 2, 3):
        shutil.rmtree(folders[f"worse_order{order}_from_h64_full"])
    shutil.rmtree(folders["same_order2_from_h32_full"] / "evaluation")
    lacks = [name for name in folders if name.startswith("worse_") and name.endswith("h64_full")]
    assert main(["study", "report", str(measured_study)]) == 0
    said = f"Not trained, or not evaluated as the study says: same_order2_from_h32_full, {', '.join(lacks)}."
    assert said in (out / "report.md").read_text()
    assert f"<p>{said}</p>" in (out / "report.html").read_text()
    assert main(["study", "collect", str(measured_study)]) == 0
    assert said in capsys.readouterr().out.splitlines()


def test_the_report_names_branches_far_from_the_density_that_they_were_asked_for(
    measured_study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(measured_study.read_text())
    asked = {"worse": 0.24, "same": {0: 1.0, 50: 0.5}}
    for arm in tree["branches"]["arms"]:
        if arm["name"] in asked:
            arm["attention.target_density"] = asked[arm["name"]]
    measured_study.write_text(yaml.safe_dump(tree))
    # all selected 25%
    names = [run.name for run in runs_of(measured_study) if run.variant == "same"]
    said = (
        "Density further than 10% from attention.target_density at the end, so compare these by the density that they "
        f"have, or train them for more steps: {', '.join(f'{name} (25.0% for 50.0%)' for name in names)}."
    )
    assert main(["study", "report", str(measured_study)]) == 0
    out = measured_study.parent / "out"
    assert said in (out / "report.md").read_text().splitlines()
    assert f"<p>{said}</p>" in (out / "report.html").read_text()
    assert main(["study", "collect", str(measured_study)]) == 0
    assert said in capsys.readouterr().out.splitlines()


def test_another_arm_can_be_the_reference(measured_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def to_better(command: str, reference: str = "better") -> int:
        return main(["study", command, str(measured_study), "--reference", reference])

    first = row_of(collected(measured_study), arm="better", task="documents")
    assert [to_better(command) for command in ("collect", "plot", "report")] == [0, 0, 0]
    folder = measured_study.parent / "out" / "against_better"
    assert {path.name for path in folder.iterdir()} == {
        "comparisons.csv", "comparisons.json", "plots", "report.html", "report.md",
    }  # fmt: skip
    row = row_of(json.loads((folder / "comparisons.json").read_text()), arm="full", task="documents")
    assert (row["difference"], row["verdict"]) == (pytest.approx(-first["difference"]), "above")
    assert to_better("collect", "best") == 2
    assert "--reference best must be the name of an arm: full, worse, same, better" in capsys.readouterr().err


def test_plots_show_differences_and_scores(measured_study: Path) -> None:
    assert main(["study", "plot", str(measured_study)]) == 0
    plots = measured_study.parent / "out" / "plots"
    assert {path.name for path in plots.iterdir()} == {"position.png", "steps.png", "scores_held_out.png"}
    for path in plots.iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
            assert (pixels == color).all(1).sum() > 50, (path.name, color)


def test_arms_side_by_side_stand_away_from_the_ends_of_the_picture(
    measured_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: dict[str, Any] = {}
    save = drawing.save
    monkeypatch.setattr(
        drawing,
        "save",
        lambda figure, path: figures.update({path.name: figure}) or save(figure, path),
    )
    assert main(["study", "plot", str(measured_study)]) == 0
    for axis in figures["scores_held_out.png"].axes:
        places = [place for line in axis.lines for place in line.get_xdata()]
        assert axis.get_xlim()[0] < min(places) / 1.2
        assert axis.get_xlim()[1] > max(places) * 1.2


def test_in_one_order_nothing_is_told_apart(measured_study: Path) -> None:
    for run in runs_of(measured_study):
        if run.base and run.config.training.seed > 1:
            shutil.rmtree(run.folder)
    row = row_of(collected(measured_study), arm="worse", task="documents")
    assert (row["orders"], row["verdict"], row["difference_error_orders"]) == ([1], "unknown", None)
    assert row["difference_error_items"] > 0
    assert main(["study", "report", str(measured_study)]) == 0
    text = (measured_study.parent / "out" / "report.md").read_text()
    assert "| one order, unknown |" in text
    assert re.search("^Unknown: in one order of the data, .*, branches of h32_full:$", text, re.MULTILINE)
    assert "Beyond two standard errors, branches" not in text


def test_a_training_loss_of_one_logged_step_is_not_told_apart(measured_study: Path) -> None:
    for run in runs_of(measured_study):
        path = run.folder / "metrics.jsonl"
        # of steps 78, 89 and 100, which are in the last quarter
        path.write_text("".join(line for line in path.read_text().splitlines(True) if json.loads(line)["step"] not in (78, 89)))  # fmt: skip
    row = row_of(collected(measured_study), arm="worse", task="loss")
    assert (row["items"], row["orders"], row["verdict"]) == (1, [1, 2, 3], "unknown")
    assert main(["study", "report", str(measured_study)]) == 0
    text = (measured_study.parent / "out" / "report.md").read_text()
    before, _, unknown = text.partition(
        "\nUnknown: in one order of the data, or of one document, sample or step,"
    )
    assert "training loss: " not in before
    assert "- worse: training loss: +1." in unknown


def test_a_loss_that_is_not_finite_is_neither_higher_nor_lower(measured_study: Path) -> None:
    diverged = next(run for run in runs_of(measured_study) if run.variant == "better")
    path = diverged.folder / "evaluation" / "held_out" / "documents.jsonl"
    *others, last = [json.loads(line) for line in path.read_text().splitlines()]
    last["nll_sums"][-1] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in [*others, last]))
    row = row_of(collected(measured_study), arm="better", task="documents", base=diverged.base)
    assert (row["value"], row["difference"], row["verdict"]) == (None, None, "unknown")
    assert main(["study", "report", str(measured_study)]) == 0
    before, _, unknown = (
        (measured_study.parent / "out" / "report.md").read_text().partition("; or not finite")
    )
    assert "- better: loss on held_out" not in before
    assert "- better: loss on held_out (documents up to 256): +nan%" in unknown
    assert "| not finite, unknown |" in unknown


def test_steps_of_another_batch_are_not_compared(measured_study: Path) -> None:
    tree = yaml.safe_load(measured_study.read_text())
    tree["branches"]["arms"][1]["training.global_batch"] = 8
    measured_study.write_text(yaml.safe_dump(tree))
    rows = collected(measured_study)
    trained = [row["arm"] for row in rows if row["base"] == "h32_full" and row["task"] == "loss"]
    assert trained == ["full", "same", "better"]
    assert row_of(rows, arm="worse", task="documents")["orders"] == [1, 2, 3]


def test_what_is_evaluated_is_compared_before_the_rest_is(measured_study: Path) -> None:
    tree = yaml.safe_load(measured_study.read_text())
    tree["branches"]["evaluate"]["longer"] = "--tasks documents --lengths 512"
    measured_study.write_text(yaml.safe_dump(tree))
    rows = collected(measured_study)
    assert {row["evaluation"] for row in rows} == {"held_out", "training"}


def test_what_cannot_be_compared_is_told(measured_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*command: str) -> str:
        assert main(["study", *command, str(measured_study)]) == 2
        return capsys.readouterr().err

    assert "there is nothing to fit; `study report` compares them" in refused("fit")
    runs = {run.name: run for run in runs_of(measured_study)}
    path = runs["same_order1_from_h32_full"].folder / "evaluation" / "held_out" / "documents.jsonl"
    text = path.read_text()
    longest = max(line["tokens"] for line in lines_of(runs["same_order1_from_h32_full"], "documents"))
    path.write_text(text.replace(f'"tokens": {longest}', f'"tokens": {longest - 1}'))
    assert "same of h32_full, held_out, documents: item" in refused("collect")
    path.write_text(text.replace('"nll_sums"', '"sums"'))
    assert "has no results of `evaluate`" in refused("collect")
    path.write_text(text)
    for run in runs.values():
        if run.variant == "full" and run.base:
            shutil.rmtree(run.folder / "evaluation")
    assert "no arm and full are trained and evaluated in one order" in refused("report")


def make_retrieval_data(data: Path, folder: Path) -> str:
    """Needles and pairs to recall in the words of the tiny corpus, tokenized; gives their prefix."""
    tokenizer = ["--tokenizer", str(data / "tokenizer.model")]
    text = ["--text", str(data / "documents"), "--lengths", "64", "128", "--tokens", "2000"]
    assert make_retrieval.main([*text, *tokenizer, "--output", str(folder / "retrieval.jsonl")]) == 0
    tokenize = ["--input", str(folder / "retrieval.jsonl"), "--output", str(folder / "retrieval")]
    assert tokenize_corpus.main([*tokenize, *tokenizer, "--valid-fraction", "0", "--workers", "1"]) == 0
    return str(folder / "retrieval" / "train")


def test_the_quickstart_of_branches_runs_from_base_to_report(
    tiny_config: dict[str, Any],
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # commands that `test_a_study_trains_here_and_its_results_are_collected` starts anew
    forked = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedPython})
    monkeypatch.setattr("dash_megatron.studies.local.subprocess", forked)
    study = yaml.safe_load((STUDIES / "branches_quickstart.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_config))
    study |= {"base": str(tmp_path / "base.yaml"), "output": str(tmp_path / "out")}
    retrieval = make_retrieval_data(tiny_data, tmp_path)
    study["overrides"] = {key: x for key, x in study["overrides"].items() if not key.startswith("model.")} | {
        "data.train": [f"0.95 {tiny_data}/train", f"0.05 {retrieval}"],
        "data.seq_length": 64, "training.steps": 3, "schedule.warmup_steps": 1, "evaluation.every": 2,
    }  # fmt: skip
    smaller = {"data.seq_length": 128, "training.steps": 4, "schedule.warmup_steps": 1, "evaluation.every": 2}
    study["branches"]["overrides"] |= smaller
    study["branches"]["arms"].pop()
    study["branches"]["evaluate"] = {"held_out": "--tasks documents,copy --samples 8 --lengths 128"}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    assert submit_studies([path], at_once=2, only=["*order1*"]) == 0, capsys.readouterr().out
    before = {run.name: (run.folder / "metrics.jsonl").stat().st_mtime_ns for run in runs_of(path)[:3]}
    assert submit_studies([path], at_once=2) == 0
    assert all((tmp_path / "out" / "runs" / name / "metrics.jsonl").stat().st_mtime_ns == x for name, x in before.items())  # fmt: skip
    rows = collected(path)
    row = row_of(rows, base="full", arm="dash_50", task="documents")
    assert runs_of(path)[0].config.data.train == runs_of(path)[1].config.data.train
    assert (row["orders"], row["items"]) == ([1, 2], 8)
    assert 0 < abs(row["relative"]) < 0.1
    assert {row["to"] for row in rows if row["task"] == "documents"} == {None, 64, 128}
    assert {row["step"] for row in rows if row["task"] == "valid_loss"} == {2, 4}
    for run in runs_of(path)[1:]:
        assert run.config == load_study_config(run.folder)
    assert main(["study", "report", str(path)]) == 0
    assert "dash_50: loss on held_out" in (tmp_path / "out" / "report.md").read_text()


def load_study_config(folder: Path) -> Any:
    from dash_megatron.config import config_of_stored_run

    return config_of_stored_run(yaml.safe_load((folder / "config.yaml").read_text()))
