"""What a node of a cluster has to have, before anything runs there: the folders, and the same programs."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile

import xxhash

from mbcd_cli.locks import lock

MARK = ".mbcd-runs"
"""File by which nodes tell a folder of runs from another one of its name."""


@cache
def programs() -> tuple[tuple[str, str], ...]:
    """(name, version) of what results depend on, here; of `mbcd` a checksum of its sources too."""
    package = Path(__file__).resolve().parents[1]
    told = xxhash.xxh64()
    for path in sorted(package.rglob("*.py")):
        told.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    names = [(name, _version(name)) for name in ("mbcd", "torch", "numpy")]
    return (("python", platform.python_version().rpartition(".")[0]), *names, ("mbcd's sources", told.hexdigest()[:8]))


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]  # +cpu, +cu128: of the machine
    except metadata.PackageNotFoundError:
        return "missing"


@dataclass(frozen=True, slots=True)
class Demands:
    """What every node has to have.

    Attributes:
        mark, key: file in the folder of the runs, and what it says: a folder of that name may be another.
        folders: that it has to see. programs: as here.
    """

    mark: str
    key: str
    folders: tuple[str, ...]
    programs: tuple[tuple[str, str], ...]

    def fault(self) -> str:
        """What this machine lacks, in words; empty: nothing."""
        if _said(Path(self.mark)) != self.key:
            return f"does not see the folder {Path(self.mark).parent}"
        try:
            with TemporaryFile(dir=Path(self.mark).parent) as file:
                file.write(bytes(4096))
        except OSError as error:
            return f"cannot write into {Path(self.mark).parent}: {os.strerror(error.errno)}"
        for folder in self.folders:
            if not Path(folder).is_dir():
                return f"does not see the folder {folder}"
        theirs = dict(programs())
        for name, wanted in self.programs:
            if theirs.get(name) != wanted:
                return f"has {name} {theirs.get(name, 'missing')}, and here it is {wanted}"
        return ""


def demand(folder: Path, folders: Sequence[Path], *, place: str = "--runs-dir") -> Demands:
    """That nodes see `folder`, this very one, and the others, and have the programs of this machine.

    The mark stays: jobs may begin long after the command has left.

    Raises:
        FileError: `folder` cannot be written to.
    """
    mark = folder.absolute() / MARK
    while not (key := _said(mark)):
        if (file := lock(mark, place=place)) is None:
            time.sleep(0.05)  # another command says it now
            continue
        with file:
            if not _said(mark):
                file.write(uuid.uuid4().hex.encode())
                os.fsync(file.fileno())
    return Demands(str(mark), key, tuple(str(other.absolute()) for other in folders), programs())


def _said(mark: Path) -> str:
    try:
        return mark.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
