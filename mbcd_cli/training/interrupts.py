"""Signals that ask a training to stop as a request that the loop answers when it is safe."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is Slurm's warning that time is up, SIGHUP a terminal that was closed."""


class Interrupts:
    """Inside the block the first signal to stop is only noted, and Ctrl-C after it interrupts at once.

    The others ask once, however often they come: Slurm sends SIGTERM to every process of a job, and one that has begun
    another hands it on.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
        elif number == signal.SIGINT:
            before = self._before[signal.SIGINT]
            (before if callable(before) else signal.default_int_handler)(number, frame)

    def __enter__(self) -> Interrupts:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            for stop in _STOP:
                if signal.getsignal(stop) is signal.SIG_IGN:  # nohup
                    continue
                self._before[stop] = signal.signal(stop, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for stop, handler in self._before.items():
            signal.signal(stop, handler)
