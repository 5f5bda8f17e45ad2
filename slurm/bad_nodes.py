"""Machines that faults of a run named: a submission leaves out the newest, as the batch script does when it queues a job again."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

FILE = "bad_nodes.tsv"
"""In `<run_dir>/slurm`, a line for each time: when, machine, job, reason."""


def read_bad_nodes(runs: Sequence[Path], nodes: int, days: int) -> tuple[str, ...]:
    """Machines to leave out of a job of so many, newest first.

    Args:
        runs: folders of the job's runs.
        nodes: machines of the job, of which two in 16 are left out at most.
        days: how long a machine is left out.
    """
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    first = since.strftime("%Y-%m-%dT%H:%M:%SZ")
    paths = [path for run in runs if (path := run / "slurm" / FILE).is_file()]
    lines = [line.split("\t") for path in paths for line in path.read_text().splitlines()]
    newest = sorted((line for line in lines if len(line) > 1 and line[0] > first), reverse=True)
    return tuple(dict.fromkeys(line[1] for line in newest))[: 2 * (-(-nodes // 16))]


def with_exclusions(options: Sequence[str], names: Sequence[str]) -> list[str]:
    """Options of sbatch, which takes `--exclude` once, with names added to it."""
    others = [option for option in options if not option.startswith("--exclude=")]
    lists = [option.removeprefix("--exclude=") for option in options if option not in others]
    excluded = ",".join([*lists, *names])
    return [*others, f"--exclude={excluded}"] if excluded else others
