"""The ledger of looks at sealed targets, beside the runs: `ledger.jsonl`, appended to and chained by SHA-256.

Each line holds the digest of the one before it and its own. A line that was changed, taken away or moved breaks the
chain; that the last ones were cut off is told by the runs, which keep the digest of the look that revealed them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mbcd_cli.errors import FOREIGN, BusyError, FileError
from mbcd_cli.files import read_json, sync, unwritable
from mbcd_cli.locks import lock

LEDGER, REVEALED = "ledger.jsonl", "revealed.json"
"""The ledger, in the folder of the runs; and what a run that was looked at keeps."""
_BEGINNING = "0" * 64


@dataclass(frozen=True, slots=True)
class LookedAt:
    """A run of a look: its folder's name, target, key of its settings, modality -> root of its cache, checkpoint ->
    checksum."""

    run: str
    target: str
    key: str
    roots: dict[str, str]
    checkpoints: dict[str, str]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A line of the ledger.

    Attributes:
        look: its number, from 1. when: in UTC. what: was revealed, as it was named.
        trained: runs of this folder that were complete then. runs: those that were revealed.
        previous: digest of the line before. digest: SHA-256 of all the others, 64 hexadecimal digits.
    """

    look: int
    when: str
    what: str
    trained: int
    runs: list[LookedAt]
    previous: str
    digest: str


_LOOK = TypeAdapter(LedgerEntry)


def looks(folder: Path) -> list[LedgerEntry]:
    """Those at the runs of a folder, in order; a last line that a kill has cut off is none yet.

    Raises:
        FileError: the ledger was changed, or what a run has been revealed by is gone.
    """
    path = folder / LEDGER
    found: list[LedgerEntry] = []
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.", "Mend its rights.") from error
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            look = _LOOK.validate_json(line, strict=True)
        except ValidationError:
            raise _broken(path, f"line {number} is no look") from None
        if (look.look, look.previous) != (number, found[-1].digest if found else _BEGINNING):
            raise _broken(path, f"line {number} does not follow the one before it")
        if look.digest != _digest(look):
            raise _broken(path, f"line {number} was changed")
        found.append(look)
    known = {look.digest for look in found}
    for told in sorted(folder.glob(f"*/{REVEALED}")):
        if revealed_by(told.parent) not in known:
            raise _broken(path, f"the look that revealed {told.parent.name} is not in it")
    return found


def revealed_by(run: Path) -> str | None:
    """Digest of the look that revealed a run; None where none has.

    Raises:
        FileError: what tells of it is damaged.
    """
    told = revealed(run)
    return None if told is None else str(told["look"])


def revealed(run: Path) -> dict[str, Any] | None:
    """What a run keeps of the look that revealed it: `look`, its digest, and `epochs`, the accuracies that were told.

    Raises:
        FileError: it is damaged.
    """
    path = run / REVEALED
    try:
        found = read_json(path)
        if not isinstance(found["look"], str) or not all(isinstance(each["epoch"], int) for each in found["epochs"]):
            raise ValueError("it tells of no look")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, *FOREIGN) as error:
        raise FileError(f"{path} cannot be read: {error}.", "Delete it; `mbcd reveal` writes it again.") from error


def write_look(folder: Path, what: str, runs: Sequence[LookedAt], *, trained: int) -> LedgerEntry:
    """Append a look at `runs` of `folder`, which nobody has looked at, and bring it to the disk.

    Raises:
        FileError: the ledger was changed, or cannot be written.
        BusyError: another process writes it, or has revealed one of the runs.
    """
    path = folder / LEDGER
    before = looks(folder)
    if again := {at.run for look in before for at in look.runs} & {at.run for at in runs}:
        raise BusyError(
            f"Another process has revealed {len(again)} of these {len(runs)} runs meanwhile: {path} has the look.",
            "Wait for it; then `mbcd evaluate --run RUN` tells of each.",
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    look = LedgerEntry(len(before) + 1, now, what, trained, list(runs), before[-1].digest if before else _BEGINNING, "")
    look = replace(look, digest=_digest(look))
    file = lock(path, place="--runs-dir")
    if file is None:
        raise BusyError(f"Another process writes {path}.", "Run the same command again when it is done.")
    with file:
        try:
            if looks(folder) != before:
                raise BusyError(f"Another process has written {path} meanwhile.", "Run the same command again.")
            content = path.read_bytes()
            os.ftruncate(file.fileno(), content.rfind(b"\n") + 1)  # what a kill has left of a line
            file.write(json.dumps(asdict(look)).encode() + b"\n")
            os.fsync(file.fileno())
            sync(folder)  # it may be the first
        except OSError as error:
            raise unwritable(path, error, place="--runs-dir") from error
    return look


def told(found: Sequence[LedgerEntry]) -> str:
    """`looked at once, after 120 runs`."""
    if not found:
        return "not looked at yet"
    times = {1: "once", 2: "twice"}.get(len(found), f"{len(found)} times")
    *most, last = [str(look.trained) for look in found]
    return f"looked at {times}, after {' and '.join(filter(None, [', '.join(most), last]))} runs"


def _digest(look: LedgerEntry) -> str:
    return hashlib.sha256(json.dumps(asdict(replace(look, digest="")), sort_keys=True).encode()).hexdigest()


def _broken(path: Path, why: str) -> FileError:
    return FileError(
        f"{path} is not the ledger that was written: {why}.",
        "Bring it back from a copy; without it nobody can tell how often the targets were looked at.",
    )
