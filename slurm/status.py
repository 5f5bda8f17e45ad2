"""One line for each run: `python slurm/status.py [RUN_DIR ...]`, by default those in runs/, studies included.

Reads only what runs leave in their folders, and SLURM's queue where there is one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from query import query_slurm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dash_megatron.command_line import ending_with_reader

# states of jobs that will not run again; for some minutes the queue still shows them
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()  # noqa: SIM905
)
# below runs/, runs of studies are studies/STUDY/runs/RUN
LEVELS = 4
HEADER = (
    "run",
    "job",
    "state",
    "step",
    "loss",
    "tokens/s",
    "left",
    "logged ago",
    "last checkpoint",
    "restarts",
)


@dataclass(frozen=True)
class Event:
    """A line of `<run>/slurm/events.tsv`."""

    time: str
    job: str
    restart: str
    name: str
    detail: str


def find_runs(folders: list[Path], levels: int = LEVELS) -> list[Path]:
    """Those of the folders, and of the folders in them, that are runs."""
    found: list[Path] = []
    for folder in folders:
        if is_run(folder):
            found.append(folder)
        elif levels:
            found += find_runs(sorted(path for path in folder.iterdir() if path.is_dir()), levels - 1)
    return found


def is_run(folder: Path) -> bool:
    """Whether a run has started here, or has been submitted."""
    return (folder / "config.yaml").is_file() or (folder / "slurm" / "events.tsv").is_file()


def read_events(run: Path) -> list[Event]:
    """What batch scripts and the submitter wrote about a run."""
    path = run / "slurm" / "events.tsv"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [Event(*line.split("\t")) for line in lines if line.count("\t") == 4]


def read_queue() -> dict[str, tuple[str, str]]:
    """State and reason of every job that SLURM's queue shows; empty where there is no SLURM."""
    rows = _rows("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r")
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def state_in_accounting(job: str) -> str | None:
    """State of a job that has left the queue; None where SLURM keeps no accounts."""
    rows = _rows(
        "sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={job}"
    )
    return next((row[1].split()[0] for row in rows if row[0] == job and len(row) == 2), None)


def _rows(*command: str) -> list[list[str]]:
    return [line.split("|", 2) for line in (query_slurm(*command) or "").splitlines()]


def last_metrics(run: Path) -> dict[str, Any]:
    """The last whole line of `metrics.jsonl` that tells of a step; empty where there is none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as file:  # of a run of weeks, only the end
        file.seek(max(0, path.stat().st_size - (1 << 18)))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
        except ValueError:  # cut short by a kill, or at the front of what was read
            continue
        if isinstance(metrics, dict) and {"step", "loss"} <= metrics.keys():
            return metrics
    return {}


def logged_at(run: Path) -> float | None:
    """When the last step was logged: of a run that hangs, long ago."""
    try:
        return (run / "metrics.jsonl").stat().st_mtime
    except FileNotFoundError:
        return None


def planned(run: Path) -> tuple[int, int] | None:
    """`training.steps`, and the tokens of a step, of the resolved config, or of the newest submitted one before a run has started."""
    for path in [run / "config.yaml", *sorted((run / "slurm").glob("*.yaml"), reverse=True)]:
        try:
            tree = yaml.safe_load(path.read_text())
            training = tree["training"]
            return int(training["steps"]), int(training["global_batch"]) * int(tree["data"]["seq_length"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            continue
    return None


def newest_checkpoint(run: Path) -> tuple[int, float] | None:
    """Step and time of the newest published checkpoint."""
    folder = run / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match:
            try:
                found.append((int(match.group(1)), path.stat().st_mtime))
            except FileNotFoundError:  # deleted meanwhile, as an old one
                continue
    return max(found, default=None)


def seconds_left(metrics: dict[str, Any], plan: tuple[int, int] | None) -> float | None:
    """Time to the last step at the speed of the last logged one; steps before a resume may have had other batches."""
    step, speed = metrics.get("step"), metrics.get("tokens_per_second")
    if not (step and speed and plan):
        return None
    steps, tokens_per_step = plan
    return float(max(0, steps - step) * tokens_per_step / speed)


def describe_state(events: list[Event], queue: dict[str, tuple[str, str]]) -> tuple[str, str, str]:
    """Job, its state, and why: of the queue while it is waiting or running, else what the run's script last wrote."""
    if not events:
        return "-", "-", ""
    for job in dict.fromkeys(event.job for event in reversed(events)):
        state, reason = queue.get(job, ("COMPLETED", ""))
        if state not in ENDED:
            return job, state, reason if state == "PENDING" else ""
    last = events[-1]
    if last.name in ("done", "stopped"):
        return last.job, last.name.upper(), last.detail if last.name == "stopped" else ""
    # it was queued or running when somebody last wrote
    ended = queue[last.job][0] if last.job in queue else state_in_accounting(last.job)
    return last.job, ended or "GONE", ""


def row_of(run: Path, queue: dict[str, tuple[str, str]]) -> tuple[list[str], str]:
    """One run's cells, in the order of HEADER, and why it waits or stopped."""
    events, metrics, plan, saved = (
        read_events(run),
        last_metrics(run),
        planned(run),
        newest_checkpoint(run),
    )
    job, state, reason = describe_state(events, queue)
    starts = sum(event.name == "started" for event in events)
    step = metrics.get("step", saved[0] if saved else 0)
    cells = [
        str(run),
        job,
        state,
        f"{step}/{plan[0] if plan else '?'}",
        f"{metrics['loss']:.4f}" if metrics.get("loss") is not None else "-",
        f"{metrics['tokens_per_second']:,.0f}" if metrics.get("tokens_per_second") else "-",
        _duration(seconds_left(metrics, plan)),
        _duration(time.time() - logged) if (logged := logged_at(run)) else "-",
        f"{saved[0]}, {_duration(time.time() - saved[1])} ago" if saved else "-",
        str(max(0, starts - 1)) if events else "-",
    ]
    return cells, reason


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(datetime.timedelta(seconds=round(max(0.0, seconds))))


@ending_with_reader()
def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 2 where a folder is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="default: those in runs/")
    folders = parser.parse_args(arguments).runs or [Path("runs")]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        print(f"error: {', '.join(missing)}: no such folder; name the folders of runs", file=sys.stderr)
    present = [folder for folder in folders if folder.is_dir()]
    if present:
        print_table(present)
    return 2 if missing else 0


def print_table(folders: list[Path]) -> None:
    """Print the lines of the runs in some folders."""
    runs, queue = find_runs(folders), read_queue()
    if not runs:
        print(f"no runs in {', '.join(map(str, folders))}")
        return
    rows = [row_of(run, queue) for run in runs]
    table = [list(HEADER), *[cells for cells, _ in rows]]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(HEADER))]
    for cells, reason in [(table[0], ""), *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{line}  {reason}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
