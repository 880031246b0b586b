"""One rich console for people (on stderr), plain stdout for results, progress bars and tables."""

from __future__ import annotations

import json
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

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Messages, progress and warnings: stderr, so that stdout stays clean for `--json`."""
out = Console(highlight=False, soft_wrap=True)
"""Results a person asked for: tables and paths."""

_PLAIN_SECONDS = 20.0


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
            err.print(
                f"{self._label}: {self._done}{total} ({rate:.1f}/s{left}) {self._note}".rstrip(), markup=False
            )

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


def say(message: str) -> None:
    """One line for a person, on stderr, without interpreting brackets as markup."""
    err.print(message, markup=False)


def warn(message: str) -> None:
    """One warning line on stderr."""
    err.print(Text("warning: ", style="yellow") + Text(message))


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, to_stderr: bool = False
) -> None:
    """Print a table; the first column is left-aligned text, the others are right-aligned figures."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    (err if to_stderr else out).print(grid)


def emit_json(result: Any) -> None:
    """The one machine-readable object on stdout."""
    json.dump(result, sys.stdout, indent=2, sort_keys=True, allow_nan=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()
