"""The scheduler, with processes that do as they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import helpers
import pytest
from fakes import MemoryDataset, memory_settings
from sweep_cases import finish, plan_of, units_of

from mbcd_cli import files
from mbcd_cli.errors import RunError
from mbcd_cli.files import write_text
from mbcd_cli.launch.launch import KILLS, Ended, _settle, begin, launch
from mbcd_cli.launch.local import Local, threads_per_job
from mbcd_cli.launch.unit import STOPPED_CODE, beside, last_lines, write_failure
from mbcd_cli.launch.worker import Worker
from mbcd_cli.locks import held, lock
from mbcd_cli.settings.sources import to_toml
from mbcd_cli.sweep import pack
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep.state import state
from mbcd_cli.training.train import ClipsOfTraining

HERE = Path(__file__).parent


@pytest.fixture
def cells(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CELL", "fake_worker:serve")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parents[1]}")
    found = plan_of("hac", runs=tmp_path / "runs", targets="human", methods="erm", seeds="4")
    found[0].folder.parent.mkdir(parents=True)
    return found


def say(cell, *words):
    beside(cell.folder, "say").write_text(" ".join(words))


def begun(cell):
    worker = Worker(threads=1)
    worker.begin(running.CellUnit([cell]).order(1))
    return worker


def calls(cell):
    path = beside(cell.folder, "calls")
    return path.read_text().splitlines() if path.exists() else []


def execute(cells, *, retry_failed=False, watch=lambda board: None, **options):
    board = begin(units_of(cells), retry_failed=retry_failed)
    return launch(board, Local(**{"jobs": 2, "threads": 1, **options}), watch=watch, poll=0.01)


def test_done_cells_never_run_again(cells, monkeypatch):
    monkeypatch.setenv("MBCD_TRAINING__EPOCHS", "5")
    first = execute(cells)
    assert len(first.done) == 4
    assert [state(c.folder) for c in cells] == ["done"] * 4
    assert [calls(c) for c in cells] == [["1 None None"]] * 4, (
        "threads; the environment's settings are resolved already"
    )
    again = execute(cells)
    assert len(again.done) == 4
    assert [len(calls(c)) for c in cells] == [1] * 4


def test_a_done_cell_keeps_no_mark_of_a_failure_after_its_results(cells):
    execute(cells)
    beside(cells[0].folder, "failed").write_text("{}")
    assert len(execute(cells).done) == len(cells)
    assert not beside(cells[0].folder, "failed").exists()


def test_a_done_cell_keeps_no_half_written_mark_of_a_failure(cells, monkeypatch):
    execute(cells)
    monkeypatch.setattr(files, "_tidied", set())
    gone = subprocess.Popen(["true"])
    gone.wait()
    mark = beside(cells[0].folder, "failed")
    half = mark.with_name(f".{mark.name}.{files._HOST}.{gone.pid}.partial")
    half.write_text("{")
    assert len(execute(cells).done) == len(cells)
    assert not half.exists()


def test_failed_cells_are_listed_and_run_again_on_request_only(cells):
    say(cells[1], "fail")
    board = execute(cells)
    assert board.failed == {cells[1].key: "no such clip"}
    assert len(board.done) == 3
    again = execute(cells)
    assert again.failed == {cells[1].key: "no such clip"}
    assert len(calls(cells[1])) == 1
    retried = execute(cells, retry_failed=True)
    assert (len(retried.done), retried.failed) == (4, {})
    assert len(calls(cells[1])) == 2


def test_killed_processes_begin_again_but_not_for_ever(cells):
    say(cells[0], "kill", "ok")
    say(cells[1], *["kill"] * 9)
    board = execute(cells)
    assert len(calls(cells[0])) == 2
    assert state(cells[0].folder) == "done"
    assert len(calls(cells[1])) == 1 + KILLS
    assert "killed by signal 9" in board.failed[cells[1].key]
    assert state(cells[1].folder) != "failed", "the next sweep tries it again without being asked"


def test_a_process_that_does_not_say_how_it_ended_begins_again_too(cells):
    """As one does whose lock another process has taken: it had stood still (`locks`)."""
    say(cells[0], "quit", "ok")
    say(cells[1], *["quit"] * 9)
    beside(cells[1].folder, "log").write_text("Error: what came last\n")
    board = execute(cells[:2])
    assert (len(calls(cells[0])), len(calls(cells[1]))) == (2, 1 + KILLS)
    assert board.failed == {cells[1].key: "Error: what came last"}
    with lock(beside(cells[2].folder, "lock")):
        _settle(board, Ended(running.CellUnit(cells[2:3]), 1), cells[2], {})
    assert [*board.elsewhere] == [cells[2].key], "who has taken it goes on"


def test_gpus_are_dealt_out_by_slot(cells):
    for cell in cells[:2]:
        say(cell, "slow")

    def once_both_were_called(board):
        if all(calls(cell) for cell in cells[:2]):
            for cell in cells[:2]:
                beside(cell.folder, "go").touch()

    execute(cells, gpus=["3", "5"], watch=once_both_were_called)
    assert [calls(c)[0].split()[1] for c in cells[:2]] == ["3", "5"]


def test_threads_are_divided():
    cores = len(os.sched_getaffinity(0))
    assert threads_per_job(1, 0) == cores
    assert threads_per_job(10 * cores, 0) == 1
    assert threads_per_job(4, 3) == 3


def test_two_sweeps_share_cells(cells):
    """The second waits for the cell that the first works on, and runs it no second time."""
    say(cells[0], "slow")
    boards, looks = [], threading.Semaphore(0)

    def look(board):
        if state(cells[1].folder) == "done":
            looks.release()

    def second():
        boards.append(execute(cells[:2], watch=look))

    started = begun(cells[0])  # the first sweep's process
    helpers.until(lambda: held(beside(cells[0].folder, "lock")))
    thread = threading.Thread(target=second)
    thread.start()
    for _ in range(20):  # nothing but the first sweep's cell is left, and it goes on looking
        assert looks.acquire(timeout=60)
    assert thread.is_alive()
    beside(cells[0].folder, "go").touch()
    thread.join(timeout=60)
    assert started.poll(60) == 0
    assert len(boards[0].done) == 2
    assert len(calls(cells[0])) == 1


def test_a_killed_sweep_leaves_its_processes_to_the_next_one(cells, tmp_path):
    """kill -9 of the parent: its process goes on; the next sweep waits for it and runs only the rest."""
    say(cells[0], "alone")
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(HERE)!r})
            from sweep_cases import plan_of
            from mbcd_cli.sweep import run as running
            from mbcd_cli.launch.launch import begin, launch
            from mbcd_cli.launch.local import Local
            running.CELL = "fake_worker:serve"
            cells = plan_of("hac", runs=Path({str(tmp_path / "runs")!r}), targets="human", methods="erm", seeds="4")
            board = begin([running.CellUnit([cell]) for cell in cells], retry_failed=False)
            launch(board, Local(jobs=1, threads=1), poll=0.01)
            """
        )
    )
    root = HERE.parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{root}"}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    helpers.until(lambda: calls(cells[0]), parent)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert state(cells[0].folder) == "running"

    def once_the_rest_is_done(board):
        if len(board.done) == 3:
            beside(cells[0].folder, "go").touch()

    board = execute(cells, watch=once_the_rest_is_done)
    assert len(board.done) == 4
    assert [len(calls(c)) for c in cells] == [1] * 4


def test_a_cell_ends_when_its_sweep_is_killed(cells, monkeypatch):
    say(cells[0], "slow")
    worker = begun(cells[0])
    helpers.until(lambda: state(cells[0].folder) == "running", worker.process)
    os.close(worker.process.stdin.fileno())  # as the kernel does when the sweep is killed
    assert worker.process.wait(60) == 0
    assert state(cells[0].folder) == "waiting"
    assert last_lines(cells[0].folder) == []


def test_a_process_that_is_stopped_tells_its_child(cells):
    say(cells[0], "slow")
    worker = begun(cells[0])
    helpers.until(lambda: state(cells[0].folder) == "running", worker.process)
    worker.terminate()
    assert worker.poll(60) == -signal.SIGTERM
    worker.close()
    assert worker.process is None


def test_a_child_has_what_its_parent_imported_and_nothing_of_the_one_before(cells):
    """The parent is the same, since it imported everything once; a killed child leaves it alone."""
    say(cells[0], "kill")
    worker = begun(cells[0])
    parent = worker.process.pid
    assert worker.poll(60) == -signal.SIGKILL
    assert worker.run(running.CellUnit(cells[1:2]).order(1)) == 0
    assert worker.process.pid == parent
    worker.process.kill()
    worker.process.wait()
    assert worker.run(running.CellUnit(cells[2:3]).order(1)) == 0, "a parent that is gone is begun anew"
    worker.close()


def test_cells_of_a_population_are_told_by_their_folders(cells):
    """The process ends as the worst of its cells; what was done in it, or before, is done all the same."""
    unit = running.CellUnit(cells)
    board = begin([unit], retry_failed=False)
    finish(cells[0], top1=0.9)
    write_failure(cells[1].folder, RunError("no such clip", "add it"))
    for cell in cells[:3]:
        _settle(board, Ended(unit, 1), cell, {})
    assert board.done == [cells[0]]
    assert board.failed[cells[1].key] == "no such clip"
    assert cells[2].key not in board.failed, "nothing says that it failed"


def test_a_population_that_is_stopped_before_its_first_step_says_so(cells, monkeypatch):
    """It has not failed: a job of a cluster would go on with the next unit."""

    def stopped(*given):
        signal.raise_signal(signal.SIGTERM)
        return of(*given)

    of = ClipsOfTraining.of
    monkeypatch.setattr(ClipsOfTraining, "of", stopped)
    monkeypatch.setattr(pack, "open_for_training", lambda settings, dataset=None: (settings, MemoryDataset()))
    for cell in cells[:2]:
        write_text(beside(cell.folder, "toml"), to_toml(memory_settings(), stamped=True))
    assert pack.run_pack([cell.folder for cell in cells[:2]], threads=1, width=None) == STOPPED_CODE
    assert [state(cell.folder) for cell in cells[:2]] == ["waiting"] * 2
