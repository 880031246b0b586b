"""One rich console for people (on stderr), plain stdout for results, progress bars and tables."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
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

_PLAIN_WIDTH = 140


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PLAIN_WIDTH  # a pipe or a log file has no width of its own: the same everywhere
    return made


err = _console(stderr=True)
"""Messages, progress and warnings: stderr, so that stdout stays clean for `--json`."""
out = _console(stderr=False)
"""Results a person asked for: tables and paths."""

_PLAIN_SECONDS = 20.0
_FIGURE = re.compile(r"[-+]?[0-9.,]*( ?(±|\+-) ?[0-9.]+)?%?")


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


class Ticker:
    """Handle on one piece of long work: `advance` it, `describe` it."""

    def __init__(self, label: str, total: int | None, progress: Progress | None) -> None:
        self._label, self._total, self._progress = label, total, progress
        self._done = 0
        self._started = self._last = time.monotonic()
        self._note = ""
        self._task = progress.add_task(label, total=total, note="") if progress else None

    def advance(self, steps: int = 1) -> None:
        """`steps` more units are done."""
        self._done += steps
        if self._progress is not None:
            self._progress.advance(self._task, steps)
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_SECONDS:
            self._last = now
            rate = self._done / max(now - self._started, 1e-9)
            total = f"/{self._total}" if self._total else ""
            left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate > 0 else ""
            err.print(f"{self._label}: {self._done}{total} ({rate:.1f}/s{left}) {self._note}".rstrip(), markup=False)

    def describe(self, note: str) -> None:
        """Show `note` (losses, rates) behind the bar."""
        self._note = note
        if self._progress is not None:
            self._progress.update(self._task, note=note)


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Ticker]:
    """A progress bar with rate and time left on a terminal; elsewhere a plain line every 20 seconds."""
    if not err.is_terminal:
        yield Ticker(label, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        yield Ticker(label, total, bar)


@contextmanager
def silent(wanted: bool = True) -> Iterator[None]:
    """Nothing is printed inside the block, where that is `wanted`."""
    before = err.quiet, out.quiet
    try:
        if wanted:
            err.quiet = out.quiet = True
        yield
    finally:
        err.quiet, out.quiet = before


def say(message: str) -> None:
    """One line for a person, on stderr, without interpreting brackets as markup."""
    err.print(message, markup=False)


def warn(message: str) -> None:
    """One warning line on stderr."""
    err.print(Text("warning: ", style="yellow") + Text(message))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, to_stderr: bool = False) -> None:
    """Print a table; columns of figures are right-aligned, those with text left-aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        figures = bool(cells) and all(_FIGURE.fullmatch(row[index]) for row in cells)
        grid.add_column(column, justify="right" if figures else "left", overflow="fold")
    for row in cells:
        grid.add_row(*map(Text, row))
    (err if to_stderr else out).print(grid)


def emit_json(result: Any) -> None:
    """The one machine-readable object on stdout."""
    json.dump(result, sys.stdout, indent=2, allow_nan=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()
