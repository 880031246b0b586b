"""What is run: a unit of work, and the small files beside its folders.

A unit (a cell or a population of a sweep) can be run twice, or on two machines at once, and nothing changes: what is
done of it is told by the folders of its pieces, one process holds each, and what was cut off goes on. Beside the folder
`X` of a piece lie, while needed, `X.lock` (held by the process that works on it; says where that is), `X.log` (its
output), `X.failed` (why it failed), `X.job` (the job of a cluster that has it).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal, Protocol

from mbcd_cli.files import delete, read_json, write_json
from mbcd_cli.plugins import line_of_theirs

State = Literal["waiting", "running", "interrupted", "trained", "done", "failed"]

DONE_CODE, FAILED_CODE, BUSY_CODE, STOPPED_CODE = 0, 1, 75, 130
"""Exit codes of a unit's process: done, failed (see `X.failed`), held by another process, stopped by a signal."""


class Piece(Protocol):
    """A part of a unit with a folder of its own: `key` tells it from all others, `name` is for a person."""

    @property
    def key(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True, slots=True)
class Order:
    """What a process is told to do; plain values, since it travels.

    Attributes:
        call: `module:function`, which takes the arguments and returns an exit code.
        arguments: of it.
        log: file that gets what it says.
        large: whether it walks through hundreds of megabytes again and again.
    """

    call: str
    arguments: tuple[str, ...]
    log: str
    large: bool = False


class Unit(Protocol):
    """What is handed over at once; its first piece's key is its own."""

    @property
    def pieces(self) -> Sequence[Piece]: ...

    def order(self, threads: int) -> Order:
        """What its process is told, with so many CPU threads."""
        ...

    def write(self, piece: Piece) -> None:
        """Write what its process reads of a piece."""
        ...

    def state(self, piece: Piece) -> State:
        """Where a piece stands, told from its folder."""
        ...

    def error(self, piece: Piece) -> str:
        """Why a piece failed."""
        ...


def beside(folder: Path, suffix: str) -> Path:
    """`X.<suffix>` of the folder `X`."""
    return folder.with_name(f"{folder.name}.{suffix}")


@contextmanager
def known(lock: FileIO) -> Iterator[None]:
    """Inside the block the lock that this process holds says where it is held, and since when."""
    here = {"host": socket.gethostname().partition(".")[0], "process": os.getpid(), "since": round(time.time(), 1)}
    with suppress(OSError):  # it is for a person: what has to be written will tell of a full disk
        lock.truncate(0)
        lock.write(json.dumps(here).encode())
        os.fsync(lock.fileno())
    try:
        yield
    finally:
        with suppress(OSError):
            lock.truncate(0)


def write_failure(folder: Path, error: Exception, *, place: str = "--runs-dir") -> None:
    """Record why a piece failed, as `{"error": ..., "remedy": ...}`."""
    line = line_of_theirs(error)
    failure = {
        "error": getattr(error, "message", f"{line}: " * bool(line) + f"{type(error).__name__}: {error}"),
        "remedy": getattr(error, "remedy", "The log beside it says more."),
    }
    write_json(beside(folder, "failed"), failure, place=place)


def forget_failure(folder: Path) -> None:
    """Remove what `write_failure` left, if anything."""
    if (mark := beside(folder, "failed")).is_file():
        delete(mark)


def read_failure(folder: Path) -> str:
    """The error that `write_failure` recorded; empty where there is none that can be read."""
    try:
        return str(read_json(beside(folder, "failed"))["error"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who works on a piece: machine, process there, since when (seconds since 1970)."""

    host: str
    process: int
    since: float


def holder(folder: Path) -> Holder | None:
    """Who works on a piece, as its lock says; one that was killed may still be told of."""
    try:
        return Holder(**json.loads(beside(folder, "lock").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def last_lines(folder: Path, count: int = 1) -> list[str]:
    """The end of the log, without empty lines."""
    try:
        with beside(folder, "log").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 8192, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
