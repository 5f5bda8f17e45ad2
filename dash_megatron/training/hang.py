"""Which processes of a run hang, and where: of hundreds, all but the one to look at wait for it."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dash_megatron.exit_codes import ExitCode, take_back, tell_scheduler

_PACKAGE = Path(__file__).parents[1]
_MOST_PLACES = 4


class HangReport:
    """Writes where this process stands to `<run_dir>/hang`, once it was long without progress; one process tells of all.

    A thread does it, through files, because the processes wait in each other's collectives. One whose Python stands still,
    as of a machine that is gone, a stopped process or a lost file system, writes nothing: that too is told. Where they go on
    after all, what the scheduler was told is taken back.

    Args:
        run_dir: the run's folder.
        rank: of this process.
        hosts: machine of every rank.
        seconds: without a beat until this process writes; it waits a twentieth of that for the others.
    """

    def __init__(self, run_dir: str | Path, rank: int, hosts: Sequence[str], seconds: float) -> None:
        self.folder, self.rank, self.hosts, self.seconds = Path(run_dir) / "hang", rank, hosts, seconds
        if rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._stopped = threading.Event()
        self._main = threading.get_ident()
        self.beat()
        threading.Thread(target=self._watch, name="hang report", daemon=True).start()

    def beat(self) -> None:
        """Tell that progress was made: the time starts anew."""
        self._last_beat = time.monotonic()

    def stop(self) -> None:
        """No more progress is expected."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.0, self._last_beat + self.seconds - time.monotonic())):
            beat = self._last_beat
            if time.monotonic() < beat + self.seconds:
                continue
            try:
                told = self._tell()
                # looked at often: whatever ends the process soon after it went on has another reason
                while self._last_beat == beat and not self._stopped.wait(min(1.0, self.seconds / 20)):
                    pass
                self._file(self.rank).unlink(missing_ok=True)
            except OSError as error:
                sys.stderr.write(
                    f"no progress for {self.seconds:.0f} s, and {self.folder}: {error.strerror}\n"
                )
                return
            if told:
                sys.stderr.write("warning: the processes went on\n")
                take_back(ExitCode.FAULT, *told)

    def _tell(self) -> tuple[str, list[str]] | None:
        """Write where this process stands; where it is this one that tells, give the sentence on all and the silent machines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(self.rank).write_text(self._place())
        if self._stopped.wait(self.seconds / 20):
            return None
        places = self._places()
        if self.rank != min(places):
            return None
        text, silent = describe(self.hosts, places, self.seconds)
        sys.stderr.write(f"error: {text}\n")
        tell_scheduler(ExitCode.FAULT, text, silent)
        return text, silent

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}"

    def _places(self) -> dict[int, str]:
        """What ranks wrote, up to the first where that is not this one: it tells."""
        places: dict[int, str] = {}
        # each by its name: NFS would answer from its memory what a folder holds
        for rank in range(len(self.hosts)):
            try:
                places[rank] = self._file(rank).read_text()
            except FileNotFoundError:
                continue
            if rank < self.rank:
                break
        return places

    def _place(self) -> str:
        """The innermost function of this package that the main thread is in, and its line."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE):
                return f"{frame.f_code.co_name} ({path.relative_to(_PACKAGE)}:{frame.f_lineno})"
            frame = frame.f_back
        return "code of others"


def describe(hosts: Sequence[str], places: dict[int, str], seconds: float) -> tuple[str, list[str]]:
    """One sentence on processes without progress, and the machines of those that gave no sign.

    These come first, then places, those of fewest first.

    Args:
        hosts: machine of every rank.
        places: where each rank stands, of those that told.
        seconds: for which they made no progress.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in places]
    groups: dict[str, list[int]] = {}
    for rank in sorted(places):
        groups.setdefault(places[rank], []).append(rank)
    parts = [f"no sign of life of {_name(silent, hosts)}"] if silent else []
    rarest = sorted(groups.items(), key=lambda group: len(group[1]))
    parts += [f"{_name(ranks, hosts)} in {place}" for place, ranks in rarest[:_MOST_PLACES]]
    text = f"no progress for {seconds:.0f} s: {'; '.join(parts)}; where this is slow and no hang, raise faults.hang_minutes"
    return text, sorted({hosts[rank] for rank in silent})


def _name(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    first = f"rank {ranks[0]} on {hosts[ranks[0]]}"
    return first if len(ranks) == 1 else f"{first} and {len(ranks) - 1} more"
