"""`mbcd verify`: flags, one library call, what it returned."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command
from mbcd_cli.errors import FileError

_Folders = Annotated[list[Path], typer.Argument(metavar="PATH", help="Folders of caches, runs, sweeps, landscapes.")]
_LINES = 20


@dataclass(frozen=True, slots=True)
class FolderVerified:
    """Of a folder's files: how many are whole, their bytes, what is wrong with which, roots of its caches and runs."""

    whole: int
    bytes: int
    seconds: float
    damaged: dict[str, str]
    missing: list[str]
    unchecked: list[str]
    unfinished: list[str]
    unprepared: list[str]
    roots: dict[str, str]

    @property
    def faults(self) -> list[str]:
        """What is damaged or missing, a line each; nothing of what is only not prepared to its end."""
        lines = [f"damaged: {file}: {why}" for file, why in self.damaged.items()]
        return lines + [f"missing: {file}" for file in self.missing if str(Path(file).parent) not in self.unprepared]

    @property
    def lines(self) -> list[str]:
        """What is wrong, a line each."""
        return [*self.faults, *(f"not finished: {folder}" for folder in (*self.unprepared, *self.unfinished))]


@dataclass(slots=True)
class Verified:
    """Folder -> what was found; 1 where something is damaged, missing or not prepared to its end."""

    paths: dict[str, FolderVerified] = field(default_factory=dict)
    exit_code: int = 0


@command(layered=False, examples=("mbcd verify cache", "mbcd verify runs landscape --json"))
def verify(asked: Asked, paths: _Folders) -> Reply:
    """Compare every byte of caches, runs, sweeps and landscapes with its checksum.

    Exit code 1 where something is damaged or missing, or a cache is not prepared to its end.
    """
    from mbcd_cli.integrity import examine

    result = Verified()
    for path in paths:
        total = _bytes_of(path)
        started = time.monotonic()
        with console.terminal.progress(f"{path}, MB", total >> 20) as ticker:
            done = 0

            def seen(size: int, ticker=ticker) -> None:
                nonlocal done
                ticker.advance(((done + size) >> 20) - (done >> 20))
                done += size

            state = examine(path, seen=seen)
        result.paths[str(path)] = FolderVerified(
            whole=len(state.whole),
            bytes=state.nbytes,
            seconds=round(time.monotonic() - started, 3),
            damaged={str(file): why for file, why in sorted(state.damaged.items())},
            missing=[str(file) for file in state.missing],
            unchecked=[str(file) for file in state.unchecked],
            unfinished=[str(folder) for folder in state.unfinished],
            unprepared=[str(folder) for folder in state.unprepared],
            roots={str(folder): root for folder, root in sorted(state.roots.items())},
        )
        result.exit_code |= int(bool(state.faults))
    return result, partial(show_verified, result)


def _bytes_of(path: Path) -> int:
    if not path.exists():
        raise FileError(f"There is no {path}.", "Name a folder of caches, runs, sweeps or landscapes.")
    try:
        return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.", "Mend its rights.") from error


def show_verified(result: Verified) -> None:
    """Print what `verify` found."""
    columns = ("path", "whole", "damaged", "missing", "unchecked", "GB", "GB/s")
    rows = []
    for path, folder in result.paths.items():
        counts = [folder.whole, len(folder.damaged), len(folder.missing), len(folder.unchecked)]
        rate = folder.bytes / max(folder.seconds, 1e-3) / 1e9
        rows.append([path, *counts, f"{folder.bytes / 1e9:.2f}", f"{rate:.1f}"])
    console.table("Files against their checksums", columns, rows)
    for folder in result.paths.values():
        for name, root in folder.roots.items():
            console.say(f"{name}: root {root}")
        for line in folder.lines[:_LINES]:
            console.say(line)
        if len(folder.lines) > _LINES:
            console.say(f"... and {len(folder.lines) - _LINES} more (--json lists all of them)")
    told = []
    if any(folder.faults for folder in result.paths.values()):
        told.append(
            "not everything is whole. `mbcd repair` computes the damaged parts of a cache anew; a run goes on "
            "from its last whole checkpoint with --resume, its results come from `mbcd evaluate`, a landscape's from "
            "`mbcd landscape`, once the damaged file is removed."
        )
    if any(folder.unprepared for folder in result.paths.values()):
        told.append(
            "A cache without index.h5 is not prepared to its end: run the same `mbcd prepare` again, it uses what is "
            "there."
        )
    if told:
        console.say(f"error: {' '.join(told)}")
