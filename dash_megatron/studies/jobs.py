"""What is left to do for the runs of a study, and the queue that gives it out."""

from __future__ import annotations

import fnmatch
import shlex
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dash_megatron.checkpoint.folder import check_start_of, run_and_step
from dash_megatron.config import config_of_stored_run, differences
from dash_megatron.data.blend import check_data_of
from dash_megatron.files import error_text
from dash_megatron.studies.runs import StudyRun, evaluations, expand
from dash_megatron.studies.study_file import Study, StudyError

# beside the results of an evaluation, what it was asked for
ARGUMENTS = "arguments.txt"
EVALUATE = (sys.executable, "-m", "dash_megatron", "evaluate")
_RESULT_SECTIONS = ("model.", "attention.", "data.", "optimizer.", "schedule.", "training.")
_FREE = (
    "data.num_workers",
    "data.cache_dir",
    "training.micro_batch",
    "training.recompute",
    "attention.backend",
)
"""What a run may change in these when it is started again."""


def is_finished(run: StudyRun) -> bool:
    """Whether a run's last checkpoint is published: a run saves after its last step, whatever the config says."""
    return (run.folder / "checkpoints" / f"step_{run.config.training.steps:08d}").is_dir()


def check_same(run: StudyRun) -> None:
    """Refuse a folder in which another config was trained.

    Raises:
        ValueError: `config.yaml` there differs in what decides the result.
    """
    path = run.folder / "config.yaml"
    if not path.is_file():
        return
    try:
        old = config_of_stored_run(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise StudyError(f"{path} cannot be read ({error}); move {run.folder} away") from error
    differing = [
        f"{key}={trained} (the study now says {wanted})"
        for key, trained, wanted in differences(old, run.config)
        if key.startswith(_RESULT_SECTIONS) and key not in _FREE
    ]
    if differing:
        raise StudyError(
            f"{run.folder} was trained with {', '.join(differing)}; restore the study, choose another `output`, or move "
            "that folder away"
        )


@dataclass(frozen=True)
class Job:
    """What is left to do for a run."""

    study: Study
    run: StudyRun
    evaluations: dict[str, list[str]]
    """Commands by name."""
    base: StudyRun | None = None
    """The run that a branch goes on from; None for other runs."""

    @property
    def config(self) -> Path:
        """File of the config that is trained."""
        return Path(self.study.output) / "configs" / f"{self.run.name}.yaml"

    @property
    def start(self) -> Path | None:
        """Folder of the run, or of the import, whose weights it begins with."""
        start = self.run.config.training.init_from
        return run_and_step(start)[0].resolve() if start else None


def check_inputs(jobs: Sequence[Job], remedy: str = "") -> None:
    """Refuse runs that would begin without what they read, before each of them finds it out by itself.

    Args:
        jobs: what is to be trained; runs that begin with weights of others among them are as they should be.
        remedy: what else helps where something is missing, for the end of the message.

    Raises:
        ValueError: tokenizer or data are missing, damaged, too short or do not belong together, or initial weights are missing.
    """
    made = {job.run.folder.resolve() for job in jobs}
    known = set()
    for job in jobs:
        config, data = job.run.config, job.run.config.data
        facts = (data.tokenizer, data.train, data.valid, data.seq_length, config.model.vocab_size)
        try:
            if facts not in known:
                check_data_of(config)
            known.add(facts)
            if job.start not in made:
                check_start_of(config)
        except (OSError, ValueError) as error:
            missing = remedy if isinstance(error, OSError) else ""
            raise StudyError(f"run {job.run.name}: {error_text(error)}{missing}") from error


class JobQueue:
    """Gives out jobs in order; one that starts from the weights of another run waits until that run is done."""

    def __init__(self, jobs: list[Job]) -> None:
        self.total = len(jobs)
        self._waiting = list(enumerate(jobs))
        self._unfinished = {job.run.folder.resolve() for job in jobs}
        self._at_work = 0
        self._changed = threading.Condition()

    def take(self) -> tuple[int, Job] | None:
        """The next job and its place in the order, once there is one; None: no more."""
        with self._changed:
            while self._waiting:
                ready = [entry for entry in self._waiting if entry[1].start not in self._unfinished]
                # runs that wait for each other say so themselves
                if ready or not self._at_work:
                    entry = (ready or self._waiting)[0]
                    self._waiting.remove(entry)
                    self._at_work += 1
                    return entry
                self._changed.wait()
            return None

    def done(self, job: Job) -> None:
        """A job ended, well or not."""
        with self._changed:
            self._unfinished.discard(job.run.folder.resolve())
            self._at_work -= 1
            self._changed.notify_all()


def missing_evaluations(study: Study, run: StudyRun) -> dict[str, list[str]]:
    """Commands of the study's evaluations of a run, by name: those without results, or with results of other arguments."""
    wanted = evaluations(study, run)
    if not wanted:
        return {}
    # imported late: it brings torch
    from dash_megatron.evaluation.runner import RESULTS

    commands = {}
    for name, arguments in wanted.items():
        output = run.folder / "evaluation" / name
        told = output / ARGUMENTS
        # results without that file are of evaluations by hand
        changed = told.is_file() and told.read_text(encoding="utf-8") != arguments
        if changed or not (output / RESULTS).is_file():
            commands[name] = [*EVALUATE, str(run.folder), *shlex.split(arguments), "--output", str(output)]
    return commands


def jobs_of(study: Study, evaluate: bool) -> list[Job]:
    """Every run of a study, with what is left to do; without the evaluations unless `evaluate`."""
    runs = expand(study)
    by_name = {run.name: run for run in runs}
    return [
        Job(study, run, missing_evaluations(study, run) if evaluate else {}, by_name.get(run.base or ""))
        for run in runs
    ]


def with_bases(jobs: list[Job], every: Iterable[Job]) -> list[Job]:
    """The jobs in order, with each base that is not trained yet put before the first of its branches."""
    of_run = {job.run.folder: job for job in every}
    taken = {job.run.folder for job in jobs}
    more = []
    for job in jobs:
        base_needed = job.base and not is_finished(job.run) and not is_finished(job.base)
        if job.base and base_needed and job.base.folder not in taken:
            taken.add(job.base.folder)
            more.append(of_run[job.base.folder])
        more.append(job)
    return more


def in_waves(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups, each of which begins with weights of runs of the groups before it.

    Raises:
        ValueError: runs wait for each other.
    """
    waves: list[list[Job]] = []
    waiting = list(jobs)
    while waiting:
        unfinished = {job.run.folder.resolve() for job in waiting if not is_finished(job.run)}
        ready = [job for job in waiting if job.start not in unfinished]
        if not ready:
            names = ", ".join(job.run.name for job in waiting)
            raise StudyError(
                f"{names} begin with each other's weights; let one of them begin with none (training.init_from)"
            )
        waves.append(ready)
        waiting = [job for job in waiting if job not in ready]
    return waves


def select_jobs(every: dict[str, Job], only: Sequence[str]) -> list[Job]:
    """The jobs whose runs patterns name, by `STUDY/NAME` or the name alone, in the order of the patterns; without any, all.

    Raises:
        ValueError: a pattern fits no run.
    """
    selected: dict[str, Job] = {}
    for pattern in only:
        found = {
            name: job
            for name, job in every.items()
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(job.run.name, pattern)
        }
        if not found:
            raise StudyError(f"--only {pattern} fits no run; `study plan` lists them: {', '.join(every)}")
        selected |= {name: job for name, job in found.items() if name not in selected}
    return list((selected if only else every).values())
