"""A process that imports what units need once, and forks a child for each: `python -m mbcd_cli.launch.warm`.

A cell's own process took 5 to 7 s of processor time for its imports; a child takes some milliseconds (docs/scale.md).

Standard input brings one `Order` a line, as JSON; standard output gets its exit code (negative: the signal that killed
the child). Where standard input ends, its owner is gone: the child ends, and this process after it. SIGTERM is for the
child, too.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from mbcd_cli.launch.unit import STOPPED_CODE
from mbcd_cli.say import Say

_LAST_SECONDS = 8.0
"""What a child whose owner is gone has for its last checkpoint."""


def serve() -> int:
    """Do as the lines of standard input say, until they end or a signal stops this process.

    Returns:
        The exit code: in a child, that of its order.
    """
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    os.set_blocking(woken, False)
    stopped = []
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    for other in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # what clusters send to all of a job
        signal.signal(other, signal.SIG_IGN)
    orders = _Lines(0)
    while not stopped and (line := orders.next(woken, stopped)) is not None:
        order = json.loads(line)
        call = _load(order["call"])
        if stopped:
            break
        gc.freeze()  # or every child copies what it only looks at
        held, holds = os.pipe()
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            for one in (woken, wakes, holds):
                os.close(one)
            say = _become(order["log"], held)
            return STOPPED_CODE if stopped else call(order["arguments"], say)  # it may have been told so already
        os.close(held)
        code = _wait(child, holds, orders, woken, stopped)
        with suppress(BrokenPipeError):
            os.write(1, f"{code}\n".encode())
    return STOPPED_CODE if stopped else 0


class _Lines:
    """Lines of a pipe, one at a time; `over` when it has ended."""

    def __init__(self, number: int) -> None:
        self.number, self.over, self._text = number, False, b""

    def read(self) -> None:
        more = os.read(self.number, 1 << 16)
        self._text += more
        self.over = not more

    def next(self, woken: int, stopped: Sequence[bool]) -> str | None:
        while b"\n" not in self._text:
            if self.over or stopped:
                return None
            ready, _, _ = select.select([self.number, woken], [], [])
            _drain(woken)
            if self.number in ready:
                self.read()
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()


def _drain(woken: int) -> None:
    with suppress(BlockingIOError):
        while os.read(woken, 512):
            pass


def _load(name: str) -> Callable[[Sequence[str], Say], int]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _become(path: str, held: int) -> Say:
    """Make a forked process one of its own: its log, the pipe that its parent holds, signals as they come.

    Returns:
        What writes to the log, where what libraries print goes, too.
    """
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    log = os.fdopen(number, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(held, 0)
    os.close(held)
    for printed in (1, 2):
        os.dup2(number, printed)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return Say(lambda line: log.write(f"{line}\n"))


def _wait(child: int, holds: int, orders: _Lines, woken: int, stopped: Sequence[bool]) -> int:
    """The child's exit code; a signal is handed on, or else the end of the owner.

    An owner that stops this process leaves it, too, and waits: how long the child has for its checkpoint is up to it.
    """
    told = False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if holds >= 0:
                os.close(holds)
            return os.waitstatus_to_exitcode(status)
        if stopped and not told:
            told = True
            os.kill(child, signal.SIGTERM)
        if orders.over and holds >= 0 and not told:
            os.close(holds)  # it ends by itself (`end_with_owner`)
            holds = -1
        ready, _, _ = select.select([woken] if orders.over else [woken, orders.number], [], [])
        _drain(woken)
        if orders.number in ready:
            orders.read()


def end_with_owner() -> None:
    """End this process when the one that holds the other end of standard input, a pipe, does."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner() -> None:
    """Once nobody holds the other end of the pipe: to a checkpoint and out, or, where that takes long, out."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_SECONDS)
    os._exit(STOPPED_CODE)


if __name__ == "__main__":
    sys.exit(serve())
