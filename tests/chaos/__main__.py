"""`make chaos`: many seeded faults, each of which a run must survive as if it had not happened.

Prints a line a fault and writes the table of counts. Exit code 1 if a run did not survive.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos.faults import EVERY, KINDS, LAYOUTS, STEPS, draw
from tests.chaos.supervisor import Outcome, suffer, without_faults
from tests.tiny import make_tiny_data, tiny_tree


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=240, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first (default: %(default)s)")
    parser.add_argument("--kind", choices=list(KINDS), help="this kind only")
    parser.add_argument("--output", type=Path, help="also write outcomes as JSON lines")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="chaos_") as name:
        folder = Path(name)
        base = tiny_tree(make_tiny_data(folder / "data"), folder / "run")
        expected = {layout: without_faults(base, layout, folder / layout) for layout in LAYOUTS}
        for seed in range(options.seed, options.seed + options.faults):
            fault = draw(seed, options.kind)
            outcome = suffer(base, fault, expected[fault.layout], folder / "suffering")
            outcomes.append(outcome)
            print(line_of(outcome), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(record_of(outcome)) + "\n")
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if wrong(outcome)]
    elapsed = datetime.timedelta(seconds=round(time.monotonic() - begin))
    print(f"{len(outcomes)} faults, {len(failed)} not survived, {elapsed}")
    return int(bool(failed))


def wrong(outcome: Outcome) -> bool:
    """Whether the run did not survive; what could not be tried is not wrong."""
    return any(not problem.startswith("skipped") for problem in outcome.problems)


def line_of(outcome: Outcome) -> str:
    """One line for people."""
    fault = outcome.fault
    assert fault is not None
    verdict = "; ".join(outcome.problems) or "survived"
    where = f"{fault.layout}, rank {fault.rank}, step {fault.step} {fault.detail}".strip()
    return (
        f"{fault.seed:4d} {fault.kind} ({where}): {verdict}; {outcome.starts} starts, {outcome.lost_steps} steps done "
        f"again, {outcome.seconds:.1f} s"
    )


def record_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it."""
    fault = outcome.fault
    assert fault is not None
    return {
        **{
            name: getattr(fault, name)
            for name in ("seed", "kind", "layout", "rank", "step", "seconds", "detail")
        },
        "starts": outcome.starts,
        "exit_codes": outcome.codes,
        "steps_done_again": outcome.lost_steps,
        "problems": outcome.problems,
        "noticed": outcome.noticed,
        "wall_seconds": round(outcome.seconds, 2),
    }


def table(outcomes: list[Outcome]) -> str:
    """Counts by kind, in Markdown."""
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        assert outcome.fault is not None
        groups[outcome.fault.kind].append(outcome)
    lines = [
        f"Runs of {STEPS} steps that save every {EVERY}; layouts {', '.join(LAYOUTS)}.",
        "",
        "| fault | runs | ended bit-identical | most starts | most steps done again | not tried |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        members = groups.get(kind, [])
        if not members:
            continue
        skipped = sum(bool(outcome.problems) and not wrong(outcome) for outcome in members)
        survived = sum(not outcome.problems for outcome in members)
        lines.append(
            f"| {kind} | {len(members)} | {survived} | {max(o.starts for o in members)} | "
            f"{max(o.lost_steps for o in members)} | {skipped} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
