"""A sweep as it runs: a live table on a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import time

from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from mbcd_cli import console
from mbcd_cli.sweep.run import Board
from mbcd_cli.sweep.state import progress


class Watch:
    """The sweep as it runs: a live table on a terminal, a line per finished run elsewhere."""

    def __init__(self) -> None:
        self._live = (
            Live(console=console.err, refresh_per_second=2, transient=True) if console.err.is_terminal else None
        )
        self._told: set[str] = set()
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
            self._told = {cell.key for cell in board.done}
            if board.done:
                console.say(f"{len(board.done)} of {len(board.cells)} runs are done already.")
        names = {cell.key: cell.name for cell in board.cells}
        for key in [cell.key for cell in board.done] + list(board.failed):
            if key not in self._told:
                self._told.add(key)
                error = board.failed.get(key)
                number = f"{len(board.done) + len(board.failed)}/{len(board.cells)}"
                how = "done" if error is None else f"failed: {error.splitlines()[0]}"
                console.say(f"{number} {names[key]}: {how}")
        now = time.monotonic()
        if self._live is not None and now - self._looked > 1.0:
            self._looked = now
            self._live.update(_board_table(board))


def _board_table(board: Board) -> Grid:
    left = board.seconds_left
    title = (
        f"{len(board.done)} done, {len(board.running)} running, {len(board.waiting)} waiting, "
        f"{len(board.failed)} failed" + (f", {len(board.elsewhere)} elsewhere" if board.elsewhere else "")
    )
    title += f"; about {console.duration(left)} left" if left is not None else ""
    grid = Grid(title=title + ("; stopping" if board.stopping else ""), title_justify="left")
    for column in ("run", "epoch", "validation", "target", "time"):
        grid.add_column(column, justify="left" if column == "run" else "right")
    for _, job in sorted(board.running.items()):
        cell = job.cells[0]
        done = progress(cell.folder)
        figures = ["" if v is None else f"{100 * v:.1f}" for v in (done.validation, done.target)]
        name = cell.name + (f", and {len(job.cells) - 1} like it" if len(job.cells) > 1 else "")
        epoch = f"{done.epochs}/{cell.settings.training.epochs}"
        grid.add_row(Text(name), epoch, *figures, console.duration(time.monotonic() - job.started))
    return grid
