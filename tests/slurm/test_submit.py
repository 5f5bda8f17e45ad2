"""What submit.py writes and refuses, and what its script does with each way for processes to end; without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import query  # of slurm/, see conftest.py
import submit  # of slurm/, see conftest.py
import yaml
from site_file import Site, load_site  # of slurm/, see conftest.py

import train
from dash_megatron.exit_codes import ExitCode

ROOT = Path(__file__).parents[2]
CONFIG = ["--config", str(ROOT / "configs/8b_16k.yaml")]
SIZE = ["--nodes", "4", "--gpus-per-node", "8"]
TIME = ["--time", "24:00:00"]


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The script that would be submitted, whose data is nowhere; it must be free of syntax errors."""
    assert submit.main([*arguments, "--inputs-later", "--dry-run"]) == 0, capsys.readouterr().err
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    return script


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def site_file(tmp_path: Path, **keys: Any) -> list[str]:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(keys))
    return ["--site", str(path)]


def config_of(folder: Path, name: str) -> str:
    path = folder / f"{name}.yaml"
    tree = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    path.write_text(yaml.safe_dump({**tree, "run_dir": str(folder / name)}))
    return str(path)


def test_a_dry_run_prints_the_script_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--job-name", "big", "--dependency", "afterok:12"]
    script = dry_run(capsys, *CONFIG, *SIZE, *TIME, *words, f"run_dir={run}", "optimizer.lr=1e-3")
    assert not run.exists()
    expected = {
        "--job-name=big",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        "--export=NONE",
        "--dependency=afterok:12",
        f"--output={run}/logs/job_%j.log",
    }
    assert expected <= set(options_of(script))
    assert "array" not in " ".join(options_of(script))
    assert f"RUN_DIRS=({run})" in script
    assert "srun --export=ALL --kill-on-bad-exit=1 --distribution=block" in script
    assert "rank_%5t.log" in script


def test_several_configs_make_a_job_array(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    study = [config_of(tmp_path, name) for name in ("low", "high", "higher")]
    script = dry_run(
        capsys, "--array", *study, "--at-once", "2", "--nodes", "1", "--gpus-per-node", "0", *TIME
    )
    assert "--array=0-2%2" in options_of(script)
    assert f"RUN_DIRS=({' '.join(str(tmp_path / name) for name in ('low', 'high', 'higher'))})" in script
    assert f"--job-name={tmp_path.name}" in options_of(script)
    assert not [option for option in options_of(script) if "gpus" in option]


def test_the_site_file_reaches_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = site_file(
        tmp_path,
        sbatch=["--partition=gpu"],
        gpus="--gres=gpu:h100:{gpus}",
        cpus_per_process=12,
        warning_seconds=600,
        modules=["cuda/12"],
        environment={"NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_TIMEOUT": 22},
        setup="ulimit -l unlimited\nexport WHERE=$(hostname)",
        container=["apptainer", "exec", "--nv", "/images/my dash.sif"],
        python="/opt/bin/python",
        srun=["--mpi=pmix"],
        scratch="/local/$USER",
        restarts=7,
    )
    script = dry_run(capsys, *CONFIG, *SIZE, *TIME, *site, f"run_dir={tmp_path / 'run'}")
    assert {"--partition=gpu", "--gres=gpu:h100:8", "--cpus-per-task=12", "--signal=USR1@600"} <= set(
        options_of(script)
    )
    for line in (
        "MAX_RESTARTS=7",
        "SCRATCH='/local/$USER'",
        f"TRAIN=(apptainer exec --nv '/images/my dash.sif' /opt/bin/python {ROOT / 'train.py'})",
        "SRUN_OPTIONS=(--cpus-per-task=12 --mpi=pmix)",
        "    module load cuda/12 || return",
        "    export NCCL_SOCKET_IFNAME=ib0",
        "    export NCCL_IB_TIMEOUT=22",
        "    export WHERE=$(hostname)",
    ):
        assert line in script.splitlines()


def test_a_site_that_cannot_be_prepared_is_given_up_at_the_first_start_and_queued_again_at_later_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    site = site_file(tmp_path, setup="return 1")
    script = dry_run(capsys, *CONFIG, *SIZE, *TIME, *site, f"run_dir={tmp_path / 'run'}")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    paths = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    for restart in ("0", "1"):
        variables = paths | {"SLURM_RESTART_COUNT": restart}
        subprocess.run(["bash"], input=script, text=True, env=variables, timeout=30)
    events = [line.split("\t")[2:4] for line in (tmp_path / "run/slurm/events.tsv").read_text().splitlines()]
    assert events == [["0", "stopped"], ["1", "requeued"]]
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_the_hand_editable_script_ends_like_the_submitted_one(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = (ROOT / "slurm/pretrain.sbatch").read_text()
    subprocess.run(["bash", "-n"], input=by_hand, text=True, check=True, timeout=30)
    script = dry_run(capsys, *CONFIG, *SIZE, *TIME)
    mark = "# ==== the job"
    assert script.partition(mark)[2] == by_hand.partition(mark)[2] != ""
    # what comes before is the same options, but for where the log goes
    names = {option.split("=")[0] for option in options_of(script)} - {"--chdir"}
    assert names == {option.split("=")[0] for option in options_of(by_hand)}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "SLURM_JOB_ID: is not set: start this script with sbatch"),
        (
            {"SLURM_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"},
            "CONFIGS[index]: has no entry for task 3 of the array",
        ),
    ],
    ids=["by-hand", "array"],
)
def test_the_script_says_what_it_lacks_before_it_makes_a_folder(
    tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    command = ["bash", str(ROOT / "slurm/pretrain.sbatch")]
    ended = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0", "--gpus-per-node", "8", *TIME], "--nodes 0 must be at least 1"),
        (["--nodes", "1", "--gpus-per-node", "-1", *TIME], "--gpus-per-node -1 must be at least 0"),
        (
            ["--nodes", "1", "--gpus-per-node", "0", "--processes-per-node", "0", *TIME],
            "--processes-per-node 0 must be at least 1",
        ),
        ([*SIZE, *TIME, "--processes-per-node", "4"], "--processes-per-node 4 must be left out with"),
        ([*SIZE, *TIME, "--at-once", "2"], "--at-once 2 must go with --array"),
        ([*SIZE, "--time", "a day"], "--time a day must be minutes, hours:minutes:seconds or days-hours"),
        ([*SIZE, "--time", "5"], "--time 5 must be longer than warning_seconds=300"),
        ([*SIZE, *TIME, "--job-name", "my run"], "--job-name 'my run' must be one word"),
        ([*SIZE, *TIME, "--dependency", "afterok:1\n#SBATCH"], "must be one word"),
        ([*SIZE, *TIME, "run_dir=runs/a b"], "run_dir=runs/a b"),
        ([*SIZE, *TIME, "run_dir=runs/%j"], "choose another"),
        ([*SIZE, *TIME, "training.micro_batch=7"], "training.global_batch"),
        ([*SIZE, *TIME, "optimizer.rate=1"], "optimizer.rate"),
        ([*SIZE, *TIME, "--site", "/no/such.yaml"], "--site /no/such.yaml cannot be read"),
    ],
)
def test_what_cannot_run_is_refused_with_field_value_and_rule(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*CONFIG, *arguments, "--dry-run"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.out == ""


def test_a_run_dir_of_imported_weights_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.yaml").touch()
    words = [*CONFIG, *SIZE, *TIME, "--dry-run", "--inputs-later", f"run_dir={tmp_path}"]
    assert submit.main(words) == 2
    assert capsys.readouterr() == (
        "",
        f"error: run_dir={tmp_path} is a folder of `convert from-hf`, from whose weights runs start; choose another run_dir\n",
    )


def test_configs_of_an_array_that_share_a_folder_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = config_of(tmp_path, "low")
    words = ["--array", config, config, "--nodes", "1", "--gpus-per-node", "0", *TIME, "--dry-run"]
    assert submit.main(words) == 2
    assert f"run_dir={tmp_path / 'low'} is that of several configs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"moduls": ["cuda"]}, "moduls is not a known key; known are sbatch"),
        ({"modules": "cuda"}, "modules='cuda': must be a list, such as"),
        ({"warning_seconds": 0}, "warning_seconds=0: Input should be greater than 0"),
        ({"bad_node_days": 10**9}, "bad_node_days=1000000000: Input should be less than or equal to 36500"),
        ({"restarts": -1}, "restarts=-1: Input should be greater than or equal to 0"),
        ({"sbatch": ["-p gpu"]}, "'-p gpu' must be a long option without spaces, such as --partition=gpu"),
        ({"sbatch": ["--time=3"]}, "'--time=3' must not be set here: submit.py sets --time"),
        ({"gpus": "--gres=gpu:8"}, "must be an option with {gpus} in it"),
        ({"environment": {"A-B": "1"}}, "must be names of variables"),
        (
            {"environment": {"NCCL_DEBUG": True}},
            "environment.NCCL_DEBUG=True: must be text; put it in quotes",
        ),
    ],
    ids=str,
)
def test_mistakes_in_a_site_file_are_named(
    keys: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert submit.main([*CONFIG, *SIZE, *TIME, *site_file(tmp_path, **keys), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_without_sbatch_the_script_is_kept_and_said_to_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    assert submit.main([*CONFIG, *SIZE, *TIME, "--inputs-later", f"run_dir={run}"]) == 2
    (script,) = (run / "slurm").glob("*.sbatch")
    error = capsys.readouterr().err
    assert (
        f"there is no sbatch on this machine; {script} is written: submit it where SLURM is, or train "
        in error
    )
    assert "`python train.py --config FILE`, of a study `study submit` without --slurm\n" in error
    (config,) = (run / "slurm").glob("*.yaml")
    assert yaml.safe_load(config.read_text())["run_dir"] == str(run)
    assert f"CONFIGS=({config})" in script.read_text()


def test_an_sbatch_that_knows_no_cluster_is_said_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "sbatch: error: fetch_config failed\\nsbatch: fatal: Could not establish a configuration source"
    program(tmp_path / "bin", "squeue", "")
    program(tmp_path / "bin", "sbatch", f"printf '{told}' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert submit.main([*CONFIG, *SIZE, *TIME, "--inputs-later", f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "knows no cluster here (sbatch: fatal: Could not establish a configuration source); " in error
    assert "`python train.py --config FILE`" in error
    assert "fetch_config" not in error


BUSY = 'echo "$0: error: Socket timed out on send/recv operation" >&2; exit 1'


def program(folder: Path, name: str, lines: str) -> None:
    """A stand-in for a program, which notes its calls in `<name>.calls` beside it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho >> {folder}/{name}.calls\n{lines}\n")
    (folder / name).chmod(0o755)


def calls(folder: Path, name: str) -> int:
    return len((folder / f"{name}.calls").read_text().splitlines())


def once_busy(folder: Path, name: str, lines: str) -> str:
    """Lines of a stand-in that gets no answer from the controller the first time."""
    return f"[ $(wc -l < {folder}/{name}.calls) -gt 1 ] || {{ {BUSY}; }}\n{lines}"


@pytest.mark.parametrize(
    ("lines", "busy", "answer", "times"),
    [
        ("echo 4 RUNNING", True, "4 RUNNING\n", 2),
        (BUSY, False, None, 4),
        ("echo no such option >&2; exit 1", False, None, 1),
    ],
    ids=["once busy", "always busy", "refused"],
)
def test_a_busy_controller_is_asked_again_and_a_refusal_is_taken(
    lines: str, busy: bool, answer: str | None, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "PAUSE_SECONDS", 0)
    program(tmp_path, "squeue", once_busy(tmp_path, "squeue", lines) if busy else lines)
    assert query.query_slurm(str(tmp_path / "squeue")) == answer
    assert calls(tmp_path, "squeue") == times


def test_an_sbatch_that_gets_no_answer_is_not_called_again_because_the_job_may_be_queued(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "squeue", "")
    program(tmp_path / "bin", "sbatch", BUSY)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    words = ["--inputs-later", f"run_dir={tmp_path / 'run'}"]
    assert submit.main([*CONFIG, *SIZE, *TIME, *words]) == 2
    error = capsys.readouterr().err
    assert "got no answer" in error
    assert "look with squeue before trying again" in error
    assert calls(tmp_path / "bin", "sbatch") == 1


@pytest.fixture
def submit_run(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`submit_run(*words)` submits a run whose data is there to a stand-in for SLURM; the exit code."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config))
    program(tmp_path / "bin", "squeue", "")
    program(tmp_path / "bin", "sbatch", "echo 7")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    size = ["--nodes", "1", "--gpus-per-node", "0", *TIME]
    return lambda *words: submit.main(["--config", str(config), *size, *words])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.tokenizer=no.model", "data.tokenizer=no.model (relative to "),
        ("data.train=[]", "data.train is empty; set it in the YAML"),
        ("data.train=[0.7 no/train]", "data.train: no/train.idx (relative to "),
        ("data.valid=[/no/valid]", "data.valid: /no/valid.idx does not exist; make it with"),
        (
            "model.vocab_size=128",
            "model.vocab_size=128 must be at least 320, the vocabulary of data.tokenizer=",
        ),
        ("data.valid=[0 a]", "data.valid gives a weight 0; it must be above 0"),
        (
            "data.train=[1 a, b]",
            "data.train gives weights to 1 of its 2 prefixes; give them to all or to none",
        ),
        ("data.seq_length=1048576", "must have at least data.seq_length + 1 = 1048577 for one row"),
        (
            "training.init_from=/no/run",
            "training.init_from=/no/run does not exist; name a run that has saved, a",
        ),
    ],
)
def test_a_run_whose_inputs_are_not_there_is_not_queued_unless_they_are_to_come(
    setting: str,
    message: str,
    submit_run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for words in [], ["--dry-run"]:
        assert submit_run(setting, *words) == 2
        out, error = capsys.readouterr()
        assert message in error
        assert out.startswith("#!/usr/bin/env bash\n") == bool(words)
    # which mends nothing of what is wrong
    assert ("--inputs-later" in error) == ("no.model" in setting or "no/" in setting)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "bin/sbatch.calls").exists()
    for words in (["--dependency", "afterok:6"], ["--inputs-later"]):
        assert submit_run(setting, *words) == 0
    assert calls(tmp_path / "bin", "sbatch") == 2


def test_a_machine_without_numpy_and_tokenizers_submits_what_it_need_not_look_at(tmp_path: Path) -> None:
    program(tmp_path / "bin", "squeue", "")
    program(tmp_path / "bin", "sbatch", "echo 7")
    light = "import sys; sys.modules['numpy'] = None; import submit; sys.exit(submit.main(sys.argv[1:]))"
    command = [sys.executable, "-c", light, *CONFIG, *SIZE, *TIME, f"run_dir={tmp_path / 'run'}"]
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'slurm'}:{ROOT}",
    }
    for words, code in (["--inputs-later"], 0), (["--dependency", "afterok:6"], 0), ([], 2):
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: import of numpy halted")
    assert done.stderr.endswith("; --inputs-later does without\n")


def test_initial_weights_are_of_the_same_model_and_a_run_that_resumes_needs_none(
    submit_run: Callable[..., int],
    tiny_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setting = f"training.init_from={tmp_path / 'start'}"
    checkpoint = tmp_path / "start/checkpoints/step_00000004"
    checkpoint.with_suffix(".partial").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000008.partial").mkdir(parents=True)
    assert submit_run(setting) == 2
    (tmp_path / "run/checkpoints/step_00000008").mkdir(parents=True)
    assert submit_run(setting) == 0
    sections = {"model": tiny_config["model"]}
    checkpoint.mkdir()
    (checkpoint / "checkpoint.json").write_text(json.dumps({"config": sections}))
    other = "model.rope_theta=5e5"
    told = f"error: model.rope_theta=500000.0 differs from 10000.0 in {setting}; set it to that; for longer"
    assert submit_run(setting, f"run_dir={tmp_path / 'other'}", other) == 2
    assert told in capsys.readouterr().err
    assert submit_run(setting, f"run_dir={tmp_path / 'other'}") == 0
    (tmp_path / "start/checkpoints").rename(tmp_path / "away")
    (tmp_path / "start/model.yaml").touch()
    assert submit_run(setting, f"run_dir={tmp_path / 'another'}") == 2
    assert "start/model.yaml is damaged" in capsys.readouterr().err
    (tmp_path / "start/model.yaml").write_text(yaml.safe_dump(sections))
    assert submit_run(setting, f"run_dir={tmp_path / 'another'}", other) == 2
    assert told in capsys.readouterr().err
    assert submit_run(setting, f"run_dir={tmp_path / 'another'}") == 0


@pytest.fixture
def play(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`play(code, said)` runs a job's script with an srun that ends like that; gives code, last event and requeues."""
    run, programs = tmp_path / "run", tmp_path / "bin"
    for name, lines in {
        "srun": 'printf "%b" "$SAID" >> "$DASH_EXIT_FILE"\nprintf "%b" "$SRUN" >&2\nexit "$CODE"',
        "squeue": "",
        "sleep": "",  # for what would have happened meanwhile
        "scontrol": f'if [ "$1" = requeue ]; then echo "$2" >> {tmp_path}/requeued; else echo node1; fi',
    }.items():
        program(programs, name, lines)
    script = dry_run(capsys, *CONFIG, *SIZE, *TIME, *site_file(tmp_path, restarts=2), f"run_dir={run}")

    def play(code: int, said: str = "", restart: int = 0, srun: str = "") -> tuple[int, list[str], int]:
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "5",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_RESTART_COUNT": str(restart),
            "CODE": str(code),
            "SAID": said,
            "SRUN": srun,
        }
        done = subprocess.run(["bash"], input=script, env=environment, text=True, cwd=tmp_path, timeout=60)
        event = (run / "slurm/events.tsv").read_text().splitlines()[-1].split("\t")
        requeued = tmp_path / "requeued"
        return done.returncode, event[3:], len(requeued.read_text().split()) if requeued.exists() else 0

    return play


@pytest.mark.parametrize(
    ("code", "said", "expected", "event", "reason", "requeues"),
    [
        (0, "", 0, "done", "newest checkpoint", 0),
        (2, "", 2, "stopped", "exit code 2", 0),
        (3, "3\\thalted: too many\\n", 3, "stopped", "halted: too many", 0),
        (75, "75\\tsaved\\n", 0, "requeued", "stopped as asked, and saved", 1),
        # the first to leave made srun kill the others, whose codes are higher
        (143, "75\\tsaved\\n", 0, "requeued", "stopped as asked, and saved", 1),
        (137, "2\\terror: wrong\\n2\\terror: wrong\\n", 2, "stopped", "error: wrong", 0),
        (143, "3\\thalted: too many\\n75\\tsaved\\n", 3, "stopped", "halted: too many", 0),
        (1, "", 0, "requeued", "a process failed with exit code 1", 1),
        (134, "", 0, "requeued", "a process failed with exit code 134", 1),
        (143, "1\\terror: disk full\\n", 0, "requeued", "error: disk full", 1),
    ],
)
def test_how_processes_end_decides_whether_the_job_is_queued_again(
    play: Any, code: int, said: str, expected: int, event: str, reason: str, requeues: int
) -> None:
    returned, (name, detail), times = play(code, said)
    assert (returned, name, times) == (expected, event, requeues)
    assert reason in detail
    assert detail.count("error: wrong") <= 1


def test_a_program_that_no_node_has_is_given_up_at_once_and_later_names_the_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, programs = tmp_path / "run", tmp_path / "bin"
    for name, lines in {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
        "squeue": "",
        "scontrol": "echo node1",
    }.items():
        program(programs, name, lines)
    site = site_file(tmp_path, container=["no-container", "exec"], scratch=str(tmp_path))
    script = dry_run(capsys, *CONFIG, *SIZE, *TIME, *site, f"run_dir={run}")
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node1", "SLURMD_NODENAME": "node1"}
    environment = {**os.environ, **job, "PATH": f"{programs}:{os.environ['PATH']}"}
    for restart, code, event in ("0", 2, "stopped"), ("1", 0, "requeued"):
        environment["SLURM_RESTART_COUNT"] = restart
        done = subprocess.run(["bash"], input=script, env=environment, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == code
        last = (run / "slurm/events.tsv").read_text().splitlines()[-1].split("\t")
        assert last[3:] == [event, "error: there is no program no-container on node1"]
    named = [line.split("\t")[1:] for line in (run / "slurm/bad_nodes.tsv").read_text().splitlines()]
    assert named == [["node1", "5", "there is no program no-container on node1"]]


def test_the_site_file_that_comes_with_it_says_what_holds_where_keys_are_left_out() -> None:
    assert load_site(ROOT / "slurm/site.yaml") == Site()


def test_of_a_process_that_says_nothing_the_history_has_what_srun_said_first_in_this_start(play: Any) -> None:
    later = "srun: Terminating StepId=5.0\\nsrun: error: node2: tasks 8-15: Terminated\\n"
    for restart, first in enumerate(
        ("srun: error: node3: task 17: Killed", "srun: error: Node failure on node4")
    ):
        _, (_, detail), _ = play(137, restart=restart, srun=f"{first}\\n{later}")
        assert detail.startswith(f"a process failed with exit code 137 ({first}); see ")
    assert play(137, restart=2)[1][1].startswith("a process failed with exit code 137; see ")


def test_faults_are_forgiven_with_every_newer_checkpoint_and_no_more_often_than_the_site_says(
    play: Any, tmp_path: Path
) -> None:
    assert [play(1, restart=restart)[1][0] for restart in range(3)] == ["requeued", "requeued", "stopped"]
    (tmp_path / "run/checkpoints/step_00000008").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000009.partial").mkdir()
    assert [play(1, restart=restart)[1][0] for restart in range(3, 6)] == ["requeued", "requeued", "stopped"]
    code, (_, detail), _ = play(1, restart=6)
    assert code == 1
    assert "started again 2 times without a newer checkpoint" in detail
    assert detail.endswith("; sbatch's --exclude=NODE leaves out a bad machine")


@pytest.mark.parametrize(
    ("answer", "event"),
    [
        ("echo the job of the other", "stopped"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "done"),
    ],
    ids=["running", "forgotten"],
)
def test_a_job_finds_another_of_its_run_though_the_controller_is_busy_at_first(
    answer: str, event: str, play: Any, tmp_path: Path
) -> None:
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/job").write_text("4\n")
    program(tmp_path / "bin", "squeue", once_busy(tmp_path / "bin", "squeue", answer))
    assert play(0)[1][0] == event
    assert calls(tmp_path / "bin", "squeue") == 2


def test_a_job_that_slurm_has_queued_again_by_itself_is_left_at_that(play: Any, tmp_path: Path) -> None:
    refusal = 'echo "Job is pending execution for job $2" >&2; exit 1'
    program(tmp_path / "bin", "scontrol", f'if [ "$1" = requeue ]; then {refusal}; else echo node1; fi')
    assert play(1)[1][0] == "requeued"
    # one for the names of the nodes
    assert calls(tmp_path / "bin", "scontrol") == 2


def test_a_process_tells_the_batch_script_why_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DASH_EXIT_FILE", str(tmp_path / "exit"))
    assert train.tell_end(ExitCode.CONFIG_ERROR, "error: a\nb") == ExitCode.CONFIG_ERROR
    assert train.tell_end(ExitCode.REQUEUE) == ExitCode.REQUEUE
    assert (tmp_path / "exit").read_text() == "2\terror: a b\n75\tstopped as asked, and saved\n"
    assert capsys.readouterr().err == "error: a\nb\n"
    monkeypatch.setenv("DASH_EXIT_FILE", str(tmp_path / "no" / "folder"))
    assert train.tell_end(ExitCode.HALTED, "halted") == ExitCode.HALTED
