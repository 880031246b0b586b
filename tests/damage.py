"""Random damage to what commands leave, as disks, copies and people do it; and the folder as it was."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KINDS = ("bit", "byte run", "zeros", "truncated", "grown", "emptied", "deleted", "swapped", "duplicated", "stale")


@dataclass
class Snapshot:
    """Bytes of every file under a folder."""

    folder: Path
    files: dict[Path, bytes]

    @staticmethod
    def of(folder: Path) -> Snapshot:
        return Snapshot(folder, {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})

    def restore(self) -> None:
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.files:
                path.unlink()
        for path, data in self.files.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def differs(self) -> list[Path]:
        """Files that are not as they were, but for locks: who held one last stands in it."""
        there = {p for p in self.folder.rglob("*") if p.is_file()}
        changed = [p for p, data in self.files.items() if p not in there or p.read_bytes() != data]
        return sorted(p for p in {*changed, *(there - set(self.files))} if p.name != ".lock")


def strike(path: Path, others: list[Path], rng: np.random.Generator, *, stale: bytes | None = None) -> str | None:
    """Damage one file somehow; what was done, or None where this changed nothing.

    Args:
        others: files that it may be swapped with or replaced by (of its kind).
        stale: what it held in an earlier state of the folder, where there is one.
    """
    kind = KINDS[rng.integers(len(KINDS))]
    data = bytearray(path.read_bytes())
    before = bytes(data)
    at = int(rng.integers(len(data))) if data else 0
    run = slice(at, at + int(rng.integers(1, 4096)))
    if kind == "bit" and data:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte run" and data:
        data[run] = rng.integers(0, 256, len(data[run]), np.uint8).tobytes()
    elif kind == "zeros":
        data[run] = bytes(len(data[run]))
    elif kind == "truncated":
        del data[at:]
    elif kind == "grown":
        data += rng.integers(0, 256, 100, np.uint8).tobytes()
    elif kind == "emptied":
        data.clear()
    elif kind == "deleted":
        path.unlink()
        return kind
    elif kind in ("swapped", "duplicated") and others:
        other = others[rng.integers(len(others))]
        data = bytearray(other.read_bytes())
        if kind == "swapped":
            other.write_bytes(before)
    elif kind == "stale" and stale is not None:
        data = bytearray(stale)
    if bytes(data) == before:
        return None
    path.write_bytes(data)
    return kind


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
