"""Units in processes of this machine, a few at a time."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator, Mapping, Sequence

from mbcd_cli.launch.launch import Ended
from mbcd_cli.launch.unit import Unit
from mbcd_cli.launch.worker import PATIENCE, Worker


def threads_per_job(jobs: int, asked: int) -> int:
    """CPU threads of one of `jobs` processes: what was asked for, else an even share of the usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(cores // jobs, 1)


class Local:
    """The engine of this machine: `jobs` warm processes, begun when they are wanted.

    Args:
        threads: CPU threads of each; 0: an even share.
        gpus: visible GPUs, dealt out by process; empty leaves the choice to the unit's settings.
    """

    def __init__(self, *, jobs: int, threads: int = 0, gpus: Sequence[str] = ()) -> None:
        each = threads_per_job(jobs, threads)
        self._workers = [Worker(threads=each, gpu=gpus[at % len(gpus)] if gpus else None) for at in range(jobs)]
        self._units: dict[Worker, Unit] = {}

    @property
    def room(self) -> int:
        return len(self._workers) - len(self._units)

    def find(self, units: Sequence[Unit]) -> Sequence[Unit]:
        return []

    def submit(self, units: Sequence[Unit]) -> None:
        idle = (worker for worker in self._workers if worker not in self._units)
        for unit, worker in zip(units, list(idle), strict=False):
            worker.begin(unit.order(worker.threads))
            self._units[worker] = unit

    def wait(self, seconds: float) -> None:
        select.select([worker.process.stdout for worker in self._units], [], [], seconds)

    def ended(self) -> Iterator[Ended]:
        for worker, unit in list(self._units.items()):
            if (code := worker.poll()) is not None:
                del self._units[worker]
                yield Ended(unit, code)

    def running(self) -> Mapping[str, str]:
        return {unit.pieces[0].key: "" for unit in self._units.values()}

    def stop(self) -> None:
        """Ask the running processes to write their checkpoints and end; late ones are killed (`PATIENCE`)."""
        for worker in self._workers:
            worker.terminate()
        end = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.close(end - time.monotonic())
        self._units.clear()
