"""Jobs on a real SLURM: what ends, what goes on by itself, and what does not start again."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import pytest
import yaml

from dash_megatron.__main__ import main
from tests.slurm.cluster import FRAIL, Cluster, wait_until
from tests.slurm.conftest import SECONDS, Study
from tests.training.test_resume import EXACT

STEPS = 40
# SLURM knows minutes, starts a requeued job seconds later, and machines may be slow
pytestmark = pytest.mark.timeout(900)


def exact(study: Study, name: str) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for line in study.metrics(name)]


@pytest.fixture(scope="session")
def limited(study: Study) -> str:
    """A job that has begun to train, and needs 2 minutes of the 2 it is then given: SLURM warns it before half of them are over.

    Its second start is slow enough to be found running.
    """
    site = study.write_site("limited", step_seconds=[3, 5])
    job = study.submit(site, "--config", study.write_config("limited"))
    study.wait_for_step("limited", 1)
    study.cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+2minutes")
    return job


@pytest.fixture(scope="session")
def jobs(study: Study, limited: str) -> dict[str, str]:
    """Ids of jobs that need nothing from the tests: most of their time they wait for SLURM to act."""
    # does not hear the warning, and then finds no GPU on its machine; only its third start, which is elsewhere, trains
    deaf = """
        case ${SLURM_RESTART_COUNT:-0} in
            0) trap "" USR1; sleep 1000 ;;
            1) unset CUDA_VISIBLE_DEVICES; export SLURM_GPUS_ON_NODE=8; exec "$@" ;;
            *) exec "$@" ;;
        esac
    """
    overrun = study.write_site("overrun", container=["sh", "-c", deaf, "deaf"], warning_seconds=1)
    failing = study.write_site("failing", container=["sh", "-c", "exit 9", "#"], restarts=1)
    # that the tokenizer has more is known on reading it, which may be left to the job
    wrong = study.write_config("wrong", model={"vocab_size": 64})
    return {
        "overrun": study.submit(overrun, "--config", study.write_config("overrun"), time="1", nodes=1),
        "failing": study.submit(failing, "--config", study.write_config("failing"), nodes=1),
        "whole": study.submit(study.write_site("whole"), "--config", study.write_config("whole")),
        "wrong": study.submit(study.write_site("wrong"), "--inputs-later", "--config", wrong),
    }


@pytest.fixture(scope="session")
def whole(study: Study, jobs: dict[str, str]) -> list[dict[str, Any]]:
    """Metrics of a run over both nodes that nothing interrupts."""
    study.wait_for_end("whole")
    return exact(study, "whole")


@pytest.fixture(scope="session")
def crashed(study: Study, cluster: Cluster, whole: list[dict[str, Any]]) -> dict[str, str]:
    """Ids of jobs of which a node has died while they trained: SLURM needs a while to notice."""
    jobs = {}
    # the one on two nodes keeps its batch script; that of the other dies, so only SLURM itself can queue it again
    for name, nodes in (("crash", 2), ("alone", 1)):
        site = study.write_site(name, step_seconds=[1], sbatch=[])
        jobs[name] = study.submit(site, "--config", study.write_config(name), nodes=nodes)
    for name in jobs:
        study.wait_for_step(name, 7)
    cluster.crash_node(FRAIL)
    return jobs


def test_a_job_trains_over_both_nodes_to_its_end(study: Study, whole: list[dict[str, Any]]) -> None:
    assert study.names("whole") == ["submitted", "started", "done"], study.log("whole", "**/*")
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
    assert "2 process(es) on cpu: 2 data" in study.log("whole", "*.0/rank_00000.log")
    assert "node[1-2]" in study.events("whole")[1][1]
    run = study.folder / "runs" / "whole"
    assert len(list(run.glob("logs/*.0/rank_0000[01].log"))) == 2
    assert len(list(run.glob("slurm/*.sbatch"))) == len(list(run.glob("slurm/*.yaml"))) == 1
    for cache in ("triton", "inductor"):
        assert (study.folder / "scratch" / f"{cache}-{os.getuid()}").is_dir()


def test_a_config_error_at_run_time_fails_once_and_says_why(study: Study, jobs: dict[str, str]) -> None:
    study.wait_for_end("wrong")
    assert study.names("wrong") == ["submitted", "started", "stopped"]
    assert "model.vocab_size=64 must be at least 320" in study.events("wrong")[-1][1]
    assert "model.vocab_size=64 must be at least 320" in study.log("wrong", "job_*.log")
    assert wait_until(lambda: study.cluster.job(jobs["wrong"])["JobState"] == "FAILED", SECONDS)
    assert study.cluster.job(jobs["wrong"])["Restarts"] == "0"


def test_a_job_that_fails_without_progress_is_not_started_for_ever(
    study: Study, jobs: dict[str, str]
) -> None:
    study.wait_for_end("failing")
    assert study.names("failing") == ["submitted", "started", "requeued", "started", "stopped"]
    assert "exit code 9" in study.events("failing")[-1][1]
    assert "started again 1 times without a newer checkpoint" in study.events("failing")[-1][1]
    assert wait_until(lambda: study.cluster.job(jobs["failing"])["JobState"] == "FAILED", SECONDS)


def test_a_job_at_its_time_limit_and_a_requeued_one_save_and_go_on_bit_for_bit(
    study: Study, limited: str, whole: list[dict[str, Any]]
) -> None:
    warned = ["submitted", "started", "requeued", "started"]
    assert wait_until(lambda: study.names("limited") == warned, SECONDS)
    assert "stopped as asked, and saved" in study.events("limited")[2][1]
    assert "SIGUSR1: finishing the step" in study.log("limited", "*.0/rank_00000.log")
    refused = study.call("submit.py", "--config", study.folder / "configs" / "limited.yaml", "--nodes", 1,
                         "--gpus-per-node", 0, "--time", 10)  # fmt: skip
    assert refused.returncode == 2
    assert f"is that of job {limited}" in refused.stderr
    # not close to a regular checkpoint
    reached = next(step for step in itertools.count(study.newest_checkpoint("limited") + 2) if step % 5 == 2)
    study.wait_for_step("limited", reached)
    assert "resuming after step" in study.log("limited", "*.1/rank_00000.log")
    study.cluster.run("scontrol", "requeue", limited)
    study.wait_for_end("limited")
    assert study.names("limited") == [*warned, "ended", "started", "done"]
    assert "SIGTERM: finishing the step" in study.log("limited", "*.1/rank_00000.log")
    # on SIGTERM it saved the step it was in, rather than losing those since the last regular checkpoint
    saved = int(study.events("limited")[5][1].rpartition(" ")[2])
    assert saved >= reached
    assert f"resuming after step {saved}" in study.log("limited", "*.2/rank_00000.log")
    assert study.cluster.job(limited)["Restarts"] == "2"
    assert exact(study, "limited") == whole


def test_a_study_is_an_array_whose_tasks_are_requeued_and_cancelled_one_by_one(
    study: Study,
    crashed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rates = {"low": 1e-3, "cancelled": 5e-3, "high": 1e-2}
    low, cancelled, high = names = [f"{point}-dash" for point in rates]
    tree = {
        "base": str(study.write_config("base")),
        "output": str(study.folder),
        "overrides": {"training.steps": 12},
        "points": [{"name": point, "optimizer.lr": rate} for point, rate in rates.items()],
    }
    (study.folder / "study.yaml").write_text(yaml.safe_dump(tree))
    machines = f"--site {study.write_site('array', step_seconds=[1])} --nodes 1 --gpus-per-node 0 --time 60"
    submit = ["study", "submit", str(study.folder / "study.yaml"), f"--slurm={machines}"]
    monkeypatch.chdir(study.folder)
    for name, value in study.cluster.environment.items():
        monkeypatch.setenv(name, value)
    assert main(submit) == 0
    job = re.findall(r"^job (\d+):", capfd.readouterr().out, re.MULTILINE)[0]
    study.wait_for_step(high, 3)
    study.wait_for_step(cancelled, 3)
    # the last task: its job id is also that of the whole array
    study.cluster.run("scancel", "--signal=USR1", f"{job}_2")
    study.cluster.run("scancel", f"{job}_1")
    for name, rate in zip((low, high), (rates["low"], rates["high"]), strict=True):
        study.wait_for_end(name)
        assert study.metrics(name)[-1]["step"] == 12
        assert study.metrics(name)[0]["lr"] == pytest.approx(rate, rel=0.01)
    assert study.names(low) == ["submitted", "started", "done"]
    assert study.names(high) == ["submitted", "started", "requeued", "started", "done"]
    assert study.names(cancelled) == ["submitted", "started", "ended"]
    assert study.metrics(cancelled)[-1]["step"] == study.newest_checkpoint(cancelled)
    # the next submission is of what is left
    assert main([*submit[:-1], f"--slurm={machines} --dry-run"]) == 0
    script = capfd.readouterr().out
    assert "2 of 3 runs are finished" in script
    assert [name in script for name in names] == [False, True, False]

    lines = {line[0]: line for line in map(str.split, study.call("status.py").stdout.splitlines())}
    assert lines[f"runs/{high}"][1:4] == [f"{job}_2", "DONE", "12/12"]
    assert lines[f"runs/{high}"][-1] == "1"
    assert lines[f"runs/{cancelled}"][2] == "CANCELLED"
    assert lines["runs/limited"][2] in ("RUNNING", "PENDING", "DONE")


def test_jobs_survive_the_death_of_a_node_and_go_on_bit_for_bit(
    study: Study, cluster: Cluster, crashed: dict[str, str], whole: list[dict[str, Any]]
) -> None:
    for name, job in crashed.items():
        study.wait_for_end(name)
        assert study.names(name)[-2:] == ["started", "done"]
        starts = [detail for event, detail in study.events(name) if event == "started"]
        nodes = [start.partition(", newest")[0] for start in starts]
        assert FRAIL[-1] in nodes[0], nodes
        assert FRAIL[-1] not in nodes[-1], nodes
        assert int(cluster.job(job)["Restarts"]) >= 1
        assert "resuming after step" in study.log(name, "*.[1-9]/rank_00000.log")
        assert study.metrics(name)[-1]["step"] == STEPS
    assert "down" in str(cluster.states())
    assert study.names("alone") == ["submitted", "started", "started", "done"]
    assert exact(study, "crash") == whole


def test_a_job_that_missed_the_warning_is_queued_again_at_its_time_limit_and_off_a_machine_that_lacks_something(
    study: Study, jobs: dict[str, str]
) -> None:
    study.wait_for_end("overrun")
    again = ["requeued", "started"]
    assert study.names("overrun") == [
        "submitted",
        "started",
        *again,
        "requeued",
        "excluded",
        "started",
        "done",
    ]
    events = [detail for _, detail in study.events("overrun")]
    assert "SLURM_GPUS_ON_NODE=8, but torch" in events[4]
    bad, good = (re.findall(r"^on (node\d), newest", events[start])[0] for start in (3, 6))
    # beside the one that the site file excludes
    assert events[5].startswith(f"{','.join(sorted([bad, FRAIL]))}; to take machines again, delete")
    assert good not in (bad, FRAIL)
    assert f"\t{bad}\t{jobs['overrun']}\t" in (study.folder / "runs/overrun/slurm/bad_nodes.tsv").read_text()
    assert "the time limit came before the run had saved" in study.events("overrun")[2][1]
