"""Run checks one after another on all processes, with a time limit each, and agree on every outcome."""

from __future__ import annotations

import faulthandler
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dash_megatron.doctor.session import LostProcesses, Session, describe_error
from dash_megatron.exit_codes import tell_bad_machine

GRACE_SECONDS = 30.0
# of a thousand processes that fail, each in words of its own
_MAX_MESSAGES = 4

Status = Literal["ok", "failed", "skipped"]
Figure = float | int | str


@dataclass(frozen=True)
class Finding:
    """What one process finds in one check."""

    status: Status = "ok"
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Measured values by name; the unit, if any, is the name's last word."""
    message: str = ""
    """What is wrong and what to do; or why the check was skipped."""


@dataclass(frozen=True)
class Result:
    """What all processes together found in one check."""

    name: str
    status: Status
    figures: Mapping[str, Figure]
    message: str
    seconds: float
    """Time that the slowest process took."""

    def __str__(self) -> str:
        """The result as one line."""
        figures = ", ".join(_with_unit(name, value) for name, value in self.figures.items())
        text = "; ".join(part for part in (figures, self.message) if part)
        return f"{self.status:<8} {self.name:<10} {self.seconds:6.1f} s  {text}"


class Check(NamedTuple):
    """A check, its time limit, and how the findings of all processes become one."""

    name: str
    limit_seconds: float
    """A process that takes longer is ended."""
    run: Callable[[Session], Finding]
    """What one process does; it may communicate, and it may raise."""
    merge: Callable[[Sequence[Finding]], Finding]
    """All processes' findings, by rank, as one."""
    stops_others: bool = False
    """Whether its failure makes the checks after it meaningless."""
    of_one_machine: bool = False
    """Whether it needs no other machine, so that the scheduler is told of a machine that fails alone."""


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
        started = time.monotonic()
        try:
            skipped = Result(check.name, "skipped", {}, reason, 0.0)
            result = skipped if reason else _run_check(session, check)
        except LostProcesses as error:
            lost = True
            text = f"not every process came through: {error}; look into the log of those that did not"
            result = Result(check.name, "failed", {}, text, time.monotonic() - started)
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
        finding = Finding("failed", {}, describe_error(error))
    finally:
        faulthandler.cancel_dump_traceback_later()
    if check.of_one_machine and finding.status == "failed":
        tell_bad_machine(f"{check.name}: {finding.message}")
    seconds = time.monotonic() - started
    gathered = session.gather((finding, seconds), wait_seconds=check.limit_seconds)
    merged = check.merge([found for found, _ in gathered])
    slowest = max(taken for _, taken in gathered)
    return Result(check.name, merged.status, merged.figures, merged.message, slowest)


def merge_largest(findings: Sequence[Finding]) -> Finding:
    """Merge findings: failed if one process failed; numbers are the largest of all processes, texts those of the first."""
    return _merge(findings, max)


def merge_smallest(findings: Sequence[Finding]) -> Finding:
    """As `merge_largest`, with the smallest numbers, and the rank that has the smallest rate ("/s")."""
    merged = _merge(findings, min)
    figures = dict(merged.figures)
    if len(findings) > 1:
        for name in [name for name in figures if name.endswith("/s")]:
            slowest = [finding.figures.get(name) for finding in findings].index(figures[name])
            # it takes the rate's place, so that order stays
            figures = {
                (f"{key} on rank {slowest}" if key == name else key): value for key, value in figures.items()
            }
    return Finding(merged.status, figures, merged.message)


def merge_equal(findings: Sequence[Finding]) -> Finding:
    """Merge findings: failed if one process failed or has another figure than most; the message names the ranks."""
    merged = _merge(findings, max)
    figures: dict[str, Figure] = {}
    different = []
    for name in merged.figures:
        values = [finding.figures.get(name, "nothing") for finding in findings]
        # of two that are as common, the one of the lower rank
        usual = Counter(values).most_common(1)[0][0]
        figures[name] = usual
        if values.count(usual) < len(values):
            who = {value: rank_list(r for r, v in enumerate(values) if v == value) for value in values}
            different.append(
                f"{name} is " + ", but ".join(f"{value} on rank {ranks}" for value, ranks in who.items())
            )
    if different:
        different.append("start all processes from one environment, one checkout and one config")
    message = "; ".join(part for part in [merged.message, *different] if part)
    return Finding("failed" if different else merged.status, figures, message)


def _merge(findings: Sequence[Finding], pick: Callable[[list[Figure]], Figure]) -> Finding:
    statuses = [finding.status for finding in findings]
    status: Status = "failed" if "failed" in statuses else statuses[0]
    messages: dict[str, list[int]] = {}
    for rank, finding in enumerate(findings):
        # where one failed, why others skipped the check is beside the point
        if finding.message and (finding.status == "failed" or status != "failed"):
            messages.setdefault(finding.message, []).append(rank)
    told = [
        text if len(ranks) == len(findings) else f"rank {rank_list(ranks)}: {text}"
        for text, ranks in messages.items()
    ]
    if len(told) > _MAX_MESSAGES:
        others = [rank for ranks in list(messages.values())[_MAX_MESSAGES:] for rank in ranks]
        told[_MAX_MESSAGES:] = [f"rank {rank_list(others)}: the like"]
    figures: dict[str, Figure] = {}
    for name in {name: None for finding in findings for name in finding.figures}:
        values = [finding.figures[name] for finding in findings if name in finding.figures]
        # NaN is the worst of all values
        nan = [value for value in values if value != value]
        figures[name] = values[0] if isinstance(values[0], str) else (nan or [pick(values)])[0]
    return Finding(status, figures, "; ".join(told))


def rank_list(ranks: Iterable[int]) -> str:
    """Ranks as people write them: `0-2, 5`."""
    runs = itertools.groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    ends = [[rank for _, rank in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def _with_unit(name: str, value: Figure) -> str:
    """Put a value before its unit: `write 1.2 GB/s on rank 3` for the name "write GB/s on rank 3"."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    words = name.split(" ")
    place = next((index for index, word in enumerate(words) if word in ("GB/s", "GiB")), len(words))
    return " ".join([*words[:place], text, *words[place:]])
