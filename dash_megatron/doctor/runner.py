"""Run checks one after another on all processes, with a time limit each, and agree on every outcome."""

from __future__ import annotations

import faulthandler
import functools
import json
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dash_megatron.doctor.findings import Figure, Finding, Result, merge_largest
from dash_megatron.doctor.session import LostProcesses, Session, describe

GRACE_SECONDS = 30.0

Merge = Callable[[Sequence[Finding]], Finding]


class Check(NamedTuple):
    """One thing to find out."""

    name: str
    limit_seconds: float
    run: Callable[[Session], Finding]
    """What one process does; it may communicate, and it may raise."""
    merge: Merge = merge_largest
    """All processes' findings, by rank, as one."""
    stops_others: bool = False
    """Whether its failure makes the checks after it meaningless."""


class Examination(NamedTuple):
    """The results of all checks."""

    results: list[Result]
    processes_lost: bool
    """Whether some process died or hung, so that the others cannot meet it any more."""


def run_checks(
    session: Session, checks: Sequence[Check], report: Callable[[Result], None] = lambda result: None
) -> Examination:
    """Run checks in order; results are the same on every process; collective.

    A check that raises on a process has failed, and the others are told when they are through with it. A process that
    exceeds a check's time limit is waited for no longer; it writes where it stands to standard error and ends.

    Args:
        session: this process.
        checks: what to run.
        report: called with every result as soon as it is known.

    Returns:
        The results. A check at which a process was lost has failed, and those after it are skipped.
    """
    results: list[Result] = []
    reason, lost = "", False
    for check in checks:
        try:
            if reason:
                result = Result(check.name, "skipped", {}, reason, 0.0, check.limit_seconds)
            else:
                result = _run_check(session, check)
        except LostProcesses as error:
            lost = True
            text = f"not every process came through: {error}; look into the log of those that did not"
            result = Result(check.name, "failed", {}, text, check.limit_seconds, check.limit_seconds)
        results.append(result)
        report(result)
        if lost:
            reason = f"a process was lost in {check.name}"
        elif check.stops_others and result.status == "failed":
            reason = f"means nothing before {check.name} succeeds"
    return Examination(results, lost)


def _run_check(session: Session, check: Check) -> Result:
    started = time.monotonic()
    # Nothing else ends a collective or a kernel that hangs. Late enough for rank 0 to report whom it misses, before
    # a launcher ends all processes because one has ended.
    late = check.limit_seconds + GRACE_SECONDS
    faulthandler.dump_traceback_later(late, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        finding = check.run(session)
    except LostProcesses:
        raise
    except Exception as error:
        finding = Finding("failed", {}, describe(error))
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - started
    gathered = session.gather((finding, seconds), wait_seconds=check.limit_seconds)
    merged = check.merge([found for found, _ in gathered])
    slowest = max(taken for _, taken in gathered)
    return Result(check.name, merged.status, merged.figures, merged.message, slowest, check.limit_seconds)


def result_lines(result: Result) -> str:
    """A result as a line and, under it, its figures and what it says, wrapped."""
    head = f"{result.name:<10} {result.status:<8} {result.seconds:7.1f} s of at most {result.limit_seconds:.0f} s"
    figures = "; ".join(f"{name} {_text(value)}" for name, value in result.figures.items())
    indented = {"width": 110, "initial_indent": "    ", "subsequent_indent": "    "}
    # paths and hashes stay whole, to be copied
    wrap = functools.partial(textwrap.fill, break_long_words=False, break_on_hyphens=False, **indented)
    return "\n".join([head, *(wrap(text) for text in (figures, result.message) if text)])


def write_json(path: str | Path, facts: dict[str, Any], results: Sequence[Result]) -> None:
    """Write results to a file, with facts about where they are from."""
    tree = {**facts, "checks": [asdict(result) for result in results]}
    Path(path).write_text(json.dumps(tree, indent=2) + "\n")


def _text(value: Figure) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
