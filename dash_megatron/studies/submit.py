"""`study submit`: train the runs of studies, here, a number of them at once, or as an array of SLURM jobs."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from dash_megatron.files import error_text, lock, write_whole
from dash_megatron.studies.jobs import (
    Job,
    check_inputs,
    check_same,
    in_waves,
    is_finished,
    jobs_of,
    select_jobs,
    with_bases,
)
from dash_megatron.studies.local import LocalRuns, environments, repository_script, train_command
from dash_megatron.studies.runs import check_samples, evaluations
from dash_megatron.studies.study_file import Study, StudyError, check_evaluations, load_study

# arguments of `slurm/submit.py` with which data need not be here when a run is submitted, or is looked for there
_LATER = ("--inputs-later", "--dependency", "--dry-run")


def submit_studies(
    paths: Sequence[str | Path],
    processes: int = 1,
    restarts: int = 2,
    slurm: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    only: Sequence[str] = (),
    at_once: int | None = 1,
) -> int:
    """Train what is not finished, and evaluate what the study says and is not evaluated.

    Args:
        paths: studies; all their runs wait in one queue, study after study.
        processes: of each run on this machine, see `train.py --processes`.
        restarts: starts of a run after faults, as `train.py`'s exit code tells them from errors.
        slurm: arguments for `slurm/submit.py`, which gets all runs as one array; None: on this machine.
        train: command that trains instead of this repository's `train.py`, and may read other data.
        only: patterns of names, such as `dash_25*`, or of `STUDY/NAME`, in the order in which their runs are trained; none:
            all runs. The bases of branches come along.
        at_once: runs that train on this machine at the same time, on GPUs of their own as long as there are enough; None: as
            many as there are GPUs for.

    Returns:
        0: all finished or submitted; 1: a run failed for good, the others went on; 75: asked to stop, and saved.

    Raises:
        ValueError: a wrong study, data that is not there, a run's folder that holds another run, or a submission already at work.
    """
    _check_numbers(processes, restarts, at_once, in_array=slurm is not None)
    studies = _read_studies(paths)
    jobs = _jobs(studies, only, processes, in_array=slurm is not None)
    waiting = [job for job in jobs if job.evaluations or not is_finished(job.run)]
    finished = len(jobs) - len(waiting)
    print(f"{', '.join(map(str, paths))}: {finished} of {len(jobs)} runs are finished", flush=True)
    if not waiting:
        return 0
    if train is None and not (slurm and any(word.startswith(_LATER) for word in slurm)):
        remedy = f'; with --slurm="... {_LATER[0]}" it need not be here yet' if slurm else ""
        check_inputs([job for job in waiting if not is_finished(job.run)], remedy)
        # once is enough
        slurm = [_LATER[0], *slurm] if slurm else slurm
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(_only_one(study)) for study in studies.values()]
        for job in waiting:
            text = yaml.safe_dump(job.run.config.model_dump(mode="json"), sort_keys=False)
            write_whole(job.config, text, make_folder=True)
        if slurm is not None:
            return _submit_arrays(waiting, slurm)
        command = list(train or train_command(processes))
        return LocalRuns(command, restarts, environments(at_once, processes), locks).run_all(waiting)


def _check_numbers(processes: int, restarts: int, at_once: int | None, in_array: bool) -> None:
    if processes < 1 or restarts < 0:
        raise StudyError(f"--processes {processes} must be at least 1, --restarts {restarts} at least 0")
    if at_once is not None and at_once < 1:
        raise StudyError(f"--at-once {at_once} must be at least 1, or `gpus`")
    if in_array and at_once != 1:
        raise StudyError(
            f"--at-once {at_once or 'gpus'} is for this machine; for an array write "
            f'--slurm="... --at-once {at_once or 8}"'
        )


def _read_studies(paths: Sequence[str | Path]) -> dict[str, Study]:
    """Studies by the name of their file, with evaluations whose arguments are right."""
    studies = {Path(path).stem: load_study(path) for path in paths}
    if len(studies) < len(paths):
        raise StudyError(f"studies {', '.join(map(str, paths))} must have names of their own; rename a file")
    if len({Path(study.output).resolve() for study in studies.values()}) < len(studies):
        told = ", ".join(f"{name} has {study.output}" for name, study in studies.items())
        raise StudyError(f"studies must have an `output` each: {told}; give one another folder")
    for study in studies.values():
        check_evaluations(study)
    return studies


def _jobs(studies: dict[str, Study], only: Sequence[str], processes: int, in_array: bool) -> list[Job]:
    """What `only` names of all runs; an array does not evaluate, and `slurm/submit.py` checks its processes itself."""
    every = {
        f"{name}/{job.run.name}": job
        for name, study in studies.items()
        for job in jobs_of(study, evaluate=not in_array)
    }
    jobs = with_bases(select_jobs(every, only), every.values())
    for job in jobs:
        check_same(job.run)
        if not in_array:
            job.run.config.accumulation_steps(processes)
    check_samples((job.study, job.run) for job in jobs if job.evaluations)
    return jobs


@contextlib.contextmanager
def _only_one(study: Study) -> Iterator[int]:
    """Holds a study's folder against other submissions; gives the open file that a run may hold too."""
    folder = Path(study.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "submit.lock", "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise StudyError(
            f"output={study.output} must be a folder to write to: {error_text(error)}; choose another"
        ) from error
    with file:
        held = StudyError(
            f"another `study submit` is at work on output={study.output}, or was killed and its runs are still saving; wait for it"
        )
        lock(file.fileno(), held)
        yield file.fileno()


def _submit_arrays(jobs: list[Job], arguments: Sequence[str]) -> int:
    """An array of the runs that begin with no other's weights, and one of each that waits for it.

    `slurm/submit.py` prints the job of each, or says what is wrong, and gives the code.
    """
    if any(evaluations(job.study, job.run) for job in jobs):
        print("an array does not evaluate: `study submit` here does, once its runs are trained", flush=True)
    script = [sys.executable, repository_script("slurm/submit.py"), *arguments]
    waves = [["--array", *(str(job.config) for job in wave)] for wave in in_waves(jobs)]
    # what is wrong with a later array is told before the first one is in the queue
    for array in waves[1:]:
        command = [*script, "--dry-run", "--dependency", "afterok:JOB", *array]
        checked = subprocess.run(command, timeout=900, stdout=subprocess.DEVNULL)
        if checked.returncode:
            return checked.returncode
    after: list[str] = []
    for array in waves:
        done = subprocess.run([*script, *after, *array], timeout=900, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            return done.returncode
        job_id = re.search(r"^job (\d+):", done.stdout, re.MULTILINE)
        # a dry run has none
        after = ["--dependency", f"afterok:{job_id.group(1) if job_id else 'JOB'}"]
    return 0
