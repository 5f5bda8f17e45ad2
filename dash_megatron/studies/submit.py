"""`study submit`: train the runs of studies, here, a number of them at once, or as an array of SLURM jobs."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_megatron.config import Config, config_from_dict
from dash_megatron.evaluation.cli import check_arguments
from dash_megatron.exit_codes import ExitCode
from dash_megatron.files import write_whole
from dash_megatron.studies.runs import StudyRun, expand
from dash_megatron.studies.study_file import Study, StudyError, load_study

ROOT = Path(__file__).resolve().parents[2]
# beside the results of an evaluation, what it was asked for
ARGUMENTS = "arguments.txt"
EVALUATE = (sys.executable, "-m", "dash_megatron", "evaluate")
_NOT_AGAIN = {ExitCode.CONFIG_ERROR: "its config or machine is wrong", ExitCode.HALTED: "it halted itself"}


def is_finished(run: StudyRun) -> bool:
    """Whether a run's last checkpoint is published: a run saves after its last step, whatever the config says."""
    return (run.folder / "checkpoints" / f"step_{run.config.training.steps:08d}").is_dir()


def submit_studies(
    paths: Sequence[str | Path],
    processes: int = 1,
    restarts: int = 2,
    slurm: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    only: Sequence[str] = (),
    at_once: int = 1,
) -> int:
    """Train what is not finished, and evaluate what the study says and is not evaluated.

    Args:
        paths: studies; all their runs wait in one queue, study after study.
        processes: of each run on this machine; more than one start under torchrun.
        restarts: starts of a run after faults, as `train.py`'s exit code tells them from errors.
        slurm: arguments for `slurm/submit.py`, which gets all runs as one array; None: on this machine.
        train: command that trains instead of this repository's `train.py`.
        only: patterns of names, such as `dash_25*`, or of `STUDY/NAME`, in the order in which their runs are trained; none:
            all runs.
        at_once: runs that train on this machine at the same time, on GPUs of their own as long as there are enough.

    Returns:
        0: all finished or submitted; 1: a run failed for good, the others went on; 75: asked to stop, and saved.

    Raises:
        ValueError: a wrong study, a run's folder that holds another run, or a submission already at work.
    """
    if processes < 1 or restarts < 0:
        raise StudyError(f"--processes {processes} must be at least 1, --restarts {restarts} at least 0")
    if at_once < 1:
        raise StudyError(f"--at-once {at_once} must be at least 1")
    if slurm is not None and at_once > 1:
        raise StudyError(
            f'--at-once {at_once} is for this machine; that of an array stands within --slurm="... --at-once {at_once}"'
        )
    studies = {Path(path).stem: load_study(path) for path in paths}
    if len(studies) < len(paths):
        raise StudyError(f"studies {', '.join(map(str, paths))} must have names of their own; rename a file")
    for study in studies.values():
        _check_evaluations(study)
    jobs = _chosen(
        {
            f"{name}/{run.name}": _Job(
                study, run, {} if slurm is not None else missing_evaluations(study, run)
            )
            for name, study in studies.items()
            for run in expand(study)
        },
        only,
    )
    for job in jobs:
        check_same(job.run)
        if slurm is None:
            job.run.config.accumulation_steps(processes)
    waiting = [job for job in jobs if job.evaluations or not is_finished(job.run)]
    print(
        f"{', '.join(map(str, paths))}: {len(jobs) - len(waiting)} of {len(jobs)} runs are finished",
        flush=True,
    )
    if not waiting:
        return 0
    with contextlib.ExitStack() as locks:
        for study in studies.values():
            locks.enter_context(_only_one(study))
        configs = [_write_config(job.study, job.run) for job in waiting]
        if slurm is not None:
            _check_array(waiting)
            if any(job.study.evaluate for job in waiting):
                print(
                    "an array does not evaluate: `study submit` here does, once its runs are trained",
                    flush=True,
                )
            return _submit_array(configs, slurm)
        command = list(train or _train_command(processes))
        local = _Local(command, restarts, _environments(at_once, processes))
        return local.run_all(list(zip(waiting, configs, strict=True)))


@dataclass(frozen=True)
class _Job:
    """What is left to do for a run."""

    study: Study
    run: StudyRun
    evaluations: dict[str, list[str]]
    """Commands by name."""

    @property
    def start(self) -> Path | None:
        """Folder of the weights that it begins with."""
        start = self.run.config.training.init_from
        return Path(start).resolve() if start else None


class _Queue:
    """Jobs in their order, but none before the run is done whose weights it begins with."""

    def __init__(self, jobs: list[_Job]) -> None:
        self._waiting = list(enumerate(jobs))
        self._unfinished = {job.run.folder.resolve() for job in jobs}
        self._at_work = 0
        self._changed = threading.Condition()

    def take(self) -> tuple[int, _Job] | None:
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

    def done(self, job: _Job) -> None:
        """A job ended, well or not."""
        with self._changed:
            self._unfinished.discard(job.run.folder.resolve())
            self._at_work -= 1
            self._changed.notify_all()


def _check_evaluations(study: Study) -> None:
    """Refuse arguments of evaluations that would be found wrong only once a run is trained."""
    for name, arguments in study.evaluate.items():
        try:
            check_arguments(shlex.split(arguments))
        except ValueError as error:
            raise StudyError(f"evaluate.{name}={arguments!r}: {error}") from error


def missing_evaluations(study: Study, run: StudyRun) -> dict[str, list[str]]:
    """Commands of the study's evaluations of a run that have no results yet, or those of other arguments, by name."""
    if not study.evaluate:
        return {}
    # imported late: it brings torch
    from dash_megatron.evaluation.runner import RESULTS

    commands = {}
    for name, arguments in study.evaluate.items():
        output = run.folder / "evaluation" / name
        told = output / ARGUMENTS
        # results without that file are of evaluations by hand
        changed = told.is_file() and told.read_text(encoding="utf-8") != arguments
        if changed or not (output / RESULTS).is_file():
            commands[name] = [*EVALUATE, str(run.folder), *shlex.split(arguments), "--output", str(output)]
    return commands


def _chosen(every: dict[str, _Job], only: Sequence[str]) -> list[_Job]:
    """The runs that patterns name, by `STUDY/NAME` or the name alone."""
    chosen: dict[str, _Job] = {}
    for pattern in only:
        found = {
            name: job
            for name, job in every.items()
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(job.run.name, pattern)
        }
        if not found:
            raise StudyError(f"--only {pattern} fits no run; `study plan` lists them: {', '.join(every)}")
        chosen |= {name: job for name, job in found.items() if name not in chosen}
    return list((chosen if only else every).values())


def check_same(run: StudyRun) -> None:
    """Refuse a folder in which another config was trained.

    Raises:
        ValueError: `config.yaml` there differs in what decides the result.
    """
    path = run.folder / "config.yaml"
    if not path.is_file():
        return
    try:
        old = config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise StudyError(f"{path} cannot be read ({error}); move {run.folder} away") from error
    for key, value in _result_keys(run.config).items():
        before = _result_keys(old)[key]
        if before != value:
            raise StudyError(
                f"{run.folder} was trained with {key}={before}, and the study now says {value}; restore the study, "
                "choose another `output`, or move that folder away"
            )


def _result_keys(config: Config) -> dict[str, Any]:
    """Settings by dotted key, but those that a run may change when it is started again."""
    sections = ("model", "attention", "data", "optimizer", "schedule", "training")
    free = {
        "data.num_workers",
        "data.cache_dir",
        "training.micro_batch",
        "training.recompute",
        "attention.backend",
    }
    tree = config.model_dump(mode="json", include=set(sections))
    flat = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    return {key: value for key, value in flat.items() if key not in free}


@contextlib.contextmanager
def _only_one(study: Study) -> Iterator[None]:
    folder = Path(study.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "submit.lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                f"another `study submit` is at work on output={study.output}; wait for it"
            ) from error
        yield


def _write_config(study: Study, run: StudyRun) -> Path:
    path = Path(study.output) / "configs" / f"{run.name}.yaml"
    write_whole(path, yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False), make_folder=True)
    return path


def _script(name: str) -> str:
    path = ROOT / name
    if not path.is_file():
        raise StudyError(
            f"{path} does not exist; run from an editable install of the repository (`make env`)"
        )
    return str(path)


def _check_array(jobs: list[_Job]) -> None:
    names = {job.run.folder.resolve(): job.run.name for job in jobs if not is_finished(job.run)}
    for job in jobs:
        if job.start in names:
            raise StudyError(
                f"{job.run.name} begins with the weights of {names[job.start]}, and an array does not order its runs; "
                "submit that one first, with --only"
            )


def _submit_array(configs: list[Path], arguments: Sequence[str]) -> int:
    """One array of all configs; `slurm/submit.py` prints the job, or says what is wrong, and gives the code."""
    command = [sys.executable, _script("slurm/submit.py"), *arguments, "--array", *map(str, configs)]
    return subprocess.run(command, timeout=900).returncode


def _train_command(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, _script("train.py")]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return [*launcher, _script("train.py")]


class _Local:
    """Runs on this machine, `at_once` at a time; what each prints goes to `<run_dir>/study.log`."""

    def __init__(self, command: list[str], restarts: int, environments: list[dict[str, str]]) -> None:
        self.command, self.restarts = command, restarts
        self._environments = environments
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stop: int | None = None

    def run_all(self, jobs: list[tuple[_Job, Path]]) -> int:
        """Train and evaluate each, with its config; 0, 1 or 75 as `submit_studies` says."""
        orders = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._pass_on) for number in orders}
        try:
            waiting = _Queue([job for job, _ in jobs])
            with ThreadPoolExecutor(len(self._environments)) as pool:
                places = [pool.submit(self._place, waiting, jobs, place) for place in self._environments]
                finished = {number for place in places for number in place.result()}
        finally:
            for order, handler in before.items():
                signal.signal(order, handler)
        if self._stop is not None:
            print("stopped as asked; `study submit` goes on from here", flush=True)
            return int(ExitCode.REQUEUE)
        failed = [job.run.name for number, (job, _) in enumerate(jobs) if number not in finished]
        if failed:
            print(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", flush=True)
        return 1 if failed else 0

    def _place(
        self, waiting: _Queue, jobs: list[tuple[_Job, Path]], environment: dict[str, str]
    ) -> list[int]:
        """Do one job after the other, in one environment; the places in the order of those that went well."""
        finished = []
        while (entry := waiting.take()) is not None:
            number, job = entry
            try:
                title = f"[{number + 1}/{len(jobs)}] {job.run.name}"
                if self._work(title, job, jobs[number][1], environment):
                    finished.append(number)
            finally:
                waiting.done(job)
        return finished

    def _work(self, title: str, job: _Job, config: Path, environment: dict[str, str]) -> bool:
        """Train and evaluate one run and say how it went; whether all is done."""
        if self._stop is not None:
            return False
        run = job.run
        started = time.monotonic()
        problem = None
        if not is_finished(run):
            print(f"{title}: {run.config.training.steps} steps", flush=True)
            problem = self._attempts(title, run, config, environment)
        for name, command in job.evaluations.items():
            if problem or self._stop is not None:
                break
            print(f"{title}: evaluation {name}", flush=True)
            code = self._call(command, run.folder, environment)
            problem = f"evaluation {name} ended with exit code {code}" if code else None
            if not code:
                write_whole(run.folder / "evaluation" / name / ARGUMENTS, job.study.evaluate[name])
        if self._stop is not None:
            return False
        took = f"finished in {time.monotonic() - started:.0f} s"
        print(
            f"{title}: " + (f"failed: {problem}; see {run.folder}/study.log" if problem else took), flush=True
        )
        return not problem

    def _attempts(self, title: str, run: StudyRun, config: Path, environment: dict[str, str]) -> str | None:
        """What went wrong; None: the run is finished, or everything stops."""
        for attempt in range(self.restarts + 1):
            code = self._start(run, config, environment)
            if self._stop is not None:
                return None
            if code == ExitCode.REQUEUE:  # somebody asked that process alone
                self._pass_on(signal.SIGTERM)
                return None
            if code == ExitCode.DONE:
                return None if is_finished(run) else "train.py ended well without its last checkpoint"
            if code in _NOT_AGAIN:
                return f"exit code {code}: {_NOT_AGAIN[ExitCode(code)]}"
            if attempt < self.restarts:
                print(f"{title}: exit code {code}: started again", flush=True)
        return f"exit code {code} in each of {self.restarts + 1} starts"

    def _start(self, run: StudyRun, config: Path, environment: dict[str, str]) -> int:
        """Train until the process ends; its exit code, under torchrun that of `train.py`."""
        run.folder.mkdir(parents=True, exist_ok=True)
        tell = run.folder / "study.exit"
        tell.unlink(missing_ok=True)
        command = [*self.command, "--config", str(config)]
        code = self._call(command, run.folder, {**environment, "DASH_EXIT_FILE": str(tell)})
        if code and tell.is_file():
            # torchrun gives 1 for everything
            codes = [int(line.split("\t")[0]) for line in tell.read_text().splitlines() if line[:1].isdigit()]
            return max(codes, default=code) if ExitCode.REQUEUE not in codes else int(ExitCode.REQUEUE)
        return code

    def _call(self, command: list[str], folder: Path, environment: dict[str, str]) -> int:
        """The exit code of a command; what it prints goes to the folder's `study.log`."""
        with open(folder / "study.log", "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            # a session of its own: Ctrl-C reaches it through `_pass_on`, once
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **environment},
            )
            self._processes.add(process)
            if self._stop is not None:  # asked before it was among them
                process.send_signal(self._stop)
            code = process.wait()
            self._processes.discard(process)
        return code

    def _pass_on(self, number: int, frame: object = None) -> None:
        self._stop = number
        for process in list(self._processes):
            process.send_signal(number)


def _environments(at_once: int, processes: int) -> list[dict[str, str]]:
    """Variables of each place in which a run trains: its GPUs, the next ones of this machine, and its CPU cores.

    Where places outnumber GPUs, they share them; a single place gets whatever there is.
    """
    if at_once == 1:
        return [{}]
    # imported late: `study submit --slurm` does without
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    threads = max(1, (os.cpu_count() or 1) // (at_once * processes))
    places = []
    for place in range(at_once):
        variables = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        if len(gpus) > processes:
            mine = [gpus[(place * processes + rank) % len(gpus)] for rank in range(processes)]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        places.append(variables)
    return places
