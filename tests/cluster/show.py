"""What the shows on real clusters share: many small units while nodes and the command die; what a unit costs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean

import helpers
from sweep_cases import plan_of
from test_cache import contents, same, settings_for

from mbcd_cli.launch.unit import beside
from mbcd_cli.preparation.prepare import prepare

SWEEP = Path(__file__).resolve().parents[1] / "sweep"
_COMMAND = """
import json, sys, time
from pathlib import Path
from sweep_cases import plan_of, units_of
from mbcd_cli.launch import slurm
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.launch import begin, launch
from mbcd_cli.sweep import run

run.CELL, slurm._LOOK = "fake_worker:serve", 1.0
cells = plan_of("hac", runs=Path(sys.argv[1]), targets="human", methods="erm", seeds=sys.argv[2])
board = begin(units_of(cells), retry_failed=False)
began = time.monotonic()
engine = Launching(**json.loads(sys.argv[3])).engine(cells[0].settings, cells[0].folder.parent, sees=[])
launch(board, engine)
print(json.dumps([len(board.done), list(board.failed.values()), time.monotonic() - began]))
"""

_PREPARE = """
import json, sys
from pathlib import Path
from test_cache import settings_for
from mbcd_cli.launch.engines import Launching
from mbcd_cli.preparation.launched import prepare_launched

settings = settings_for(Path(sys.argv[1]), Path(sys.argv[2]), "cache.shard_clips=1")
how = Launching(**json.loads(sys.argv[3]))
print(len(prepare_launched(settings, how=how, corruptions=(), severities=(1,)).rejected))
"""


def lay_out(runs: Path, count: int, words: str) -> list:
    """Cells whose fake workers are told these words."""
    cells = plan_of("hac", runs=runs, targets="human", methods="erm", seeds=str(count))
    cells[0].folder.parent.mkdir(parents=True)
    for cell in cells:
        beside(cell.folder, "say").write_text(words)
    return cells


def submit(runs: Path, count: int, how: Mapping[str, object]) -> subprocess.Popen:
    """A command that runs those cells, and says how many are done, why others failed, and its seconds."""
    path = f"{SWEEP}{os.pathsep}{SWEEP.parents[1]}"
    return helpers.run(_COMMAND, runs, count, json.dumps(how), PYTHONPATH=path)


def seconds_of(command: subprocess.Popen, count: int) -> float:
    """What it took, once it has ended with all of `count` done."""
    said, errors = command.communicate()
    assert command.returncode == 0, errors[-2000:]
    *told, seconds = json.loads(said.splitlines()[-1])
    assert told == [count, []]
    return seconds


def cost(folder: Path, how: Mapping[str, object]) -> str:
    """Units that sleep, two at a time, on this machine and by the launcher `how`: a line each."""
    lines = []
    for seconds, count in ((10, 8), (1, 30)):
        for each in ({"launcher": "local", "jobs": 2}, how):
            runs = folder / f"{each['launcher']}-{seconds}"
            cells = lay_out(runs, count, f"wait-{seconds}")
            took = seconds_of(submit(runs, count, each), count)
            ends = sorted((cell.folder / "results.json").stat().st_mtime for cell in cells)
            between = mean(later - earlier for earlier, later in zip(ends, ends[2:], strict=False))
            lines.append(f"{each['launcher']}: {count} of {seconds} s in {took:.1f} s, {between:.2f} s in between")
    return "\n".join(lines)


def show_sweep(folder: Path, how: Mapping[str, object], **trouble: Callable) -> str:
    """Run `UNITS` units of a fifth of a second while nodes and the command die; what it took.

    Args:
        how: of `Launching`. trouble: of `_through`.

    Raises:
        AssertionError: a unit is lost, failed, was trained twice to its end, or to another end than on this machine.
    """
    runs, count = folder / "runs", _units()
    cells = lay_out(runs, count, "wait-0.2 " * 20)
    command, told = _through(
        lambda: submit(runs, count, how), lambda: sum(1 for _ in runs.glob("*/*/results.json")), count, **trouble
    )
    seconds_of(command, count)
    calls, ends = (
        [len(beside(cell.folder, suffix).read_text().splitlines()) for cell in cells] for suffix in ("calls", "ends")
    )
    assert ends == [1] * count
    seconds_of(submit(folder / "local", count, {"jobs": 2}), count)
    for cell in cells:
        there = cell.folder / "results.json"
        assert there.read_bytes() == (folder / "local" / there.relative_to(runs)).read_bytes()
    begun = sum(number > 1 for number in calls)
    return (
        f"{count} units, {told}; {begun} units were begun more than once, each was trained to its end once; all "
        "results are those of the local launcher"
    )


def show_prepare(folder: Path, how: Mapping[str, object], **trouble: Callable) -> str:
    """Prepare `UNITS` shards of one clip while nodes and the command die; what it took.

    Args:
        how: of `Launching`. trouble: of `_through`.

    Raises:
        AssertionError: it failed, or a cache is not, byte for byte, that of one process.
    """
    clips = _units() // 3  # each a shard of its video, sound and vector
    root = helpers.write_dataset(folder / "tiny", domains=("alpha",), classes=2, train=clips // 2 - 1)
    cache, told = folder / "cache", json.dumps({**how, "jobs": 4})
    path = os.pathsep.join(map(str, (SWEEP.parent, SWEEP.parent / "data", SWEEP.parents[1])))
    command, told = _through(
        lambda: helpers.run(_PREPARE, root, cache, told, PYTHONPATH=path),
        lambda: sum(1 for _ in cache.glob("*/*/shard-*.h5")),
        clips * 3,
        **trouble,
    )
    said, errors = command.communicate()
    assert command.returncode == 0, errors[-2000:]
    assert json.loads(said.splitlines()[-1]) == 0
    alone = prepare(settings_for(root, folder / "alone", "cache.shard_clips=1"))
    for entry in alone.modalities.values():
        made = Path(entry.folder)
        assert same(contents(made), contents(cache / made.relative_to(folder / "alone")))
    return f"{clips * 3} shards of {clips} clips, {told}; all caches are those of one process"


def _units() -> int:
    return int(os.environ.get("UNITS", "2000"))


def _through(
    start: Callable[[], subprocess.Popen],
    reached: Callable[[], int],
    count: int,
    *,
    trouble: Callable[[random.Random], None],
    tend: Callable[[], None] = lambda: None,
) -> tuple[subprocess.Popen, str]:
    """The command that has come to its end, killed and begun again after a third and two thirds, and what happened.

    Args:
        reached: how many of `count` are done.
        trouble: kills a node, and brings it back; called again and again, each time a random number of units later.
        tend: called every few seconds: does what whoever keeps a cluster does.
    """
    rng, began, struck = random.Random(int(os.environ.get("SEED", "0"))), time.monotonic(), 0
    kills, blow = [count // 3, 2 * count // 3], 0
    command = start()
    while command.poll() is None:
        done = reached()
        if done >= blow:
            blow = done + rng.randrange(count // 30, count // 10)
            trouble(rng)
            struck += 1
            print(f"{time.monotonic() - began:.0f} s: {done} done, {struck} nodes died", file=sys.stderr, flush=True)
        tend()
        if kills and done >= kills[0]:
            kills.pop(0)
            command.kill()
            command.communicate()
            command = start()
        time.sleep(2)
    assert not kills, "it was over too soon"
    took = time.monotonic() - began
    return command, f"in {took:.0f} s; {struck} times a node died, the command was killed twice"
