"""Queries of SLURM, which a busy controller answers only when asked again."""

from __future__ import annotations

import re
import subprocess
import time

# how a command says that it got no answer, rather than a bad one
NO_ANSWER = re.compile(
    r"timed out|Unable to contact|Zero Bytes|temporarily unavailable|connect failure", re.IGNORECASE
)
ATTEMPTS, PAUSE_SECONDS = 4, 5.0


def query_slurm(*command: str) -> str | None:
    """Standard output of a command that changes nothing, so that asking again does no harm.

    None where there is no such command, it refuses, or nobody answers.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if not done.returncode:
            return done.stdout
        if not NO_ANSWER.search(done.stderr):
            return None
    return None
