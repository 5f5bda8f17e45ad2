"""How the runs of studies are trained and evaluated, here and as arrays."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_megatron.__main__ import main
from dash_megatron.studies import jobs as jobs_module
from dash_megatron.studies import scores
from dash_megatron.studies import submit as submit_module
from dash_megatron.studies.collect import collect
from dash_megatron.studies.local import environments
from dash_megatron.studies.study_file import StudyError, load_study
from tests.studies.study_runs import SIZES, Write, finish, runs_of

TRAINER = """
import os, pathlib, sys, yaml
config = yaml.safe_load(open(sys.argv[2]))
run = pathlib.Path(config["run_dir"])
(run / "starts").open("a").write("x")
code = (CODES).get(config["model"]["hidden_size"], 0)
print("error: it is", code, "in start", len((run / "starts").read_text()))
if code == 1 and (run / "starts").read_text() == "xx":
    code = 0
if code == 0:
    (run / "checkpoints" / f"step_{config['training']['steps']:08d}").mkdir(parents=True)
sys.exit(code)
"""


def trainer(tmp_path: Path, codes: dict[int, int]) -> list[str]:
    script = tmp_path / "fake_train.py"
    script.write_text(TRAINER.replace("CODES", repr(codes)))
    return [sys.executable, str(script)]


def starts(path: Path) -> dict[str, int]:
    return {run.size: len((run.folder / "starts").read_text()) for run in runs_of(path) if (run.folder / "starts").exists()}  # fmt: skip


def test_submit_restarts_faults_not_errors_and_skips_what_is_finished(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(points=SIZES)
    command = trainer(tmp_path, {64: 2, 128: 1})
    assert submit_module.submit_studies([path], train=command) == 1
    assert starts(path) == {"h32": 1, "h64": 1, "h128": 2, "h256": 1}
    assert re.search(
        r"its config or machine is wrong; see .*study\.log \(error: it is 2 in start 1\)\n",
        capsys.readouterr().out,
    )
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert starts(path) == {"h32": 1, "h64": 2, "h128": 2, "h256": 1}


def test_submit_says_why_a_run_halted(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "halting_train.py"
    script.write_text("print('halted: the gradient norm is inf')\nexit(3)\n")
    assert submit_module.submit_studies([write_study()], train=[sys.executable, str(script)]) == 1
    said = capsys.readouterr().out
    assert re.search(r"it halted itself; see .*study\.log \(halted: the gradient norm is inf\)\n", said)


def test_a_study_whose_output_cannot_be_a_folder_is_told(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    path = write_study(output=str(tmp_path / "file" / "out"))
    with pytest.raises(
        StudyError,
        match=r"output=.*/file/out must be a folder to write to: Not a directory: .*; choose another",
    ):
        submit_module.submit_studies([path], train=trainer(tmp_path, {}))


def test_submit_ends_where_a_run_was_asked_to_stop(write_study: Write, tmp_path: Path) -> None:
    path = write_study(points=SIZES)
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {64: 75})) == 75
    assert starts(path) == {"h32": 1, "h64": 1}


def test_submit_trains_only_what_is_asked_for_in_that_order(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, command = write_study(points=SIZES), trainer(tmp_path, {})
    assert submit_module.submit_studies([path], train=command, only=["h256*", "h[36]*"]) == 0
    assert [line.split()[1].split("_")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" steps")] == ["h256", "h32", "h64"]  # fmt: skip
    assert starts(path) == {"h32": 1, "h64": 1, "h256": 1}
    with pytest.raises(ValueError, match=r"--only h999 fits no run.*h32"):
        submit_module.submit_studies([path], train=command, only=["h999"])


EVALUATOR = """
import pathlib, sys
run, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[-1])
with (run / "evaluated").open("a") as file:
    file.write(" ".join(sys.argv[2:-2]) + ";")
if FAILS in str(output):
    sys.exit(2)
output.mkdir(parents=True)
(output / "results.json").write_text("{}")
"""


def test_submit_evaluates_what_is_trained_once_and_again_where_it_failed(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fake_evaluate.py"
    script.write_text(EVALUATOR.replace("FAILS", "'h64'"))
    monkeypatch.setattr(jobs_module, "EVALUATE", (sys.executable, str(script)))
    path = write_study(
        points=SIZES[:2],
        evaluate={"short": "--tasks copy", "twice": "--rope-scaling '{rope_type: linear, factor: 2}'"},
    )
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 1
    # of the command that failed, not of the training before it
    assert re.search(
        r"failed: evaluation short ended with exit code 2; see .*study\.log\n", capsys.readouterr().out
    )
    both = "--tasks copy;--rope-scaling {rope_type: linear, factor: 2};"
    folders = {run.size: run.folder for run in runs_of(path)}
    assert (folders["h32"] / "evaluated").read_text() == both
    assert (folders["h64"] / "evaluated").read_text() == "--tasks copy;"  # the rest would fail alike
    script.write_text(EVALUATOR.replace("FAILS", "'nothing'"))
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out
    assert (folders["h32"] / "evaluated").read_text() == both
    assert (folders["h64"] / "evaluated").read_text() == "--tasks copy;" + both
    path = write_study(points=SIZES[:2], evaluate={"short": "--tasks copy --samples 5"})
    script.write_text(
        EVALUATOR.replace("FAILS", "'nothing'").replace("mkdir(parents=True)", "mkdir(exist_ok=True)")
    )
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert (folders["h32"] / "evaluated").read_text() == both + "--tasks copy --samples 5;"
    assert starts(path) == {"h32": 1, "h64": 1}


@pytest.mark.parametrize("command", ["plan", "submit"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks recal", "evaluate.all='--tasks recal': --tasks recal: the known ones are perplexity"),
        ("--length 64k", "'64k' must be whole numbers, such as 4096,16384"),
        ("--sample-count 3", "unrecognized arguments: --sample-count 3"),
        ("--rope-scaling '{rope_type: yarn}'", "rope_type=yarn needs"),
        ("--rope-scaling '{rope_type: yarn", "No closing quotation"),
    ],
)
def test_a_wrong_evaluation_is_told_before_anything_is_trained(
    arguments: str, message: str, command: str, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(evaluate={"all": arguments})
    assert main(["study", command, str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize("command", ["plan", "submit"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks copy --lengths 128,64", "task copy: --lengths 64 must be at least 80"),
        ("--tasks needle --lengths 64", "task needle: --lengths 64 must be at least"),
        ("--tasks perplexity --lengths 100000", "needs documents of 100001 tokens"),
        ("--tasks copy --text a.txt --data b", "--text and --data exclude each other"),
    ],
)
def test_an_evaluation_that_the_data_cannot_have_is_told_before_anything_is_trained(
    arguments: str,
    message: str,
    command: str,
    write_study: Write,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {
        "data.tokenizer": str(tiny_data / "tokenizer.model"),
        "data.train": [str(tiny_data / "train")],
        "data.valid": [str(tiny_data / "valid")],
    }
    fits = "--tasks copy,perplexity --lengths 128"
    path = write_study(overrides=data, twins=["full"], evaluate={"fits": fits, "all": arguments})
    assert main(["study", command, str(path)]) == 2
    told = capsys.readouterr().err
    assert f"run dash: evaluate.all='{arguments}': " in told
    assert message in told
    assert not (path.parent / "out").exists()


def test_an_evaluation_of_data_that_is_not_made_yet_is_planned_and_told(
    write_study: Write, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"all": "--tasks copy --lengths 64"}
    for tokenizer in (tmp_path / "none.model", tiny_data / "tokenizer.model"):
        data = {"data.tokenizer": str(tokenizer), "data.train": ["none"], "data.valid": ["none"]}
        path = write_study(overrides=data, evaluate=arguments, seeds=[1, 2])
        assert main(["study", "plan", str(path)]) == 0
        missing = "none.model" if tokenizer.parent == tmp_path else "none.idx"
        told = capsys.readouterr().err
        assert told.count("warning: evaluate.all needs what is not there yet: ") == 1
        assert f"{missing} " in told


@pytest.mark.parametrize(
    "words", [[], ["--slurm=--nodes 1 --gpus-per-node 1 --time 1:00:00"]], ids=["here", "slurm"]
)
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("data.tokenizer", "/no.model", "data.tokenizer=/no.model does not exist; train one with `"),
        ("model.vocab_size", 128, "model.vocab_size=128 must be at least 320, the vocabulary of data.tokenizer="),
        ("data.train", [], "data.train is empty; set it"),
        ("data.train", ["/no/train"], "data.train: /no/train.idx does not exist; make it with `"),
        ("data.valid", ["/no/valid"], "data.valid: /no/valid.idx does not exist; make it with `"),
        ("training.init_from", "/no/run", "training.init_from=/no/run does not exist; name a run that has saved"),
        ("training.init_from", "/", "training.init_from=/ has neither checkpoints nor model.yaml; name a run that"),
    ],
)  # fmt: skip
def test_a_run_whose_inputs_are_not_there_keeps_all_of_the_study_from_starting(
    setting: str,
    value: Any,
    message: str,
    words: list[str],
    tiny_config: dict[str, Any],
    write_study: Write,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = {f"data.{key}": tiny_config["data"][key] for key in ("tokenizer", "train", "valid")}
    missing = {"name": "second", "model.hidden_size": 32, setting: value}
    path = write_study(overrides=data, points=[{"name": "first"}, missing])
    if setting.startswith("data."):
        path = write_study(points=[{"name": "first", **data}, {**data, **missing}])
    assert main(["study", "submit", str(path), *words]) == 2
    told = capfd.readouterr()
    assert re.search(rf"error: run \S*second\S*: {re.escape(message)}", told.err)
    assert ("--inputs-later" in told.err) == (bool(words) and "/" in str(value))
    assert "steps" not in told.out
    assert not (tmp_path / "out").exists()


def test_several_studies_wait_in_one_queue_in_the_order_asked_for(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name in ("first", "second"):
        path = write_study(points=SIZES, output=str(tmp_path / name))
        paths.append(path.rename(tmp_path / f"{name}.yaml"))
    command = trainer(tmp_path, {})
    assert submit_module.submit_studies(paths, train=command, only=["second/h64*", "h32*", "first/h1*"]) == 0
    order = [line.split()[1].split("_")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" steps")]  # fmt: skip
    assert order == ["h64", "h32", "h32", "h128"]
    assert starts(paths[0]) == {"h32": 1, "h128": 1}
    assert starts(paths[1]) == {"h32": 1, "h64": 1}
    assert submit_module.submit_studies(paths, train=command) == 0
    assert starts(paths[0]) == starts(paths[1]) == dict.fromkeys(("h32", "h64", "h128", "h256"), 1)
    (tmp_path / "other").mkdir()
    twice = shutil.copy(paths[0], tmp_path / "other" / "first.yaml")
    with pytest.raises(ValueError, match="must have names of their own"):
        submit_module.submit_studies([paths[0], twice], train=command)
    copied = shutil.copy(paths[0], tmp_path / "copied.yaml")
    with pytest.raises(
        StudyError, match=r"must have an `output` each: first has .*/first, copied has .*/first; give one"
    ):
        submit_module.submit_studies([paths[0], copied], train=command)


# notes when it begins and when it ends, and takes a while
SLOW = """
import pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[2]))
run = pathlib.Path(config["run_dir"])
log = run.parent / "order"
with log.open("a") as file:
    file.write(f"+{config['model']['hidden_size']} ")
# the two that wait for nobody run at once, however slow the machine: neither ends before both have begun
until = time.monotonic() + 60
while config["model"]["hidden_size"] >= 128 and not {"+128", "+256"} <= set(log.read_text().split()):
    if time.monotonic() > until:
        break
    time.sleep(0.01)
with log.open("a") as file:
    file.write(f"-{config['model']['hidden_size']} ")
(run / "checkpoints" / f"step_{config['training']['steps']:08d}").mkdir(parents=True)
"""


def test_a_run_waits_for_the_one_whose_weights_it_begins_with(
    write_study: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    points = [dict(point) for point in SIZES]
    points[0]["training.init_from"] = str(runs_of(write_study(points=points))[3].folder)
    of_first = runs_of(write_study(points=points))[0].folder
    points[1]["training.init_from"] = str(of_first / "checkpoints" / "step_00000001")
    path = write_study(points=points)
    script = tmp_path / "slow_train.py"
    script.write_text(SLOW)
    words = "--nodes 1 --gpus-per-node 4 --time 1:00:00 --inputs-later --dry-run"
    assert submit_module.submit_studies([path], slurm=words.split()) == 0
    # an array of 128 and 256, then of 32, then of 64, each after the one before
    parts = capfd.readouterr().out.split("#!/usr/bin/env bash")[1:]
    assert ["--dependency=afterok:JOB" in part for part in parts] == [False, True, True]
    assert [{size for size in (32, 64, 128, 256) if f"h{size}_dash" in part.partition("RUN_DIRS=")[2]} for part in parts] == [{128, 256}, {32}, {64}]  # fmt: skip
    assert submit_module.submit_studies([path], train=[sys.executable, str(script)], at_once=3) == 0
    order = (runs_of(path)[0].folder.parent / "order").read_text().split()
    assert sorted(order[:2]) == ["+128", "+256"]
    assert order.index("+32") > order.index("-256")
    assert order.index("+64") > order.index("-32")


def test_runs_that_wait_for_each_other_do_not_wait_for_ever(write_study: Write, tmp_path: Path) -> None:
    folders = [tmp_path / "out" / "runs" / f"{name}-dash" for name in "ab"]
    points = [
        {"name": "a", "training.init_from": str(folders[1])},
        {"name": "b", "training.init_from": str(folders[0])},
    ]
    path = write_study(points=points)
    assert [run.folder for run in runs_of(path)] == folders
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {}), at_once=2) == 0


# waits until as many runs have started as are to run at once
TOGETHER = """
import os, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[2]))
run = pathlib.Path(config["run_dir"])
(run / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "any"))
for _ in range(600):
    if len(list(run.parent.glob("*/gpu"))) >= 2:
        break
    time.sleep(0.05)
else:
    sys.exit(2)
if WAIT:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run / "waiting").touch()
    time.sleep(60)
(run / "checkpoints" / f"step_{config['training']['steps']:08d}").mkdir(parents=True)
"""


def test_submit_trains_several_at_once_each_on_the_next_gpu(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    path = write_study(points=SIZES)
    script = tmp_path / "fake_train.py"
    script.write_text(TOGETHER.replace("WAIT", "False"))
    assert submit_module.submit_studies([path], train=[sys.executable, str(script)], at_once=2) == 0
    gpus = [(run.folder / "gpu").read_text() for run in runs_of(path)]
    assert set(gpus) == {"3", "5"}
    assert set(gpus[:2]) == {"3", "5"}


def test_runs_that_outnumber_gpus_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def places(at_once: int, processes: int) -> list[str | None]:
        return [place.get("CUDA_VISIBLE_DEVICES") for place in environments(at_once, processes)]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert places(3, 1) == ["0", "1", "2"]
    assert places(3, 2) == ["0,1", "2,3", "0,1"]
    assert places(2, 4) == [None, None]
    assert places(1, 1) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert places(2, 1) == [None, None]


def test_a_stop_reaches_all_runs_at_once(write_study: Write, tmp_path: Path) -> None:
    path = write_study(points=SIZES)
    script = tmp_path / "fake_train.py"
    script.write_text(TOGETHER.replace("WAIT", "True"))
    code = f"""
import sys
import time
from dash_megatron.studies.submit import submit_studies
sys.exit(submit_studies([{str(path)!r}], train=[sys.executable, {str(script)!r}], at_once=2))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        for _ in range(600):
            if sum((run.folder / "waiting").exists() for run in runs_of(path)) == 2:
                break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=50) == 75
    assert sum((run.folder / "gpu").exists() for run in runs_of(path)) == 2


def test_runs_of_a_killed_submission_are_asked_to_stop_and_keep_others_out_until_they_have(
    write_study: Write, tmp_path: Path
) -> None:
    path = write_study()
    script = tmp_path / "fake_train.py"
    script.write_text(
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (folder / 'asked').touch())\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / 'started').touch()\n"
        "for _ in range(3000):\n"
        "    time.sleep(0.01)\n"
        "    if (folder / 'asked').exists() and (folder / 'saved').exists():\n        break\n"
    )
    code = f"from dash_megatron.studies.submit import submit_studies\nsubmit_studies([{str(path)!r}], train=[{sys.executable!r}, {str(script)!r}])"

    def wait_for(name: str) -> None:
        deadline = time.monotonic() + 30
        while not (tmp_path / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        wait_for("started")
        process.kill()
    wait_for("asked")
    command = trainer(tmp_path, {})
    with pytest.raises(StudyError, match="or was killed and its runs are still saving"):
        submit_module.submit_studies([path], train=command)
    (tmp_path / "saved").touch()
    for _ in range(1000):
        try:
            assert submit_module.submit_studies([path], train=command) == 0
            return
        except StudyError:
            time.sleep(0.01)
    pytest.fail("the lock is held for ever")


def test_a_study_needs_no_locks_of_the_file_system(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert submit_module.submit_studies([write_study()], train=trainer(tmp_path, {})) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at-once", "0"], "--at-once 0 must be at least 1"),
        (["--at-once", "2", "--slurm=--nodes 1"], "--at-once 2 is for this machine"),
    ],
)
def test_a_wrong_number_at_once_is_refused(
    arguments: list[str], message: str, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "submit", str(write_study()), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_config_is_refused_and_its_results_are_told_to_be_of_it(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(points=SIZES)
    run, other, *_ = runs_of(path)
    finish(run, 3.0, 0.5)
    finish(other, 3.0, 0.5)
    tree = run.config.model_dump(mode="json")
    tree["optimizer"]["lr"] = 0.5
    tree["schedule"]["warmup_steps"] = 1
    (run.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"was trained with optimizer\.lr=0\.5"):
        submit_module.submit_studies([path], train=trainer(tmp_path, {}))
    assert len(collect(load_study(path))) == 2
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {run.folder} was trained with optimizer.lr=0.5 (the study now says ")
    assert "), schedule.warmup_steps=1 (the study now says 0)" in warning
    assert warning.count("\n") == 1


def test_a_folder_trained_in_a_layout_that_is_refused_today_is_the_same_run(write_study: Write) -> None:
    run = next(run for run in runs_of(write_study(twins=["full"])) if run.config.attention.kind == "full")
    run.folder.mkdir(parents=True)
    tree = run.config.model_dump(mode="json")
    tree["parallel"] |= {"context": 2, "context_comm": "p2p"}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    submit_module.check_same(run)


def test_slurm_gets_one_array_of_the_runs_that_are_not_finished(
    write_study: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_study(points=SIZES)
    finish(runs_of(path)[1], 3.0, 0.5)
    words = "--nodes 1 --gpus-per-node 4 --time 1:00:00 --inputs-later --dry-run"
    assert main(["study", "submit", str(path), f"--slurm={words}"]) == 0
    script = capfd.readouterr().out
    assert "#SBATCH --array=0-2" in script
    assert "h256_dash" in script
    assert "h64_dash" not in script


def test_a_study_trains_here_and_its_results_are_collected(
    tiny_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_config))
    tree = {
        "base": str(tmp_path / "base.yaml"),
        "output": str(tmp_path / "out"),
        "budgets": {"tokens": [1024]},
        "evaluate": {"copied": "--tasks copy --lengths 80,100 --samples 1"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["study", "submit", str(path)]) == 0
    assert main(["study", "submit", str(path)]) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    assert set(scores.read_scores(runs_of(path)[0].folder)) == {
        scores.TaskLength("copy", False, 80),
        scores.TaskLength("copy", False, 100),
    }
    row = collect(load_study(path))[0]
    assert (row["finished"], row["step"], row["tokens"]) == (True, 2, 1024)
    assert 0 < row["density"] <= 1
    assert 0 < row["flops"] <= row["dense_flops"]
    # one run is too few for a law, and enough for a page
    for command, code in (("collect", 0), ("fit", 2), ("plot", 0), ("report", 0)):
        assert main(["study", command, str(path)]) == code, capsys.readouterr().err
    assert "no variant has the runs that a fit needs" in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "lines are fits" not in page
    pngs = sorted(png.name for png in (tmp_path / "out" / "plots").glob("*.png"))
    assert {"curves.png", "density.png", "pareto.png", "scores.png"} <= set(pngs)
    assert page.count('alt="') == len(pngs)
