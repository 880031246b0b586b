"""Reading CSV tables so that every bad line is found at once, and checking the names and paths in their cells."""

from __future__ import annotations

import csv
import posixpath
import re
import unicodedata
from pathlib import Path

from mbcd_cli.errors import ManifestError

_LISTED = 200
_REMEDY = "Correct these lines (they count from 1, the header); nothing was written."


class Table:
    """Header and rows of a CSV file, decoded line by line so that one bad line does not hide the others.

    Attributes:
        header: the first line's cells.
        rows: (line number, cells) of each readable, non-blank line after it; lines count from 1, the header.
        problems: (line number, cause) of each line that is not UTF-8 or not CSV.
    """

    def __init__(self, data: bytes) -> None:
        self.problems: list[tuple[int, str]] = []
        self.rows: list[tuple[int, list[str]]] = []
        self.header: list[str] = []
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for number, raw in enumerate(lines, start=1):
            cells = self._cells(number, raw.rstrip(b"\r"))
            if number == 1:
                self.header = cells or []
            elif cells:
                self.rows.append((number, cells))

    def _cells(self, number: int, raw: bytes) -> list[str] | None:
        if not raw.strip():
            return None
        try:
            (cells,) = csv.reader([raw.decode("utf-8")], strict=True)
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            self.problems.append((number, f"not UTF-8 (byte 0x{byte:02X} at column {error.start + 1})"))
            return None
        except (csv.Error, ValueError) as error:
            self.problems.append((number, f"not CSV ({error})"))
            return None
        return [cell.strip() for cell in cells]


def read_bytes(path: Path) -> bytes:
    """A table's bytes.

    Raises:
        ManifestError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}).", "Check its permissions.") from None


def lines_error(path: Path, problems: list[tuple[int, str]]) -> ManifestError:
    """One error that lists every (line, what is wrong with it)."""
    lines = [f"  line {line}: {text}" for line, text in problems[:_LISTED]]
    if len(problems) > _LISTED:
        lines.append(f"  ... and {len(problems) - _LISTED} more")
    count = len({line for line, _ in problems})
    head = f"{path}: {count} bad line{'' if count == 1 else 's'}."
    return ManifestError("\n".join([head, *lines]), _REMEDY)


def name_faults(what: str, value: str) -> list[str]:
    """Ids and domains become file names, command-line words and table cells."""
    if not value:
        return [f"{what} is empty"]
    if (
        len(value.encode()) > 200
        or value.startswith((".", "-"))
        or re.search(r'[/\\:*?"<>|]', value)
        or any(unicodedata.category(character)[0] == "C" for character in value)
    ):
        return [f"{what} {value[:60]!r} cannot serve as a name"]
    return []


def inside(root: Path, cell: str) -> Path | None:
    """The path a cell names, or None when it is empty, absolute or leads out of the root.

    Links are not followed: datasets are often put together from links to other disks.
    """
    return None if path_fault(cell) else root / posixpath.normpath(cell)


def path_fault(cell: str) -> str:
    """What is wrong with a path relative to a root, or an empty string."""
    if not cell:
        return "no file is named"
    if "\0" in cell:
        return f"{cell!r} is not a path"
    if cell.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:[\\/]", cell):
        return f"{cell!r} is not relative to the dataset's root"
    if ".." in posixpath.normpath(cell.replace("\\", "/")).split("/"):
        return f"{cell!r} leaves the dataset's root"
    return ""
