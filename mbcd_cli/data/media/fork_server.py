"""Imported by the fork server of the decoding workers alone: its socket's folder goes with it.

The command removes that folder when it ends, unless it is killed; the server sees that and ends by itself.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path

_FEW = 64


def _listens_at() -> Path | None:
    """Where this process listens: the one socket with a name that it has inherited."""
    for number in range(3, _FEW):
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as held:
            if held.family == socket.AF_UNIX and isinstance(name := held.getsockname(), str) and name:
                return Path(name)
    return None


def _ends_with() -> int:
    """The pipe whose other end the command and its workers hold: the one that this process has inherited."""
    for number in range(3, _FEW):
        with suppress(OSError):
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                return number
    return -1


def _remove(folder: Path, alive: int) -> None:
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    if poll.poll(0):  # else the command is there, and may start another server
        shutil.rmtree(folder, ignore_errors=True)


if (listener := _listens_at()) is not None and listener.parent.name.startswith("pymp-"):
    atexit.register(_remove, listener.parent, _ends_with())
