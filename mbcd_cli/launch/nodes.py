"""What a node of a cluster has to have, before anything runs there: the folders, and the same programs."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import xxhash

from mbcd_cli.files import delete, write_text


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
        mark: file in the folder of the runs that it has to see, made by `demand`: a folder of that name may be another.
        folders: that it has to see. programs: as here.
    """

    mark: str
    folders: tuple[str, ...]
    programs: tuple[tuple[str, str], ...]

    def fault(self) -> str:
        """What this machine lacks, in words; empty: nothing."""
        if not Path(self.mark).is_file():
            return f"does not see the folder {Path(self.mark).parent}"
        for folder in self.folders:
            if not Path(folder).is_dir():
                return f"does not see the folder {folder}"
        theirs = dict(programs())
        for name, wanted in self.programs:
            if theirs.get(name) != wanted:
                return f"has {name} {theirs.get(name, 'missing')}, and here it is {wanted}"
        return ""


def demand(runs: Path, folders: Sequence[Path]) -> Demands:
    """That nodes see these very folders, and have the programs of this machine.

    Raises:
        FileError: `runs` cannot be written to.
    """
    mark = runs.absolute() / f".mbcd-{uuid.uuid4().hex[:12]}"
    write_text(mark, "A sweep looks whether other machines see this folder.\n", place="--runs-dir")
    return Demands(str(mark), tuple(str(folder.absolute()) for folder in folders), programs())


def release(demands: Demands) -> None:
    """Remove the file that `demand` made."""
    delete(Path(demands.mark))
