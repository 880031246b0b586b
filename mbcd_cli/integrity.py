"""What of a folder is whole: every file against its checksum, its own or the one that a cache, run or results tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from mbcd_cli import checksums
from mbcd_cli.errors import FileError
from mbcd_cli.files import open_hdf5, read_json
from mbcd_cli.ledger import LEDGER, looks
from mbcd_cli.locks import HOLDER

_OUR_LOCKS = ".lock"


@dataclass(slots=True)
class Condition:
    """What `examine` found under a folder; paths as they were walked.

    Attributes:
        whole: files whose bytes are those that were written, and how many bytes that were.
        damaged: path -> why. missing: files that a cache, run or results name.
        unchecked: files that carry no checksum and that nothing tells one of (logs of a run that is not finished,
            pictures of a landscape, strangers).
        unfinished: run folders whose training has not come to its end.
        unprepared: cache folders without an index, which `prepare` writes last; it is missing, too, since nothing tells
            a deleted one from none yet.
        roots: cache folder -> its root checksum.
    """

    whole: list[Path] = field(default_factory=list)
    nbytes: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)
    missing: list[Path] = field(default_factory=list)
    unchecked: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    unprepared: list[Path] = field(default_factory=list)
    roots: dict[Path, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[Path]:
        """What is damaged or missing."""
        return sorted([*self.damaged, *self.missing])


def examine(path: Path, *, seen: Callable[[int], None] = lambda count: None) -> Condition:
    """Read every file under `path` and compare it with its checksum.

    Args:
        path: a folder of caches, runs, sweeps or landscapes, one of these, or one file.
        seen: told after every file how many bytes it has.

    Raises:
        OSError: a folder cannot be read.
    """
    condition = Condition()
    told: dict[Path, str] = {}
    files = list(_files(path))
    for teller in (file for file in files if file.name in checksums.TELLERS):
        with suppress(OSError, ValueError, KeyError, TypeError):  # its own checksum tells below that it is damaged
            told |= {teller.parent / name: value for name, value in _told(teller, condition).items()}
    for file in files:
        size = 0
        try:
            size = file.stat().st_size
            why = _fault(file, told.get(file))
        except FileNotFoundError:  # of a command at work, which has just removed it
            continue
        except OSError as error:
            why = str(error)
        if why is None:
            condition.unchecked.append(file)
        elif why:
            condition.damaged[file] = why
        else:
            condition.whole.append(file)
            condition.nbytes += size
        seen(size)
    there = set(files)
    condition.missing = sorted(file for file in told if file not in there and path in (file, *file.parents))
    shards = {file.parent for file in files if file.name.startswith("shard-") and file.suffix == ".h5"}
    whole_caches = [
        folder / name
        for folder in sorted(shards | set(condition.roots))
        for name in ("index.h5", checksums.PREPARED_WITH)
    ]
    condition.missing += [file for file in whole_caches if file not in there and not path.is_file()]
    condition.unprepared = [file.parent for file in condition.missing if file.name == "index.h5"]
    runs = [file.parent for file in files if file.name == "last.pt" and file.parent.name == "checkpoints"]
    condition.unfinished = sorted(folder.parent for folder in runs if not (folder.parent / "done").exists())
    return condition


def _files(path: Path) -> Iterator[Path]:
    """Those that are there to stay: none of a lock, and none that is, or lies in a folder that is, half written."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        ours = file.name.startswith(_OUR_LOCKS) or file.suffix == HOLDER
        aside = any(fnmatch(part, ".*.partial") for part in file.relative_to(path).parts)
        if file.is_file() and not aside and not ours:
            yield file


def _told(teller: Path, condition: Condition) -> dict[str, str]:
    """Name -> checksum of the files that a whole `teller` speaks of."""
    if teller.suffix != ".h5":
        return dict(read_json(teller)["files"])
    checksums.verified(teller)
    with open_hdf5(teller) as index:
        condition.roots[teller.parent] = str(index.attrs["root_checksum"])
        beside = index.attrs.get("prepared_with")
        return json.loads(index["files"].asstr()[()]) | ({checksums.PREPARED_WITH: str(beside)} if beside else {})


def _fault(file: Path, told: str | None) -> str | None:
    """What is wrong with a file; empty where nothing is, None where nothing says what it should be."""
    if file.name == LEDGER:
        try:
            looks(file.parent)
            return ""
        except FileError as error:
            return error.message
    try:
        own = checksums.verified(file)
    except checksums.NoChecksumError:
        if told is None:
            needs = file.suffix in (".pt", ".h5") or checksums.found_by_name(file.name)
            return "it carries no checksum" if needs else None
        return "" if checksums.of_file(file) == told else "its bytes are not those that were written"
    except checksums.DamagedError as error:
        return str(error)
    if told is None or told in (own, checksums.of_file(file)):
        return ""
    return "it is another one than the file that belongs here"
