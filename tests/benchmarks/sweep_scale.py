"""What a sweep of many cells costs the command itself: planning, looking, handing out, collecting. Nothing is trained.

    python tests/benchmarks/sweep_scale.py --cells 1000,10000,100000 --workers 512

A simulated engine with so many workers ends every unit at once, having written what a cell leaves (its time is not
counted). Milliseconds are of the processor, of one process. Calls of the system on files are strace's, of a second go;
without strace they are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[1] / "sweep"))
from sweep_cases import finish, plan_of, units_of

from mbcd_cli import files
from mbcd_cli.json_values import json_values
from mbcd_cli.launch.launch import Ended, begin, launch
from mbcd_cli.launch.unit import DONE_CODE, Unit, beside
from mbcd_cli.sweep import collect
from mbcd_cli.sweep.packing import units
from mbcd_cli.sweep.status import status_of
from mbcd_cli.sweep.sweep import write_tables

_RATES = 10
"""Values of the grid's axis; a cell in so many is of a new configuration, the others are its targets and seeds."""


class Simulated:
    """An engine whose workers end at once. `seconds`: of the processor, in what stands for them."""

    def __init__(self, workers: int) -> None:
        self.workers, self.seconds = workers, 0.0
        self._units: list[Unit] = []

    @property
    def room(self) -> int:
        return self.workers - len(self._units)

    def find(self, units: Sequence[Unit]) -> Sequence[Unit]:
        return []

    def submit(self, units: Sequence[Unit]) -> None:
        self._units += units
        for unit in units:
            unit.order(1)

    def wait(self, seconds: float) -> None:
        began = time.process_time()
        for unit in self._units:
            for cell in unit.pieces:
                beside(cell.folder, "log").touch()
                beside(cell.folder, "lock").touch()
                left_by(cell)
        self.seconds += time.process_time() - began

    def ended(self) -> Iterator[Ended]:
        ended, self._units = self._units, []
        yield from (Ended(unit, DONE_CODE) for unit in ended)

    def running(self) -> Mapping[str, str]:
        return {}

    def stop(self) -> None:
        pass


def left_by(cell) -> None:
    """What a finished cell leaves, as far as anybody looks at it afterwards, without waiting for the disk."""
    with patch.object(files, "sync"):
        finish(cell, top1=0.5 + (int(cell.key, 16) % 1000) / 4000)
    (cell.folder / "settings.toml").write_text("")


def spent(call: Callable[[], Any], *, without: Callable[[], float] = lambda: 0.0) -> tuple[Any, float]:
    """What a call returns, and its seconds of the processor."""
    began, before = time.process_time(), without()
    found = call()
    return found, time.process_time() - began - (without() - before)


def calls(call: Callable[[], object]) -> dict[str, int]:
    """Calls of the system on files that `call` makes, by name."""
    if shutil.which("strace") is None:
        return {}
    with tempfile.NamedTemporaryFile() as told:
        kinds = "trace=%file,getdents64,flock,fsync"
        command = ["strace", "-f", "-c", "-e", kinds, "-o", told.name, "-p", str(os.getpid())]
        strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        strace.stderr.readline()  # attached
        call()
        strace.send_signal(signal.SIGINT)
        strace.wait()
        text = Path(told.name).read_text()
    rows = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", text, flags=re.MULTILINE)
    return {name: int(count) for count, name in rows if name != "total"}


def tell(what: str, seconds: float, count: int, made: Mapping[str, int] | None = None) -> None:
    counts = (
        ""
        if made is None
        else "  " + ", ".join(f"{n / count:.2f} {name}" for name, n in made.items() if n >= count / 20)
    )
    print(f"{count:8d}  {what:32s} {1000 * seconds / count:9.3f} ms a cell  {seconds:9.2f} s{counts}", flush=True)


def measure(folder: Path, count: int, workers: int, *, counted: bool, look_only: bool) -> None:
    rates = ",".join(f"{0.001 + 0.0001 * at:.4f}" for at in range(_RATES))
    asked = {"methods": "erm,mbcd", "targets": "all", "grid": (f"optimizer.lr={rates}",)}
    seeds = max(count // (2 * 3 * _RATES), 1)

    def plan():
        return plan_of("hac", runs=folder / "runs", seeds=str(seeds), **asked)

    cells, seconds = spent(plan)
    count = len(cells)
    tell("plan", seconds, count)
    _, seconds = spent(lambda: units(cells, width=None, jobs=workers))
    tell("deal out to processes", seconds, count)
    (cells[0].folder.parent).mkdir(parents=True)
    wanted = units_of(cells)
    board, seconds = spent(lambda: begin(wanted, retry_failed=False))
    tell("look at what is there: nothing", seconds, count)
    engine = Simulated(workers)
    if look_only:
        for cell in cells:
            cell.folder.mkdir()
            for name in ("settings.toml", "done", "results.json"):
                (cell.folder / name).touch()
    else:
        _, seconds = spent(lambda: launch(board, engine, poll=0.0), without=lambda: engine.seconds)
        tell(f"hand out to {workers} workers", seconds, count)
    look = lambda: begin(wanted, retry_failed=False)  # noqa: E731
    _, seconds = spent(look)
    tell("look at what is there: all", seconds, count, calls(look) if counted else None)
    status = lambda: json_values(status_of(cells))  # noqa: E731
    _, seconds = spent(status)
    tell("--status", seconds, count, calls(status) if counted else None)
    if look_only:
        return
    load = lambda: collect.load(cells)  # noqa: E731
    _, seconds = spent(load)
    tell("read the results", seconds, count, calls(load) if counted else None)
    _, seconds = spent(lambda: write_tables(cells, output=folder / "tables", title="many"))
    tell("read and write the tables", seconds, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="1000,10000")
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the runs go: of the file system to be measured")
    parser.add_argument("--no-calls", action="store_true", help="do not count calls of the system")
    parser.add_argument("--look", action="store_true", help="only plan and look: nothing is handed out or collected")
    arguments = parser.parse_args()
    for count in map(int, arguments.cells.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(Path(folder), count, arguments.workers, counted=not arguments.no_calls, look_only=arguments.look)


if __name__ == "__main__":
    main()
