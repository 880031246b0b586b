"""One rich console for people (on stderr), plain stdout for results, progress bars and tables."""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mbcd_cli.files import write_table
from mbcd_cli.say import Say, Ticker, are_figures, pace

_PLAIN_WIDTH = 140
_BLANKS = re.compile(r"(?<!±)\s+(?!±)")
"""Where a line of a table may end: a figure and its spread are one."""


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PLAIN_WIDTH  # a pipe or a log file has no width of its own: the same everywhere
    return made


err = _console(stderr=True)
"""Messages, progress and warnings: stderr, so that stdout stays clean for `--json`."""
out = _console(stderr=False)
"""Results a person asked for: tables and paths."""

tables_folder: Path | None = None
"""Where every table that is printed is written as CSV too; None: nowhere."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(pace(speed) if speed else "")


class _Progress(Progress):
    """The note stands on a line of its own: beside the bar a narrow terminal has no room for it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


class _Bar(Ticker):
    def __init__(self, label: str, total: int | None, bar: Progress) -> None:
        super().__init__()
        self._bar = bar
        self._task = bar.add_task(label, total=total, note="")

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)

    def describe(self, note: str) -> None:
        self._bar.update(self._task, note=note)


def _as_it_is(text: str) -> Text:
    """Without markup; what would steer a terminal (names are others'), or is no text, spelled out."""
    return Text(text.translate(_CONTROLS).encode(errors="backslashreplace").decode())


def say(message: str) -> None:
    """One line for a person, on stderr."""
    err.print(_as_it_is(message))


def warn(message: str) -> None:
    """One warning line on stderr."""
    err.print(Text("warning: ", style="yellow") + _as_it_is(message))


def show(*lines: str) -> None:
    """Lines of a result, on stdout."""
    for line in lines:
        out.print(_as_it_is(line))


class Terminal(Say):
    """What the library says, on stderr; a bar with rate and time left on a terminal."""

    def warn(self, message: str) -> None:
        warn(message)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table(title, columns, rows, to_stderr=True)

    @contextmanager
    def progress(self, label: str, total: int | None = None) -> Iterator[Ticker]:
        if not err.is_terminal:
            yield Ticker(label, total, say)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with _Progress(*columns, console=err, transient=True) as bar:
            yield _Bar(label, total, bar)


terminal = Terminal(say)
"""What commands hand to the library."""


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    to_stderr: bool = False,
    most: int | None = None,
) -> None:
    """Print a table, its first `most` rows; columns of figures are right-aligned, those with text left-aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    if tables_folder is not None:
        write_table(tables_folder / f"{_file_name(title)}.csv", columns, cells, place="--csv")
    hidden = 0 if most is None else max(len(cells) - most, 0)
    cells = cells[: len(cells) - hidden]
    to = err if to_stderr else out
    padding, widths = _layout([columns, *cells], to.width)
    grid = Table(title=_as_it_is(title), title_justify="left", title_style="bold", padding=(0, padding))
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        justify = "right" if are_figures([row[index] for row in cells]) else "left"
        grid.add_column(_as_it_is(column), justify=justify, overflow="fold", width=width)
    for row in cells:
        grid.add_row(*map(_as_it_is, row))
    to.print(grid)
    if hidden:
        to.print(f"... and {hidden} more rows (--json has all of them, and so have the files of --csv)", markup=False)


def _layout(rows: Sequence[Sequence[str]], width: int) -> tuple[int, list[int]]:
    """Spaces beside a cell, and the width of each column, for a screen of `width`: words are broken only where they
    have to be, and the longest first. (rich narrows the widest columns, whatever stands in them.)"""
    columns = [[str(_as_it_is(cell)) for cell in column] for column in zip(*rows, strict=True)]
    least = [max(cell_len(word) for cell in column for word in _BLANKS.split(cell)) for column in columns]
    widths = [max(cell_len(line) for cell in column for line in cell.splitlines() or [""]) for column in columns]
    room = [width - 1 - len(columns) * (1 + 2 * padding) for padding in (0, 1)]
    padding = int(sum(least) <= room[1])
    while sum(widths) > max(room[padding], len(columns)):
        widths[max(range(len(columns)), key=lambda k: (widths[k] > least[k], widths[k]))] -= 1
    return padding, widths


def _file_name(title: str) -> str:
    """Letters and digits of a title, of any script; a long one, which others may begin like, with its checksum."""
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return name if 0 < len(name.encode()) <= 200 else f"{name[:50]}-{zlib.crc32(title.encode()):08x}"


def emit_json(result: object) -> None:
    """The one machine-readable object on stdout."""
    json.dump(result, sys.stdout, indent=2, allow_nan=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """45 -> "45 s", 5400 -> "1.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
