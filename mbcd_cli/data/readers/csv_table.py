"""Reading CSV tables so that every bad line is found at once, and checking the names and paths in their cells."""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

from mbcd_cli.errors import ManifestError

_LISTED = 200
_REMEDY = "Correct these lines (they count from 1, the header); nothing was written."


_LINES_OF_ROW = 100
_PLAIN = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}/){0,20}[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
"""Paths in which there is nothing to find fault with."""


class CsvTable:
    """Header and rows of a CSV file, decoded line by line so that one bad line does not hide the others.

    Attributes:
        header: the first line's cells.
        rows: (line number, cells) of each readable, non-blank line after it; lines count from 1, the header. Of a table
            without quotes they are made each time they are gone through.
        problems: (line number, cause) of each line that is not UTF-8 or not CSV.
    """

    def __init__(self, data: bytes) -> None:
        self.problems: list[tuple[int, str]] = []
        self.rows: Iterable[tuple[int, list[str]]]
        self.header: list[str] = []
        plain = _PlainRows(data)
        if plain.holds():
            self.header, self.rows = plain.header, plain
            return
        self.rows = []
        lines = re.split(rb"\r\n|\n|\r", data.removeprefix(b"\xef\xbb\xbf"))
        at = 0
        while at < len(lines):
            number, joined = at + 1, self._joined(lines, at)
            cells = self._cells(number, b"\n".join(lines[at : at + joined]))
            at += joined
            if number == 1:
                self.header = cells or []
            elif cells and any(cells):  # spreadsheets leave lines of empty cells
                self.rows.append((number, cells))

    def _joined(self, lines: list[bytes], at: int) -> int:
        """How many lines a row takes: a quoted cell may hold line ends. A quote left open spoils its own line only."""
        quotes = 0
        for count, line in enumerate(lines[at : at + _LINES_OF_ROW], start=1):
            quotes += line.count(b'"')
            if quotes % 2 == 0:
                if count > 1 and len(_split(b"\n".join(lines[at : at + count])) or ()) != len(self.header):
                    break
                return count
        return 1

    def _cells(self, number: int, raw: bytes) -> list[str] | None:
        if not raw.strip():
            return None
        try:
            cells = _split(raw, strict=True)
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            self.problems.append((number, f"not UTF-8 (byte 0x{byte:02X} at column {error.start + 1})"))
            return None
        except (csv.Error, ValueError) as error:
            cause = "a quote is not closed" if "unexpected end of data" in str(error) else f"not CSV ({error})"
            self.problems.append((number, cause))
            return None
        return cells


class _PlainRows:
    """The rows of a table of UTF-8 without quotes, where every line is a row and every comma ends a cell.

    The general way takes 15 times as long (200,000 rows: 2.5 s instead of 0.17 s), and holds all rows.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data.removeprefix(b"\xef\xbb\xbf")
        self.header: list[str] = []

    def holds(self) -> bool:
        """Whether the table is such a one; if so its header is read."""
        if b'"' in self._data:
            return False
        try:
            for number, line in self._lines():
                if number == 1 and line.strip():
                    self.header = [cell.strip() for cell in line.split(",")]
                if len(line) >= csv.field_size_limit():
                    return False
        except UnicodeDecodeError:
            return False
        return True

    def _lines(self) -> Iterator[tuple[int, str]]:
        with TextIOWrapper(BytesIO(self._data), "utf-8", newline=None) as lines:
            yield from enumerate(lines, start=1)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        for number, line in self._lines():
            cells = [cell.strip() for cell in line.split(",")]
            if number > 1 and any(cells):
                yield number, cells


def _split(raw: bytes, *, strict: bool = False) -> list[str] | None:
    """Cells of one row; None where it is none, or with `strict` the error that it raises."""
    try:
        (cells,) = csv.reader(StringIO(raw.decode("utf-8"), newline=""), strict=True)
    except (csv.Error, ValueError):
        if strict:
            raise
        return None
    return [re.sub(r"\s*[\r\n]+\s*", " ", cell.strip()) for cell in cells]


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


@lru_cache(maxsize=256)
def inside(root: Path, cell: str) -> Path | None:
    """The path a cell names, or None when it is empty, absolute or leads out of the root.

    Links are not followed: datasets are often put together from links to other disks.
    """
    if _PLAIN.fullmatch(cell):  # nearly all are, and there may be a million: 1.7 times as long without
        return root / cell
    return None if path_fault(cell) else root / posixpath.normpath(cell)


def path_fault(cell: str) -> str:
    """What is wrong with a path relative to a root, or an empty string."""
    if not cell:
        return "no file is named"
    if "\0" in cell:
        return f"{cell!r} is not a path"
    if len(cell.encode(errors="replace")) > 4000 or any(
        len(part.encode(errors="replace")) > 255 for part in cell.split("/")
    ):
        return f"{cell[:40]!r}... is longer than a file system takes"
    if cell.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:[\\/]", cell):
        return f"{cell!r} is not relative to the dataset's root"
    if ".." in posixpath.normpath(cell.replace("\\", "/")).split("/"):
        return f"{cell!r} leaves the dataset's root"
    return ""
