"""What all commands share: where overrides may stand among options, and how a command ends without a reader or by Ctrl-C."""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=")
# an option that no command has, behind which no word is taken for a value of the option before
_END_OF_VALUES = "--end-of-values"


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse a command line whose `section.key=value` words may stand anywhere, even behind an option that takes several values.

    Args:
        parser: collects them as `overrides`. If it does not, or the command that it picks does not, they are refused. A word
            right behind an option is that option's value, whatever it looks like, and so is the name of a file or folder.
        arguments: None for those of the process.
    """
    marked: list[str] = []
    for before, word in pairwise(["", *(sys.argv[1:] if arguments is None else arguments)]):
        if _OVERRIDE.match(word) and not before.startswith("--") and not os.path.exists(word):
            marked.append(_END_OF_VALUES)
        marked.append(word)
    # argparse takes positional words up to the next option, and gives back the others
    options, rest = parser.parse_known_args(marked)
    rest = [word for word in rest if word != _END_OF_VALUES]
    if "overrides" in options and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


@contextmanager
def ending_with_reader() -> Iterator[None]:
    """Where standard output is closed within, end the process silently, with the status that SIGPIPE gives other tools.

    The signal itself is left alone: it would also end a process that writes to a connection whose other side has gone.
    Ctrl-C ends the process without a word too, with the status that a shell gives it.
    """
    try:
        try:
            yield
        finally:
            _flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # Python writes at exit what is left, and would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _flush() -> None:
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass  # such as a full disk, of which Python tells at exit


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
