"""Machines that faults of a run named: a submission leaves out the newest, as the batch script does when it queues a job again."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from pathlib import Path

from query import query_slurm

FILE = "bad_nodes.tsv"
"""In `<run_dir>/slurm`, a line for each time: when, machine, job, reason."""
_EXCLUDE = "--exclude="


def read_bad_nodes(runs: Sequence[Path], nodes: int, days: int, excluded: Collection[str]) -> tuple[str, ...]:
    """Machines to leave out of a job of so many, newest first.

    Args:
        runs: folders of the job's runs.
        nodes: machines of the job, of which two in 16 are left out at most.
        days: how long a machine is left out.
        excluded: machines that are left out anyway, and stay so.
    """
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    first = since.strftime("%Y-%m-%dT%H:%M:%SZ")
    paths = [path for run in runs if (path := run / "slurm" / FILE).is_file()]
    # lines written by hand may have blanks for tabs, and a heading that begins with no time
    lines = [line.split() for path in paths for line in path.read_text(errors="replace").splitlines()]
    newest = sorted((line for line in lines if len(line) > 1 and first < line[0] < ":"), reverse=True)
    names = dict.fromkeys(line[1] for line in newest if line[1] not in excluded)
    return tuple(names)[: 2 * (-(-nodes // 16))]


def excluded_by(options: Sequence[str]) -> set[str]:
    """Machines that options of sbatch exclude."""
    text = ",".join(_exclusions(options))
    expanded = query_slurm("scontrol", "show", "hostnames", text) if "[" in text else None
    return set((expanded or text.replace(",", " ")).split())


def with_exclusions(options: Sequence[str], names: Sequence[str]) -> list[str]:
    """Options of sbatch, which takes `--exclude` once, with names added to it."""
    others = [option for option in options if not option.startswith(_EXCLUDE)]
    excluded = ",".join([*_exclusions(options), *names])
    return [*others, f"{_EXCLUDE}{excluded}"] if excluded else others


def _exclusions(options: Sequence[str]) -> list[str]:
    return [option.removeprefix(_EXCLUDE) for option in options if option.startswith(_EXCLUDE)]
