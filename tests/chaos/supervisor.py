"""Runs a small model under faults as a scheduler would: start, wait, kill what is left, start again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dash_megatron.exit_codes import ExitCode
from tests.chaos.faults import EVERY, LAYOUTS, RANKS, STEPS, Fault, harm_checkpoint, harm_data, install
from tests.tiny import FORKED_WITH

SECONDS_PER_START = 180.0
MOST_STARTS = 6
HANG_MINUTES = 0.25
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(FORKED_WITH)

# what a line of metrics.jsonl says of training rather than of the clock
EXACT = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "density_per_layer",
    "chunks_selected_per_layer",
    "skipped",
)


@dataclass
class Outcome:
    """What became of a run."""

    fault: Fault | None
    starts: int = 0
    codes: list[list[int]] = field(default_factory=list)
    """Exit codes of every start, by rank; negative: killed by that signal."""
    lost_steps: int = 0
    """Most steps that a start had to do again."""
    problems: list[str] = field(default_factory=list)
    """Why this is not what it should be; empty: all is well."""
    seconds: float = 0.0
    noticed: str = ""
    """What the run said of a damaged file."""


def train_process(config: str, log: str, environment: dict[str, str], place: str, step: int) -> None:
    """Entry of one rank: train.py, with a place to die at."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.argv = ["train.py", "--config", config]
    if place:
        install(place, step)
    import train

    code = 1
    try:
        code = train.main()
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


class Supervisor:
    """One run in a folder of its own."""

    def __init__(self, tree: dict[str, Any], folder: Path, fault: Fault | None) -> None:
        self.folder, self.fault = folder, fault
        self.run = Path(tree["run_dir"])
        self.prefix = Path(tree["data"]["train"][0])
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self.outcome = Outcome(fault)
        self.generator = random.Random(fault.seed if fault else 0)

    def to_the_end(self) -> Outcome:
        """Start until the run is done, or is not to be started again."""
        begin = time.monotonic()
        while self.outcome.starts < MOST_STARTS:
            codes = self.start()
            self.outcome.codes.append(codes)
            if not any(codes):
                break
            if self.stopped_for_good(codes):
                break
            self.between_starts()
        else:
            self.outcome.problems.append(f"not done after {MOST_STARTS} starts: {self.outcome.codes}")
        self.outcome.seconds = time.monotonic() - begin
        return self.outcome

    def stopped_for_good(self, codes: list[int]) -> bool:
        """Whether a scheduler would give up; a corrupted data file must make it so, and is then restored."""
        if not {ExitCode.CONFIG_ERROR, ExitCode.HALTED} & set(codes):
            return False
        if self.fault is not None and self.fault.family[0] == "data" and not self.outcome.noticed:
            log = self.logs(self.outcome.starts - 1)
            named = self.prefix.name in log and "error:" in log
            self.outcome.noticed = next((line for line in log.splitlines() if line.startswith("error:")), "")
            if not named:
                self.outcome.problems.append("the corrupted data file was not named")
            self.restore_data()
            return False
        self.outcome.problems.append(f"gave up: {codes}\n{self.logs(self.outcome.starts - 1)[-2000:]}")
        return True

    def start(self) -> list[int]:
        """All ranks once, to their end; gives their exit codes."""
        from torch.distributed import TCPStore

        number, fault = self.outcome.starts, self.fault
        self.outcome.starts += 1
        family, place = fault.family if fault else ("", "")
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        processes = []
        for rank in range(RANKS):
            # a load that dies is one after a crash
            armed = fault is not None and family == "place" and rank == fault.rank
            where = ""
            if armed:
                where = {0: "step" if place == "load" else place, 1: place if place == "load" else ""}.get(
                    number, ""
                )
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = str(self.folder / f"start_{number}_rank_{rank}.log")
            arguments = (str(self.config), log, environment, where, fault.step if fault else 0)
            processes.append(CONTEXT.Process(target=train_process, args=arguments))
        for process in processes:
            process.start()
        waiting = True
        deadline = time.monotonic() + SECONDS_PER_START
        while any(process.is_alive() for process in processes):
            if number == 0 and waiting and fault is not None and self.steps_logged() >= fault.step:
                waiting = False
                time.sleep(fault.seconds)
                self.strike(processes)
            if any(process.exitcode for process in processes):
                self.kill_rest(processes)
            if time.monotonic() > deadline:
                self.outcome.problems.append(f"start {number} hung: killed after {SECONDS_PER_START:.0f} s")
                self.kill_rest(processes, grace=0)
            time.sleep(0.01)
        return [process.exitcode or 0 for process in processes]

    def strike(self, processes: list[Any]) -> None:
        """Do the fault, where it comes from outside."""
        fault = self.fault
        assert fault is not None
        family, place = fault.family
        victim = processes[fault.rank]
        if family in ("kill", "damage", "data") and victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
        elif family == "signal":
            name, _, who = fault.detail.partition(" to ")
            for process in processes if who == "all" else [victim]:
                if process.is_alive():
                    os.kill(process.pid, signal.Signals[name])
        elif family == "delay" and victim.is_alive():
            os.kill(victim.pid, signal.SIGSTOP)
            if place == "short":
                time.sleep(1 + fault.seconds)
                os.kill(victim.pid, signal.SIGCONT)
        elif family == "disk":
            self.fill_disk()
            if place == "while":
                time.sleep(2 + fault.seconds)
                self.free_disk()

    def kill_rest(self, processes: list[Any], grace: float = 2.0) -> None:
        """As srun --kill-on-bad-exit: ask, then kill."""
        for number, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, 30.0)):
            for process in processes:
                if process.is_alive():
                    with contextlib.suppress(ProcessLookupError):  # it left by itself just now
                        os.kill(process.pid, number)
            deadline = time.monotonic() + wait
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                time.sleep(0.02)

    def between_starts(self) -> None:
        """Damage what a crash might have damaged, and see how much is lost."""
        done, published = self.steps_logged(), self.published()
        fault = self.fault
        first = self.outcome.starts == 1
        if fault is not None and first:
            family, _ = fault.family
            if family == "damage" and len(published) > 1:
                harm_checkpoint(self.checkpoints / f"step_{published[-1]:08d}", fault.detail, self.generator)
                published = published[:-1]
            elif family == "data":
                self.saved_data = {
                    path: path.read_bytes() for path in self.prefix.parent.glob(f"{self.prefix.name}.*")
                }
                harm_data(self.prefix, fault.detail)
            elif family == "disk":
                self.free_disk()
        self.outcome.lost_steps = max(self.outcome.lost_steps, done - (published[-1] if published else 0))

    def restore_data(self) -> None:
        for path, content in self.saved_data.items():
            path.write_bytes(content)

    def fill_disk(self) -> None:
        """Leave no byte free on the run's file system, a small tmpfs."""
        with contextlib.suppress(OSError), open(self.run / "filler", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 65536)
        with contextlib.suppress(OSError), open(self.run / "filler2", "wb", buffering=0) as file:
            while True:
                file.write(b"x")

    def free_disk(self) -> None:
        for name in ("filler", "filler2"):
            (self.run / name).unlink(missing_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def published(self) -> list[int]:
        """Steps of published checkpoints."""
        names = [path.name for path in self.checkpoints.glob("step_*")]
        return sorted(int(name.removeprefix("step_")) for name in names if "." not in name)

    def steps_logged(self) -> int:
        """Lines of metrics.jsonl, one a step."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def logs(self, number: int) -> str:
        """What all ranks of a start said."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"start_{number}_*.log")))


def tree_of(base: dict[str, Any], layout: str, run: Path) -> dict[str, Any]:
    """Config of a run that saves every few steps."""
    changed = {name: {**base.get(name, {}), **values} for name, values in LAYOUTS[layout].items()}
    tree = {**base, **changed, "run_dir": str(run)}
    tree["training"] = {**base["training"], **changed.get("training", {}), "steps": STEPS}
    tree["checkpoint"] = {"every": EVERY, "keep": 3, "retry_seconds": 20}
    tree["faults"] = {"hang_minutes": HANG_MINUTES}
    return tree


def exact_metrics(run: Path) -> list[dict[str, Any]]:
    """What must be equal, bit for bit."""
    from dash_megatron.training.metrics import read_metrics

    return [{key: line[key] for key in EXACT} for line in read_metrics(run)]


@contextlib.contextmanager
def small_disk(wanted: bool) -> Iterator[Path | None]:
    """A file system of 24 MB that can be filled; None where this user may not mount one."""
    with tempfile.TemporaryDirectory(prefix="chaos_disk_") as name:
        command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", name]
        mounted = wanted and subprocess.run(command, capture_output=True).returncode == 0
        try:
            yield Path(name) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "-l", name], check=True)


def suffer(base: dict[str, Any], fault: Fault, expected: list[dict[str, Any]], folder: Path) -> Outcome:
    """Run under a fault and compare with the run without."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with small_disk(fault.family[0] == "disk") as disk:
        if fault.family[0] == "disk" and disk is None:
            return Outcome(fault, problems=["skipped: may not mount a file system"])
        tree = tree_of(base, fault.layout, (disk or folder) / "run")
        if fault.family[0] == "data":
            tree["data"] = {**tree["data"], "train": [str(_own_data(tree, folder))]}
        supervisor = Supervisor(tree, folder, fault)
        outcome = supervisor.to_the_end()
        if not outcome.problems:
            check(outcome, supervisor, expected)
        if not outcome.problems and outcome.starts == 1 and fault.ends_a_start:
            outcome.problems.append("skipped: the run had ended before it struck")
    return outcome


def check(outcome: Outcome, supervisor: Supervisor, expected: list[dict[str, Any]]) -> None:
    """Add what is not as it should be."""
    found = exact_metrics(supervisor.run)
    if found != expected:
        steps = [one["step"] for one, other in zip(expected, found, strict=False) if one != other]
        outcome.problems.append(f"losses differ from the run without faults, first at step {steps[:1]}")
    # one interval, and what training did while a checkpoint was being written
    allowed = 2 * EVERY if outcome.fault and outcome.fault.family[0] != "damage" else 3 * EVERY
    if outcome.lost_steps > allowed:
        outcome.problems.append(f"{outcome.lost_steps} steps were lost")
    if supervisor.published()[-1:] != [STEPS]:
        outcome.problems.append(f"the last checkpoint is {supervisor.published()[-1:]}")


def _own_data(tree: dict[str, Any], folder: Path) -> Path:
    prefix = Path(tree["data"]["train"][0])
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        shutil.copy(path, folder / path.name)
    return folder / prefix.name


def without_faults(base: dict[str, Any], layout: str, folder: Path) -> list[dict[str, Any]]:
    """What a run without faults gives."""
    folder.mkdir(parents=True)
    supervisor = Supervisor(tree_of(base, layout, folder / "run"), folder, None)
    outcome = supervisor.to_the_end()
    if outcome.problems or outcome.starts > 1:
        raise RuntimeError(f"the run without faults failed: {outcome}\n{supervisor.logs(0)}")
    return exact_metrics(supervisor.run)
