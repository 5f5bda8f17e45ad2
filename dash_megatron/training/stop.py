"""Signals that ask a run to stop: the first lets it finish its step and save, a second one does not."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time

import torch

from dash_megatron.agreement import largest

logger = logging.getLogger(__name__)

_WARNINGS = frozenset({signal.SIGUSR1})
_ORDERS = frozenset({signal.SIGTERM, signal.SIGINT})
# a scheduler and the launcher it signals both pass one order on, so that a process gets it twice within moments
_SAME_ORDER_SECONDS = 1.0


class Halted(RuntimeError):
    """The run stopped itself. Starting it again would only repeat that: a person must look."""


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 to this process from the moment it is made.

    A thread reads them, so that they count at once, even while the main thread waits within a collective or for the
    device. A second SIGTERM or SIGINT ends the process there and then, with exit code 128 + its number: every file of
    a run is published by a rename, so that nothing is damaged. SIGUSR1, which schedulers send ahead of a time limit,
    may come as often as it likes.
    """

    def __init__(self) -> None:
        self.requested = False
        """True from the first signal on."""
        self._ordered: float | None = None
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "not in the main thread: signals keep their usual effect, and nothing saves on them"
            )
            return
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        # signals to a forked child are not signals to this process
        os.register_at_fork(after_in_child=_forget_wakeup)
        for number in _WARNINGS | _ORDERS:
            signal.signal(number, _noted_by_the_thread)
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()

    def _watch(self) -> None:
        while data := self._reading.recv(64):
            for number in data:
                if number in _WARNINGS | _ORDERS:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number in _ORDERS:
            if self._ordered is not None and now - self._ordered > _SAME_ORDER_SECONDS:
                os.write(2, f"second order to stop ({number.name}): exiting without saving\n".encode())
                os._exit(128 + number)
            self._ordered = now if self._ordered is None else self._ordered
        if not self.requested:
            self.requested = True
            logger.info("%s: finishing the step, saving, and stopping", number.name)


def _forget_wakeup() -> None:
    signal.set_wakeup_fd(-1)


def _noted_by_the_thread(number: int, frame: object) -> None:
    """Does nothing. Without a Python handler the signal would have its usual effect."""


def agree_to_stop(stop: bool, skipped: bool) -> bool:
    """Whether any process is asked to stop; collective, on the CPU, so that it never waits for the device.

    Args:
        stop: whether this process was asked to stop.
        skipped: whether this process skipped the step's update.

    Raises:
        RuntimeError: some processes made an update that others skipped, so that their weights differ.
    """
    flags = largest(torch.tensor([stop, skipped, not skipped], dtype=torch.int32))
    if flags[1] and flags[2]:
        raise RuntimeError(
            "some processes found this step's loss or gradient wrong and others did not, although both are sums over "
            "all of them: one computes wrongly. Start again from the newest checkpoint, and check the GPUs"
        )
    return bool(flags[0])
