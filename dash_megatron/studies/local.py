"""Runs of studies on this machine: a number of them at once, started again after faults, evaluated when they are trained."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dash_megatron.exit_codes import ExitCode
from dash_megatron.files import write_whole
from dash_megatron.launcher import end_with_parent
from dash_megatron.studies.jobs import ARGUMENTS, Job, JobQueue, is_finished
from dash_megatron.studies.runs import evaluations
from dash_megatron.studies.study_file import StudyError

ROOT = Path(__file__).resolve().parents[2]
_NOT_RESTARTED = {
    ExitCode.CONFIG_ERROR: "its config or machine is wrong",
    ExitCode.HALTED: "it halted itself",
}


def repository_script(name: str) -> str:
    """Path of a script of this repository.

    Raises:
        ValueError: the package is installed without it.
    """
    path = ROOT / name
    if not path.is_file():
        raise StudyError(
            f"{path} does not exist; run from an editable install of the repository (`make env`)"
        )
    return str(path)


def train_command(processes: int) -> list[str]:
    """The command that trains in so many processes, without its config."""
    several = ["--processes", str(processes)] if processes > 1 else []
    return [sys.executable, repository_script("train.py"), *several]


class LocalRuns:
    """Runs on this machine, one in each environment at a time; what each prints goes to `<run_dir>/study.log`.

    They are asked to stop when this process is killed, and hold `locks`, open files, for as long as that takes them.
    """

    def __init__(
        self,
        command: list[str],
        restarts: int,
        environments: list[dict[str, str]],
        locks: Sequence[int] = (),
    ) -> None:
        self.command, self.restarts, self.locks = command, restarts, locks
        self._environments = environments
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stop: int | None = None

    def run_all(self, jobs: list[Job]) -> int:
        """Train and evaluate each; 0, 1 or 75 as `submit_studies` says."""
        orders = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._pass_on) for number in orders}
        try:
            waiting = JobQueue(jobs)
            with ThreadPoolExecutor(len(self._environments)) as pool:
                places = [pool.submit(self._place, waiting, place) for place in self._environments]
                failed = sorted(number for place in places for number in place.result())
        finally:
            for order, handler in before.items():
                signal.signal(order, handler)
        if self._stop is not None:
            print("stopped as asked; `study submit` goes on from here", flush=True)
            return int(ExitCode.REQUEUE)
        if failed:
            names = ", ".join(jobs[number].run.name for number in failed)
            print(f"{len(failed)} of {len(jobs)} runs failed: {names}", flush=True)
        return 1 if failed else 0

    def _place(self, waiting: JobQueue, environment: dict[str, str]) -> list[int]:
        """Do one job after the other, in one environment; the places in the order of those that failed."""
        failed = []
        while (entry := waiting.take()) is not None:
            number, job = entry
            try:
                if not self._work(f"[{number + 1}/{waiting.total}] {job.run.name}", job, environment):
                    failed.append(number)
            finally:
                waiting.done(job)
        return failed

    def _work(self, title: str, job: Job, environment: dict[str, str]) -> bool:
        """Train and evaluate one run and say how it went; whether all is done."""
        if self._stop is not None:
            return False
        run = job.run
        started = time.monotonic()
        problem = None
        if not is_finished(run):
            print(f"{title}: {run.config.training.steps} steps", flush=True)
            if job.base and not is_finished(job.base):
                # from less than all steps of it, this would be another branch
                problem = f"its base {job.base.name} is not trained"
            else:
                problem = self._attempts(title, job, environment)
        for name, command in job.evaluations.items():
            if problem or self._stop is not None:
                break
            print(f"{title}: evaluation {name}", flush=True)
            code = self._call(command, run.folder, environment)
            problem = f"evaluation {name} ended with exit code {code}" if code else None
            if not code:
                asked = evaluations(job.study, run)[name]
                write_whole(run.folder / "evaluation" / name / ARGUMENTS, asked)
        if self._stop is not None:
            return False
        took = f"finished in {time.monotonic() - started:.0f} s"
        log = run.folder / "study.log"
        print(
            f"{title}: " + (f"failed: {problem}; see {log}{_last_error(log)}" if problem else took),
            flush=True,
        )
        return not problem

    def _attempts(self, title: str, job: Job, environment: dict[str, str]) -> str | None:
        """What went wrong; None: the run is finished, or everything stops."""
        run = job.run
        run.folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(self.restarts + 1):
            code = self._call([*self.command, "--config", str(job.config)], run.folder, environment)
            if self._stop is not None:
                return None
            if code == ExitCode.REQUEUE:  # somebody asked that process alone
                self._pass_on(signal.SIGTERM)
                return None
            if code == ExitCode.DONE:
                return None if is_finished(run) else "train.py ended well without its last checkpoint"
            if code in _NOT_RESTARTED:
                return f"exit code {code}: {_NOT_RESTARTED[ExitCode(code)]}"
            if attempt < self.restarts:
                print(f"{title}: exit code {code}: started again", flush=True)
        return f"exit code {code} in each of {self.restarts + 1} starts"

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
                preexec_fn=end_with_parent,
                pass_fds=self.locks,
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


def _last_error(log: Path) -> str:
    """What the last command in a log told of its error or halt, in brackets; nothing where it told none."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    errors = [
        line for line in text.rpartition("\n$ ")[2].splitlines() if line.startswith(("error: ", "halted: "))
    ]
    return f" ({errors[-1]})" if errors else ""


def environments(at_once: int | None, processes: int) -> list[dict[str, str]]:
    """Variables of each place in which a run trains: its GPUs, the next ones of this machine, and its CPU cores.

    Where places outnumber GPUs, they share them; a single place gets whatever there is. None makes as many places as this
    machine's GPUs are enough for.
    """
    if at_once == 1:
        return [{}]
    # imported late: only counting GPUs needs it
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if at_once is None:
        at_once = max(1, len(gpus) // processes)
        if at_once == 1:
            return [{}]
    threads = max(1, (os.cpu_count() or 1) // (at_once * processes))
    places = []
    for place in range(at_once):
        variables = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        if len(gpus) > processes:
            mine = [gpus[(place * processes + rank) % len(gpus)] for rank in range(processes)]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        places.append(variables)
    return places
