"""What a process finds in a check, and how the findings of all processes become one result."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "failed", "skipped"]
Figure = float | int | str


@dataclass(frozen=True)
class Finding:
    """One process's findings in one check."""

    status: Status = "ok"
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Measured values by name, units in the name."""
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
    """Of the slowest process."""
    limit_seconds: float
    """A process that takes longer is ended."""


def rank_list(ranks: Iterable[int]) -> str:
    """Ranks as people write them: `0-2, 5`."""
    runs = itertools.groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    ends = [[rank for _, rank in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def merge_largest(findings: Sequence[Finding]) -> Finding:
    """Failed where one process failed; numbers are the largest of all processes, texts those of the first."""
    return _merge(findings, largest=True)


def merge_smallest(findings: Sequence[Finding]) -> Finding:
    """As `merge_largest`, with the smallest numbers, and beside rates ("/s") the rank that has them."""
    merged = _merge(findings, largest=False)
    figures: dict[str, Figure] = {}
    for name, value in merged.figures.items():
        figures[name] = value
        if name.endswith("/s") and len(findings) > 1:
            values = [finding.figures.get(name) for finding in findings]
            figures[f"{name} slowest rank"] = values.index(value)
    return Finding(merged.status, figures, merged.message)


def merge_equal(findings: Sequence[Finding]) -> Finding:
    """Failed where one process failed, or has another figure than most; says which ranks have which."""
    merged = _merge(findings, largest=True)
    figures: dict[str, Figure] = {}
    different = []
    for name in {name: None for finding in findings for name in finding.figures}:
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


def _merge(findings: Sequence[Finding], largest: bool) -> Finding:
    statuses = [finding.status for finding in findings]
    status: Status = "failed" if "failed" in statuses else statuses[0]
    messages: dict[str, list[int]] = {}
    for rank, finding in enumerate(findings):
        # where one failed, why others skipped the check is beside the point
        if finding.message and (finding.status == "failed" or status != "failed"):
            messages.setdefault(finding.message, []).append(rank)
    everywhere = [list(range(len(findings)))]
    message = "; ".join(
        text if [ranks] == everywhere else f"rank {rank_list(ranks)}: {text}"
        for text, ranks in messages.items()
    )
    figures: dict[str, Figure] = {}
    for finding in findings:
        for name, value in finding.figures.items():
            known = figures.get(name, value)
            if isinstance(value, str) or isinstance(known, str):
                figures[name] = known
            else:
                # written so that a value that is no number wins
                keep = known >= value if largest else known <= value
                figures[name] = known if keep or known != known else value
    return Finding(status, figures, message)
