"""How the library tells a person what it is doing: it takes a `Say`. Only the command line's shows anything itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

PLAIN_SECONDS = 60.0
"""Between two lines about one piece of long work, where there is no terminal to draw a bar on."""


_FIGURE = re.compile(r"[-+]?[0-9.,]*( ?(±|\+-) ?[0-9.]+)?%?")


def are_figures(cells: Sequence[str]) -> bool:
    """Whether a table's column holds figures alone, which stand to the right; text stands to the left."""
    return bool(cells) and all(_FIGURE.fullmatch(cell) for cell in cells)


def pace(rate: float) -> str:
    """`rate` units a second, in words that tell slow ones apart, too."""
    return f"{rate:.1f}/s" if rate >= 0.2 else f"{1 / rate:.0f} s each"


class Ticker:
    """Handle on one piece of long work: `advance` it, `describe` it.

    Args:
        label, total: what it is, and of how many units.
        write: takes a line now and then; None tells nobody.
    """

    def __init__(self, label: str = "", total: int | None = None, write: Callable[[str], None] | None = None) -> None:
        self._label, self._total, self._write = label, total, write
        self._done = 0
        self._started = self._last = time.monotonic()
        self._note = ""

    def advance(self, steps: int = 1) -> None:
        """`steps` more units are done."""
        self._done += steps
        now = time.monotonic()
        if self._write is None or not self._done or now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        rate = self._done / max(now - self._started, 1e-9)
        total = f"/{self._total}" if self._total else ""
        left = ""
        if self._total:
            seconds = max(self._total - self._done, 0) / rate
            day = "%a %H:%M" if seconds > 43200 else "%H:%M"
            left = f", {seconds:.0f} s left, until {time.strftime(day, time.localtime(time.time() + seconds))}"
        self._write(f"{self._label}: {self._done}{total} ({pace(rate)}{left}) {self._note}".rstrip())

    def describe(self, note: str) -> None:
        """Show `note` (losses, rates) behind the progress."""
        self._note = note


class Say:
    """What the library says while it works: `say("a line")`. This one writes lines, or tells nobody.

    Args:
        write: takes each line, without its end.
    """

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write

    def __call__(self, message: str) -> None:
        """One line for a person."""
        if self._write is not None:
            self._write(message)

    def warn(self, message: str) -> None:
        """One warning line."""
        self(f"warning: {message}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table about the work, no result of it; here tabs stand between its cells."""
        for row in ([title], columns, *rows):
            self("\t".join(row))

    @contextmanager
    def progress(self, label: str, total: int | None = None) -> Iterator[Ticker]:
        """Long work under way inside the block; a line about it every `PLAIN_SECONDS`."""
        yield Ticker(label, total, self._write)

    def over(self, items: Iterable[T], label: str) -> Iterator[T]:
        """The items, with their progress while they are taken."""
        with self.progress(label) as ticker:
            for item in items:
                yield item
                ticker.advance()


SILENT = Say()
