"""`mbcd prepare` by several processes of this machine, or of a cluster: each is one of the `crew`.

A unit of work is a process that runs the same `prepare`; it takes what is free until nothing is left. What is done is
told by the cache, so that one unit more or less changes nothing but the time.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mbcd_cli import checksums
from mbcd_cli.errors import CacheError, MbcdError, StoppedError
from mbcd_cli.files import write_text
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.launch import Board, begin, last_line, launch
from mbcd_cli.launch.unit import (
    BUSY_CODE,
    DONE_CODE,
    FAILED_CODE,
    STOPPED_CODE,
    Order,
    State,
    beside,
    known,
    read_failure,
    write_failure,
)
from mbcd_cli.launch.warm import end_with_owner
from mbcd_cli.locks import held, lock
from mbcd_cli.preparation.answer import Prepared, kept_answer
from mbcd_cli.preparation.prepare import anywhere, prepare
from mbcd_cli.resolved import load_settings
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import RuntimeSettings, Settings
from mbcd_cli.settings.sources import to_toml

PART = "mbcd_cli.preparation.launched:serve_part"
"""Takes part in a preparation: (FOLDER, THREADS, JSON of the corruptions and severities)."""
PLACE = "--cache-dir"
OLD = 7 * 24 * 3600.0
"""Seconds after which the folder of a command that never came back is nobody's."""


@dataclass(frozen=True, slots=True)
class Part:
    """A process that takes part; nothing is ever in its folder, beside it lie the small files of `launch.unit`."""

    key: str
    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class PartUnit:
    """A process that takes part, as a unit of work.

    Attributes:
        settings: with absolute folders. spoilt: JSON of the corruptions asked for, and their severities.
    """

    pieces: Sequence[Part]
    settings: Settings
    spoilt: str

    def order(self, threads: int) -> Order:
        """What its process is told."""
        folder = self.pieces[0].folder
        return Order(PART, (str(folder), str(threads), self.spoilt), str(beside(folder, "log")))

    def write(self, piece: Part) -> None:
        """Write the settings that its process reads.

        Raises:
            FileError: the folder cannot be written to.
        """
        write_text(beside(piece.folder, "toml"), to_toml(self.settings, stamped=True), place=PLACE)

    def state(self, piece: Part) -> State:
        """Where it stands; what has not begun is done when another one is: that was through with the whole cache."""
        if held(beside(piece.folder, "lock")):
            return "running"
        if any(piece.folder.parent.glob("*.done")):
            return "done"
        return "failed" if beside(piece.folder, "failed").is_file() else "waiting"

    def error(self, piece: Part) -> str:
        """Why it failed."""
        return read_failure(piece.folder) or last_line(piece)


def prepare_launched(
    settings: Settings,
    *,
    how: Launching,
    corruptions: Sequence[str],
    severities: Sequence[int],
    say: Say = SILENT,
) -> Prepared | None:
    """`prepare`, shared by as many processes as `how` says; the report is that of one.

    Where nothing has changed since all of it was prepared, none is begun. Given again, the same command finds the jobs
    of a cluster that are under way.

    Raises:
        CacheError: all of them failed, and why the first did; and whatever `prepare` raises.
    """
    how.check()
    # What is left for this process computes nothing: a login node may have no GPU.
    asked = settings.model_copy(update={"runtime": RuntimeSettings(device="cpu")})
    if not corruptions and kept_answer(settings) is not None:
        return prepare(asked, say=say)
    settings = anywhere(settings)
    spoilt = json.dumps([list(corruptions), list(severities)])
    key = checksums.of_text(to_toml(settings) + spoilt)[:12]
    folder = settings.cache.dir / f".crew-{key}"
    parts = [Part(f"{key}-{at}", f"part {at + 1}", folder / f"part-{at + 1:03d}") for at in range(how.jobs)]
    for mark in folder.glob("*.done"):  # of an interrupted command: there may be other clips now
        mark.unlink(missing_ok=True)
    board = begin([PartUnit((part,), settings, spoilt) for part in parts], retry_failed=True)
    root = settings.dataset.root
    engine = how.engine(settings, folder, sees=[root] if root else [], place=PLACE, say=say)
    launch(board, engine, watch=_telling(say))
    if len(board.failed) == len(parts):
        why = next(iter(board.failed.values()))
        raise CacheError(why, f"The logs in {folder} say more.")
    shutil.rmtree(folder, ignore_errors=True)  # the same command from another terminal may have been quicker
    for other in settings.cache.dir.glob(".crew-*"):
        with suppress(FileNotFoundError):  # its command has just ended
            if time.time() - other.stat().st_mtime > OLD and not any(map(held, other.glob("*.lock"))):
                shutil.rmtree(other, ignore_errors=True)
    return prepare(asked, corruptions=corruptions, severities=severities, say=say)


def _telling(say: Say) -> Callable[[Board], None]:
    told: dict[str, str] = {}

    def look(board: Board) -> None:
        now = {key: f"runs{f' on {where}' if where else ''}" for key, where in board.running.items()}
        now |= {piece.key: "has ended" for piece in board.done}
        now |= {key: f"failed: {why.splitlines()[0]}" for key, why in board.failed.items()}
        for unit in board.units:
            part = unit.pieces[0]
            state = now.get(part.key, "waits")
            if state != told.get(part.key, "waits"):
                told[part.key] = state
                say(f"{part.name} of {len(board.units)} {state}; log: {beside(part.folder, 'log')}")

    return look


def run_part(folder: Path, *, threads: int, spoilt: str, say: Say = SILENT) -> int:
    """Take part until nothing is left to do; the exit code."""
    if not beside(folder, "toml").is_file() or any(folder.parent.glob("*.done")):
        return DONE_CODE  # a job that began late: the command that asked for it has ended, or another was through
    mine = lock(beside(folder, "lock"), place=PLACE)
    if mine is None:
        return BUSY_CODE
    with mine, known(mine):
        try:
            settings = load_settings(beside(folder, "toml"))
            runtime = settings.runtime.model_copy(update={"threads": threads})
            corruptions, severities = json.loads(spoilt)
            settings = settings.model_copy(update={"runtime": runtime})
            prepare(settings, corruptions=corruptions, severities=severities, say=say)
            write_text(beside(folder, "done"), "", place=PLACE)
        except (KeyboardInterrupt, StoppedError):
            return STOPPED_CODE
        except Exception as error:
            say(f"error: {error}" if isinstance(error, MbcdError) else traceback.format_exc())
            write_failure(folder, error, place=PLACE)
            return FAILED_CODE
    return DONE_CODE


def serve_part(arguments: Sequence[str], say: Say) -> int:
    """The process of a part: FOLDER, THREADS, JSON of the corruptions; the exit code."""
    end_with_owner()
    folder, threads, spoilt = arguments
    return run_part(Path(folder), threads=int(threads), spoilt=spoilt, say=say)
