"""Running a sweep's cells in processes of this machine: a few at a time, killed ones again, failed ones listed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbcd_cli.files import delete, write_text
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import to_toml
from mbcd_cli.sweep.packing import units
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.state import BUSY_CODE, DONE_CODE, FAILED_CODE, beside, read_failure, state
from mbcd_cli.sweep.task import Command

KILLS = 2
"""Times that a cell whose process was killed is begun again by one sweep."""
PATIENCE = 60.0
"""Seconds that the processes of a sweep that is stopped have for their last checkpoints."""
WORKER = "mbcd_cli.sweep.cell"
"""Module that trains and evaluates one cell: `python -m WORKER RUN_FOLDER THREADS`."""
PACKER = "mbcd_cli.sweep.pack"
"""Module that does so with several, as one population: `python -m PACKER THREADS WIDTH`, run folders on stdin."""


@dataclass(slots=True)
class Job:
    """A process and the cells that it trains: one, or a population."""

    cells: Sequence[Cell]
    packed: bool
    process: subprocess.Popen
    slot: int
    started: float


@dataclass(slots=True)
class Board:
    """What a sweep's state is, for the live table.

    Attributes:
        cells: all of the plan.
        done, failed: finished cells; `failed` with the error.
        running: jobs by slot.
        waiting: cells not begun.
        elsewhere: cells that another process works on.
        seconds: of every cell finished here.
    """

    cells: Sequence[Cell]
    done: list[Cell] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[int, Job] = field(default_factory=dict)
    waiting: deque[Cell] = field(default_factory=deque)
    elsewhere: deque[Cell] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)
    stopping: bool = False

    @property
    def seconds_left(self) -> float | None:
        """Expected time to the end, from the mean of the cells finished here."""
        if not self.seconds:
            return None
        mean = sum(self.seconds) / len(self.seconds)
        now = time.monotonic()
        under_way = sum(max(mean * len(job.cells) - (now - job.started), 0.0) for job in self.running.values())
        return (under_way + mean * len(self.waiting)) / max(len(self.running), 1)


def threads_per_job(jobs: int, asked: int) -> int:
    """CPU threads of one of `jobs` processes: what was asked for, else an even share of the usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(cores // jobs, 1)


def begin(cells: Sequence[Cell], *, retry_failed: bool) -> Board:
    """What is done, failed and waiting at the start; marks of failure are removed from those to be tried again."""
    board = Board(cells)
    for cell in cells:
        now = state(cell.folder)
        if now == "failed" and not retry_failed:
            board.failed[cell.key] = read_failure(cell.folder) or "unknown"
            continue
        # A cell may have failed after all that it writes was there.
        delete(beside(cell.folder, "failed"))
        (board.done if now == "done" else board.waiting).append(cell)
    return board


def write_settings(cell: Cell) -> Path:
    """Write the settings that the cell's process reads, whole or not at all.

    Raises:
        FileError: the folder cannot be written to.
    """
    path = beside(cell.folder, "toml")
    return write_text(path, to_toml(cell.settings, stamped=True), place="--runs-dir")


def command_of(cells: Sequence[Cell], *, threads: int, width: int | None = None) -> Command:
    """What begins the process of a cell, or of a population; its log is the first's `X.log`.

    Args:
        threads: CPU threads that it may use.
        width: trainings of a population under way at a time; None: as many as are quick.
    """
    folders = tuple(str(cell.folder.absolute()) for cell in cells)
    words = (WORKER, folders[0], str(threads)) if len(cells) == 1 else (PACKER, str(threads), str(width or 0))
    line = (sys.executable, "-m", *words)
    return Command(line, folders if len(cells) > 1 else (), threads, str(beside(cells[0].folder, "log").absolute()))


def execute(
    cells: Sequence[Cell],
    *,
    jobs: int,
    threads: int,
    width: int | None = 0,
    prepared: Mapping[str, Settings] | None = None,
    gpus: Sequence[str] = (),
    retry_failed: bool = False,
    watch: Callable[[Board], None] = lambda board: None,
    poll: float = 0.5,
) -> Board:
    """Run all cells that are not done, `jobs` at a time, and return how they ended.

    A cell whose process is killed is begun again (it resumes from its checkpoint), `KILLS` times at most. One that
    another sweep works on is waited for. SIGTERM and Ctrl-C stop the processes at a checkpoint.

    Args:
        jobs: processes at a time.
        threads: CPU threads of each.
        width, prepared: trainings that a process has under way at a time, as `packing.units` reads them.
        gpus: visible GPUs, dealt out by slot; empty leaves the choice to the cell's settings.
        retry_failed: run failed cells again.
        watch: called at every change and every `poll` seconds.

    Raises:
        KeyboardInterrupt: after the processes have stopped.
    """
    board = begin(cells, retry_failed=retry_failed)
    together = units(cells, width=width, jobs=jobs, prepared=prepared or {})
    kills: dict[str, int] = {}
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while board.waiting or board.running or board.elsewhere:
            _fill(board, together, jobs=jobs, threads=threads, width=width, gpus=gpus)
            watch(board)
            time.sleep(poll)
            for job in list(board.running.values()):
                if (code := job.process.poll()) is not None:
                    del board.running[job.slot]
                    _settle(board, job, code, kills)
            for _ in range(len(board.elsewhere)):
                cell = board.elsewhere.popleft()
                look_again(board, cell)
    finally:
        board.stopping = True
        _stop(board, watch)
        signal.signal(signal.SIGTERM, before)
    watch(board)
    return board


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fill(
    board: Board,
    together: Mapping[str, Sequence[Cell]],
    *,
    jobs: int,
    threads: int,
    width: int | None,
    gpus: Sequence[str],
) -> None:
    for slot in range(jobs):
        if slot not in board.running and board.waiting:
            cells = together[board.waiting[0].key]
            left = [cell for cell in cells if cell in board.waiting]
            for cell in left:
                board.waiting.remove(cell)
            gpu = gpus[slot % len(gpus)] if gpus else None
            for cell in left:
                write_settings(cell)
            process = command_of(cells, threads=threads, width=width).begin(gpu=gpu)
            board.running[slot] = Job(left, len(cells) > 1, process, slot, time.monotonic())


def _settle(board: Board, job: Job, code: int, kills: dict[str, int]) -> None:
    """Where the cells go whose process has ended with `code` (negative: the signal that killed it)."""
    seconds = (time.monotonic() - job.started) / len(job.cells)
    for cell in job.cells:
        own = code_of(cell, code) if job.packed else code
        settle_cell(board, cell, own, kills)
        if own == DONE_CODE:
            board.seconds.append(seconds)


def code_of(cell: Cell, code: int) -> int:
    """That of a cell in a population whose process ended with `code`: its folder tells; a stop or a kill is of all."""
    return {"done": DONE_CODE, "failed": FAILED_CODE, "running": BUSY_CODE}.get(state(cell.folder), code or -1)


def settle_cell(board: Board, cell: Cell, code: int, kills: dict[str, int]) -> None:
    """Where a cell goes whose process has ended with `code`: one that was killed waits again, `KILLS` times."""
    if code == DONE_CODE:
        board.done.append(cell)
    elif code == BUSY_CODE:
        board.elsewhere.append(cell)
    elif code == FAILED_CODE:
        board.failed[cell.key] = read_failure(cell.folder) or last_line(cell.folder)
    else:
        kills[cell.key] = kills.get(cell.key, 0) + 1
        if kills[cell.key] <= KILLS:
            board.waiting.appendleft(cell)
            return
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        board.failed[cell.key] = f"{how}, {kills[cell.key]} times (out of memory?); {beside(cell.folder, 'log')}"


def last_line(folder: Path) -> str:
    """The end of the log, for a process that failed before it could say why."""
    try:
        lines = beside(folder, "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "no output"


def look_again(board: Board, cell: Cell) -> None:
    """A cell that another process worked on: done, failed, still at work, or left for us."""
    now = state(cell.folder)
    if now == "done":
        board.done.append(cell)
    elif now == "failed":
        board.failed[cell.key] = read_failure(cell.folder) or "unknown"
    elif now == "running":
        board.elsewhere.append(cell)
    else:
        board.waiting.append(cell)


def _stop(board: Board, watch: Callable[[Board], None]) -> None:
    """Ask the running processes to write their checkpoints and end; those that do not within `PATIENCE` are killed."""
    for job in board.running.values():
        job.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for slot, job in list(board.running.items()):
        try:
            job.process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
        del board.running[slot]
        watch(board)
