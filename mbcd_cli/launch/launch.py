"""The loop over all engines: units that are not done are handed over, killed ones again, failed ones listed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from mbcd_cli.files import tidy
from mbcd_cli.launch.unit import BUSY_CODE, DONE_CODE, FAILED_CODE, Piece, Unit, beside, forget_failure, last_lines

LAUNCHERS = ("local", "slurm", "ray")
KILLS = 2
"""Times that a piece whose process was killed, or failed without saying why, is begun again by one command."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A unit that an engine is through with.

    Attributes:
        code: exit code of its process, negative for the signal that killed it; None: it was never begun.
        why: what the engine knows of a failure that no process could tell.
        again: whether it may be handed over again.
    """

    unit: Unit
    code: int | None
    why: str = ""
    again: bool = True


class Engine(Protocol):
    """Who runs units."""

    @property
    def room(self) -> int:
        """How many units it takes now."""
        ...

    def find(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Those that an earlier command has handed over, and that are under way still; they are its own now."""
        ...

    def submit(self, units: Sequence[Unit]) -> None:
        """Take units, `room` at most."""
        ...

    def wait(self, seconds: float) -> None:
        """Sleep, at most so long, until a unit has ended."""
        ...

    def ended(self) -> Iterator[Ended]:
        """What has ended since the last question."""
        ...

    def running(self) -> Mapping[str, str]:
        """Key of each unit that is being run now -> where; empty: on this machine."""
        ...

    def stop(self) -> None:
        """Leave: whatever the engine does with units that are under way. Called in the end, too."""
        ...


@dataclass(slots=True)
class Board:
    """How all units stand.

    Attributes:
        units: all of them.
        done, failed: finished pieces; `failed` with the error, by key.
        waiting, elsewhere: pieces not handed over, and those that a process of others works on, by key.
        handed: units that the engine has, by key, with the pieces of them that are not done.
        running: of those, where each is being run.
        finished: pieces that this command has seen to their end. began: by the monotonic clock.
    """

    units: Sequence[Unit]
    done: list[Piece] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, Piece] = field(default_factory=dict)
    elsewhere: dict[str, Piece] = field(default_factory=dict)
    handed: dict[str, tuple[Unit, list[Piece]]] = field(default_factory=dict)
    running: Mapping[str, str] = field(default_factory=dict)
    finished: int = 0
    began: float = field(default_factory=time.monotonic)
    stopping: bool = False

    @property
    def total(self) -> int:
        """How many pieces there are."""
        return sum(len(unit.pieces) for unit in self.units)

    @property
    def queued(self) -> int:
        """Pieces that wait, here or with the engine."""
        return len(self.waiting) + sum(len(left) for key, (_, left) in self.handed.items() if key not in self.running)

    @property
    def seconds_left(self) -> float | None:
        """Expected time to the end, as quick as it was so far."""
        if not self.finished:
            return None
        left = len(self.waiting) + sum(len(pieces) for _, pieces in self.handed.values())
        return left * (time.monotonic() - self.began) / self.finished


def begin(units: Sequence[Unit], *, retry_failed: bool) -> Board:
    """What is done, failed and waiting at the start; marks of failure are removed from those to be tried again."""
    board = Board(units)
    for folder in {piece.folder.parent for unit in units for piece in unit.pieces}:
        tidy(folder)  # a mark that could not be written whole
    for unit in units:
        for piece in unit.pieces:
            now = unit.state(piece)
            if now == "failed" and not retry_failed:
                board.failed[piece.key] = unit.error(piece)
            elif now == "done":
                forget_failure(piece.folder)  # it may have failed after all that it writes was there
                board.done.append(piece)
            else:
                board.waiting[piece.key] = piece
    return board


def launch(
    board: Board,
    engine: Engine,
    *,
    watch: Callable[[Board], None] = lambda board: None,
    poll: float = 0.5,
) -> Board:
    """Run what waits on the board, and return it when nothing does.

    A piece whose process ends without saying how is begun again (it resumes from its checkpoint), `KILLS` times at
    most. One that a process of others works on is waited for. SIGTERM and Ctrl-C stop the engine first.

    Args:
        watch: called every `poll` seconds, and at the end.

    Raises:
        KeyboardInterrupt: after the engine has stopped.
    """
    of_piece = {piece.key: unit for unit in board.units for piece in unit.pieces}
    kills: dict[str, int] = {}
    watch(board)
    try:
        with _stoppable():
            for unit in engine.find([unit for unit, _ in _wanted(board, of_piece, len(of_piece))]):
                _hand(board, unit, [piece for piece in unit.pieces if piece.key in board.waiting])
            while board.waiting or board.handed or board.elsewhere:
                taken = _wanted(board, of_piece, engine.room) if board.waiting else []
                for unit, left in taken:
                    for piece in left:
                        forget_failure(piece.folder)
                        unit.write(piece)
                    _hand(board, unit, left)
                if taken:
                    engine.submit([unit for unit, _ in taken])
                board.running = engine.running()
                watch(board)
                engine.wait(poll)
                for end in engine.ended():
                    for piece in board.handed.pop(end.unit.pieces[0].key)[1]:
                        _settle(board, end, piece, kills)
                for piece in list(board.elsewhere.values()):
                    _look_again(board, of_piece[piece.key], piece)
    finally:
        board.stopping = bool(board.handed)
        try:
            if board.stopping:
                watch(board)
        finally:
            engine.stop()
            board.running = {}
    watch(board)
    return board


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside the block SIGTERM is what Ctrl-C is; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wanted(board: Board, of_piece: Mapping[str, Unit], most: int) -> list[tuple[Unit, list[Piece]]]:
    """The first units that wait and that the engine does not have, with the pieces that wait."""
    found: dict[str, tuple[Unit, list[Piece]]] = {}
    for key, piece in board.waiting.items():
        unit = of_piece[key]
        mine = unit.pieces[0].key
        if mine not in board.handed:
            if mine not in found and len(found) >= most:
                break
            found.setdefault(mine, (unit, []))[1].append(piece)
    return list(found.values())


def _hand(board: Board, unit: Unit, left: list[Piece]) -> None:
    board.handed[unit.pieces[0].key] = (unit, left)
    for piece in left:
        del board.waiting[piece.key]


def _settle(board: Board, end: Ended, piece: Piece, kills: dict[str, int]) -> None:
    """Where a piece goes of which the engine has said how its unit ended."""
    code = _code_of(end, piece)
    if code == DONE_CODE:
        board.done.append(piece)
        board.finished += 1
    elif code == BUSY_CODE:
        board.elsewhere[piece.key] = piece
    elif code == FAILED_CODE and end.unit.state(piece) == "failed":
        board.failed[piece.key] = end.unit.error(piece)
        board.finished += 1
    elif not end.again:
        board.failed[piece.key] = end.why
    else:
        kills[piece.key] = kills.get(piece.key, 0) + (code is not None)
        if kills[piece.key] <= KILLS:
            board.waiting[piece.key] = piece
            return
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        how = f"{how}, {kills[piece.key]} times (out of memory?); {beside(piece.folder, 'log')}"
        board.failed[piece.key] = end.why or (end.unit.error(piece) if code == FAILED_CODE else how)


def _code_of(end: Ended, piece: Piece) -> int | None:
    """That of one piece: its folder tells where the process cannot (one whose lock another process has taken, since it
    stood still, ends without a word); a stop or a kill is of all."""
    now = end.unit.state(piece)
    if not end.again and now not in ("done", "failed"):
        return None
    told = {"done": DONE_CODE, "failed": FAILED_CODE, "running": BUSY_CODE}
    return end.code if end.code == DONE_CODE else told.get(now, end.code)


def _look_again(board: Board, unit: Unit, piece: Piece) -> None:
    """A piece that another process worked on: done, failed, still at work, or left for us."""
    now = unit.state(piece)
    if now == "running":
        return
    del board.elsewhere[piece.key]
    if now == "done":
        board.done.append(piece)
    elif now == "failed":
        board.failed[piece.key] = unit.error(piece)
    else:
        board.waiting[piece.key] = piece


def last_line(piece: Piece) -> str:
    """The end of the log, for a process that failed before it could say why."""
    return (last_lines(piece.folder) or ["no output"])[-1]
