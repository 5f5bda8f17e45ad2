"""What a command does when nobody reads on what it prints, as behind `| head`."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_with_reader() -> Iterator[None]:
    """Within, a closed standard output ends the process without a word, with the status that SIGPIPE gives other tools.

    The signal itself is left alone: it would also end a process that writes to a connection whose other side has gone.
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
