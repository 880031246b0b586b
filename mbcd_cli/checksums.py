"""Checksums that files carry in themselves (XXH3, 128 bits): a changed byte, or a file of before, is told.

A file keeps its own in a place of its format: an HDF5 file in its user block, a zip file (`.pt`) in its comment, a JSON
object in its last member, TOML in a last comment. It stands behind `xxh3-128:` and is computed as if it were zeros, so
that a file is whole or changed by itself, at any moment, wherever it is copied. It tells damage, not malice: who can
write a file can also give it a checksum.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import numpy as np

MARK = b"xxh3-128:"
_DIGITS = 32
PLACE = MARK.decode() + "0" * _DIGITS
"""What a text holds until `stamp` has filled it in."""
USER_BLOCK = 512
"""Bytes before an HDF5 file's first, for its checksum."""
TELLERS = ("index.h5", "done", "results.json", "comparison.json", "adaptation.json", "landscape.json")
"""Files that hold the checksums of others in their folder."""
PREPARED_WITH, TRAINED_WITH = "prepare.toml", "settings.toml"
"""Files of settings, of a cache and of a run."""
ANSWER = "unchanged-"
"""How the name of a kept answer begins: what `prepare` says where nothing has changed."""
_NAMED = (*TELLERS, PREPARED_WITH, TRAINED_WITH)
_NEAR_END = 1 << 12
_ZIP_END = b"PK\5\6"
_ZIP_END_BYTES = 22


class DamagedError(ValueError):
    """A file is not what was written, and why."""


class NoChecksumError(DamagedError):
    """A file carries no checksum."""


def stamp(path: Path, name: str = "") -> None:
    """Fill in the checksum of a file that is complete; files without a place for one stay as they are.

    Args:
        name: that it is going to have; by default the one it has.
    """
    with path.open("r+b") as file:
        start = file.read(USER_BLOCK)
        if start == bytes(USER_BLOCK):
            file.seek(0)
            file.write(PLACE.encode() + b"\n")
        elif start.startswith(b"PK"):
            file.seek(-_ZIP_END_BYTES, 2)
            if file.read(len(_ZIP_END)) == _ZIP_END:  # it has no comment yet
                file.seek(-2, 2)
                file.write(struct.pack("<H", len(PLACE)) + PLACE.encode())
        file.flush()
        if place := _place(path):
            file.seek(place)
            file.write(_computed(path, place, name or path.name))


def checksum(path: Path) -> str:
    """The checksum that a file carries, 32 hexadecimal digits; it is read, not computed.

    Raises:
        NoChecksumError: it has none. OSError: it cannot be read.
    """
    place = _place(path)
    if not place:
        raise NoChecksumError("it carries no checksum")
    with path.open("rb") as file:
        file.seek(place)
        return file.read(_DIGITS).decode(errors="replace")


def verified(path: Path) -> str:
    """`checksum`, once the file's bytes are found to be those that were written.

    Raises:
        DamagedError: they are not. OSError: it cannot be read.
    """
    told = checksum(path)
    if _computed(path, _place(path), path.name).decode() != told:
        raise DamagedError("its bytes are not those that were written")
    return told


def found_by_name(name: str) -> bool:
    """Whether files of that name are stamped with it, since they are found by it: none can stand for another."""
    return name in _NAMED or name.startswith(ANSWER)


def is_whole(path: Path) -> bool:
    """Whether a file carries a checksum and is what was written."""
    try:
        verified(path)
    except (OSError, DamagedError):
        return False
    return True


def of_file(path: Path) -> str:
    """XXH3 of all bytes of a file, for those that cannot carry their own."""
    return _computed(path, 0, "").decode()


def of_files(folder: Path, *parts: str, but: Collection[str] = ()) -> dict[str, str]:
    """`of_file` of every file under a folder, by its path in it.

    Args:
        parts: files and folders in it that alone are meant, of which some may be missing; by default everything.
        but: names that are left out.
    """
    roots = [folder / part for part in parts] or [folder]
    below = (path for root in roots for path in (root, *root.rglob("*")))
    files = sorted(path for path in below if path.is_file() and path.name not in but)
    return {path.relative_to(folder).as_posix(): of_file(path) for path in files}


def of_text(text: str) -> str:
    """XXH3 of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def of_bytes(array: np.ndarray) -> str:
    """XXH3 of an array's shape and bytes."""
    return xxhash.xxh3_128_hexdigest(repr(array.shape).encode() + array.tobytes())


def of_row(*parts: np.ndarray, clip: int, view: int) -> int:
    """XXH3 (64 bits) of the bytes of one row (parts [*]) and of whose it is, so that none can stand for another."""
    value = (clip << 16) + view + 1
    for part in parts:
        value = xxhash.xxh3_64_intdigest(part if part.flags.c_contiguous else part.copy(), seed=value)
    return value


def _place(path: Path) -> int:
    """Where the digits of a file's checksum are; 0 where it has none."""
    if path.exists() and not path.is_file():
        raise DamagedError("it is no plain file")
    with path.open("rb") as file:
        if file.read(len(MARK)) == MARK:
            return len(MARK)
        size = file.seek(0, 2)
        begin = max(size - _NEAR_END, 0)
        file.seek(begin)
        tail = file.read()
    at = tail.rfind(MARK)
    return 0 if at < 0 or at + len(PLACE) > len(tail) else begin + at + len(MARK)


def _computed(path: Path, place: int, name: str) -> bytes:
    """XXH3 of a file whose checksum is at `place` (0: it has none), as hexadecimal digits."""
    digest = xxhash.xxh3_128(name.encode() if found_by_name(name) else b"")
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return digest.hexdigest().encode()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
            if not place:
                digest.update(view)
            else:
                digest.update(view[:place])
                digest.update(b"0" * _DIGITS)
                digest.update(view[place + _DIGITS :])
    return digest.hexdigest().encode()
