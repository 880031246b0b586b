"""How far a sweep is, on whatever machines: told by the folders alone, so that any terminal can ask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.launch.slurm import jobs_left
from mbcd_cli.launch.unit import beside, holder, last_lines, read_failure
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.state import progress, state

_LINES = 3
"""Of a failed run's log."""
WINDOW = 3600.0
"""Seconds back from now in which the rate is measured."""


@dataclass(frozen=True, slots=True)
class RunningRun:
    """A run under way: where, for how many seconds, epochs done and asked for."""

    name: str
    run: str
    host: str
    seconds: float | None
    epochs: int
    of: int


@dataclass(frozen=True, slots=True)
class FailedRun:
    """A run that failed: its error, and the last lines of its log."""

    name: str
    run: str
    error: str
    log: list[str]


@dataclass(frozen=True, slots=True)
class SweepStatus:
    """How far a sweep is.

    Attributes:
        total, done: runs. waiting: not begun, or cut off. queued: of those, with a job of Slurm (where Slurm cannot be
            asked from here: with one that was not seen to end).
        per_hour: runs finished, over the last hour. seconds_left: to the end at that rate; None: not known.
    """

    total: int
    done: int
    running: list[RunningRun]
    waiting: int
    queued: int
    failed: list[FailedRun]
    per_hour: float | None = field(default=None, metadata=OPTIONAL)
    seconds_left: float | None = field(default=None, metadata=OPTIONAL)


def status_of(cells: Sequence[Cell]) -> SweepStatus:
    """Look at every run folder once; nothing is written."""
    now, ends, done = time.time(), [], 0
    running: list[RunningRun] = []
    failed: list[FailedRun] = []
    waiting, jobs = 0, []
    for cell in cells:
        stands = state(cell.folder)
        if stands == "done":
            done += 1
            with suppress(OSError):
                ends.append((cell.folder / "results.json").stat().st_mtime)
        elif stands == "running":
            held = holder(cell.folder)
            running.append(
                RunningRun(
                    cell.name,
                    str(cell.folder),
                    held.host if held else "",
                    max(now - held.since, 0.0) if held else None,
                    progress(cell.folder).epochs,
                    cell.settings.training.epochs,
                )
            )
        elif stands == "failed":
            log = last_lines(cell.folder, _LINES)
            failed.append(FailedRun(cell.name, str(cell.folder), read_failure(cell.folder) or "unknown", log))
        else:
            waiting += 1
            with suppress(OSError):
                jobs.append(beside(cell.folder, "job").read_text(encoding="utf-8").strip())
    left = jobs_left() if jobs else None  # one of a command that was killed may be long over
    queued = len(jobs) if left is None else sum(job in left for job in jobs)
    recent = [end for end in ends if end > now - WINDOW]
    # From the end of the one before the first of them, or from the first: n runs end n - 1 times after it.
    before = max((end for end in ends if end <= now - WINDOW), default=None)
    per_hour = None
    if recent and (before is not None or len(recent) > 1):
        since = now - WINDOW if before is not None else min(recent)
        per_hour = 3600.0 * (len(recent) - (before is None)) / max(now - since, 1e-3)
    seconds_left = 3600.0 * (len(running) + waiting) / per_hour if per_hour else None
    return SweepStatus(len(cells), done, running, waiting, queued, failed, per_hour, seconds_left)
