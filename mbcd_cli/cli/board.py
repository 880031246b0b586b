"""A sweep as it runs: a live table on a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import time

from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from mbcd_cli import console
from mbcd_cli.launch.launch import Board
from mbcd_cli.sweep.state import progress

ROWS = 20
"""Of runs under way that the table shows."""


class Watch:
    """The sweep as it runs: a live table on a terminal, a line per finished run elsewhere."""

    def __init__(self) -> None:
        self._live = (
            Live(console=console.err, refresh_per_second=2, transient=True) if console.err.is_terminal else None
        )
        self._told: set[str] = set()
        self._names: dict[str, str] = {}
        self._done = 0
        self._first = True
        self._looked = 0.0

    def __enter__(self) -> Watch:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, board: Board) -> None:
        """Tell what is new on the board."""
        if self._first:
            self._first = False
            self._names = {piece.key: piece.name for unit in board.units for piece in unit.pieces}
            self._done = len(board.done)
            if board.done:
                console.say(f"{len(board.done)} of {board.total} runs are done already.")
        new = [piece.key for piece in board.done[self._done :]]
        self._done += len(new)
        for key in [*new, *(key for key in board.failed if key not in self._told)]:
            error = None if key in new else board.failed[key]
            self._told.add(key)
            number = f"{len(board.done) + len(board.failed)}/{board.total}"
            how = "done" if error is None else f"failed: {error.splitlines()[0]}"
            console.say(f"{number} {self._names[key]}: {how}")
        now = time.monotonic()
        if self._live is not None and now - self._looked > 1.0:
            self._looked = now
            self._live.update(_board_table(board))


def _board_table(board: Board) -> Grid:
    left = board.seconds_left
    title = (
        f"{len(board.done)} done, {len(board.running)} running, {board.queued} waiting, "
        f"{len(board.failed)} failed" + (f", {len(board.elsewhere)} elsewhere" if board.elsewhere else "")
    )
    title += f"; about {console.duration(left)} left" if left is not None else ""
    grid = Grid(title=title + ("; stopping" if board.stopping else ""), title_justify="left")
    away = any(board.running.values())
    for column in ("run", *(["where"] if away else []), "epoch", "validation", "target"):
        grid.add_column(column, justify="left" if column in ("run", "where") else "right")
    for key, where in list(board.running.items())[:ROWS]:
        cells = board.handed[key][0].pieces
        done = progress(cells[0].folder)
        figures = ["" if v is None else f"{100 * v:.1f}" for v in (done.validation, done.target)]
        name = cells[0].name + (f", and {len(cells) - 1} like it" if len(cells) > 1 else "")
        grid.add_row(Text(name), *([where] if away else []), str(done.epochs), *figures)
    return grid
