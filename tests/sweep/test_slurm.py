"""The array job, run by submitit's local executor (skips where submitit is not installed: `uv sync --group slurm`)."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from io import FileIO
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
from sweep_cases import plan_of, units_of

from mbcd_cli.errors import RunError
from mbcd_cli.launch import nodes, slurm
from mbcd_cli.launch.launch import begin, launch
from mbcd_cli.launch.nodes import MARK, demand
from mbcd_cli.launch.task import Task
from mbcd_cli.launch.unit import STOPPED_CODE, beside, holder
from mbcd_cli.launch.worker import Worker
from mbcd_cli.locks import lock
from mbcd_cli.say import Say
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep.state import state

HERE = Path(__file__).parent


@pytest.fixture
def cells(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(running, "CELL", "fake_worker:serve")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parents[1]}")
    found = plan_of("hac", runs=tmp_path / "runs", targets="human", methods="erm", seeds="2")
    found[0].folder.parent.mkdir(parents=True)
    return found


def submit(cells, *options, width=0, retry_failed=False, watch=lambda board: None, **more):
    board = begin(units_of(cells, width), retry_failed=retry_failed)
    demands = more.pop("demands", None) or demand(cells[0].folder.parent, [])
    folder = cells[0].folder.parent / "submitit"
    options = ["cluster=local", "timeout_min=2", *options]
    engine = slurm.Slurm(folder, options=options, demands=demands, **more)
    return launch(board, engine, watch=watch, poll=0.1)


def test_cells_run_as_jobs_and_failures_are_told(cells):
    beside(cells[1].folder, "say").write_text("fail")
    board = submit(cells, "cpus_per_task=3")
    assert [cell.key for cell in board.done] == [cells[0].key]
    assert board.failed == {cells[1].key: "no such clip"}
    assert beside(cells[0].folder, "calls").read_text().split()[0] == "3", "threads"
    again = submit(cells, retry_failed=True)
    assert len(again.done) == 2
    assert [state(cell.folder) for cell in cells] == ["done", "done"]
    assert len(beside(cells[0].folder, "calls").read_text().splitlines()) == 1


def test_two_commands_that_begin_in_one_folder_have_one_mark(tmp_path):
    mark = tmp_path / MARK
    with lock(mark) as first:
        told = threading.Timer(0.3, lambda: first.write(b"key"))
        told.start()
        assert demand(tmp_path, []).key == "key"
        told.join()
    assert not demand(tmp_path, []).fault()


@pytest.mark.parametrize("became", ["NODE_FAIL", "PREEMPTED"])
def test_a_node_that_is_taken_from_a_job_is_no_failure_of_its_units(cells, became):
    """Where the cluster does not put such jobs back into the queue."""
    folder = cells[0].folder.parent
    engine = slurm.Slurm(folder / "submitit", options=["cluster=local"], demands=demand(folder, []))
    nothing = SimpleNamespace(result_pickle=folder / "none")
    job = SimpleNamespace(job_id="7", state=became, paths=nothing, exception=lambda: OSError("no output"))
    assert became in slurm._ENDED
    ends = list(engine._ends_of(slurm._Job(job, units_of(cells))))
    assert [(end.code, end.again) for end in ends] == [(None, True)] * len(cells)


@pytest.mark.parametrize("code", [STOPPED_CODE, -signal.SIGTERM])
def test_a_unit_that_slurm_had_stopped_is_no_killed_one(cells, code):
    """A partition's grace time begins with SIGTERM: the unit writes its checkpoint, and the job ends by itself."""
    folder, units = cells[0].folder.parent, units_of(cells)
    engine = slurm.Slurm(folder / "submitit", options=["cluster=local"], demands=demand(folder, []))
    told = {units[0].order(engine._threads).log: code}
    job = SimpleNamespace(
        job_id="7",
        state="COMPLETED",
        paths=SimpleNamespace(result_pickle=folder),
        exception=lambda: None,
        result=lambda: told,
    )
    assert [(end.code, end.again) for end in engine._ends_of(slurm._Job(job, units))] == [(None, True)] * 2


def test_what_a_job_under_way_has_failed_at_is_submitted_anew(cells, monkeypatch):
    folder = cells[0].folder.parent
    engine = slurm.Slurm(folder / "submitit", options=["cluster=local"], demands=demand(folder, []))
    engine._clustered = True
    monkeypatch.setattr(slurm, "queue", lambda: {"7": slurm.Queued("RUNNING", "n1", "")})
    for cell in cells:
        beside(cell.folder, "job").write_text("7")
    beside(cells[0].folder, "failed").write_text("{}")
    assert [unit.pieces[0] for unit in engine.find(units_of(cells))] == cells[1:]


def test_a_killed_job_is_submitted_again_and_a_node_that_goes_down_three_times_is_told(cells):
    beside(cells[0].folder, "say").write_text("kill")
    beside(cells[1].folder, "say").write_text("kill kill kill")
    board = submit(cells)
    assert [cell.key for cell in board.done] == [cells[0].key]
    assert "killed by signal 9, 3 times" in board.failed[cells[1].key]
    assert [len(beside(cell.folder, "calls").read_text().splitlines()) for cell in cells] == [2, 3]


def test_a_cell_that_slurm_itself_has_begun_anew_is_waited_for(cells):
    beside(cells[0].folder, "say").write_text("slow")
    other = Worker(threads=1)
    other.begin(running.CellUnit(cells[:1]).order(1))
    helpers.until(lambda: state(cells[0].folder) == "running", other.process)

    def watch(board):
        if board.elsewhere:
            beside(cells[0].folder, "go").touch()

    board = submit(cells, watch=watch)
    assert other.poll(60) == 0
    other.close()
    assert {cell.key for cell in board.done} == {cell.key for cell in cells}
    assert not board.failed
    assert len(beside(cells[0].folder, "calls").read_text().splitlines()) == 1


def test_what_a_job_imports_is_little():
    """On every node, for every cell."""
    code = "import sys, mbcd_cli.launch.task; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_before_the_time_limit_the_process_is_stopped_and_the_job_goes_on_from_there(cells):
    beside(cells[1].folder, "say").write_text("slow")
    task = Task(tuple(unit.order(1) for unit in units_of(cells)), 1, demand(cells[0].folder.parent, []))
    task.worker, task.at = Worker(threads=1), 1
    assert task.worker.run(task.orders[0]) == 0
    task.worker.begin(task.orders[1])
    helpers.until(lambda: state(cells[1].folder) == "running", task.worker.process)
    following = pickle.loads(pickle.dumps(task.checkpoint().function))
    assert following.orders == task.orders[1:], "the first is done"
    beside(cells[1].folder, "go").touch()
    assert list(following().values()) == [0]


def test_a_job_that_is_cancelled_begins_no_further_unit(cells):
    """Slurm tells all of its processes: here the warm one and its child, which has no checkpoint to write."""
    beside(cells[0].folder, "say").write_text("slow")
    task = Task(tuple(unit.order(1) for unit in units_of(cells)), 1, demand(cells[0].folder.parent, []))
    codes = []
    job = threading.Thread(target=lambda: codes.append(task()))
    job.start()
    helpers.until(lambda: holder(cells[0].folder))
    for process in (holder(cells[0].folder).process, task.worker.process.pid):
        os.kill(process, signal.SIGTERM)
    job.join(60)
    assert codes == [{task.orders[0].log: -signal.SIGTERM}]
    assert not beside(cells[1].folder, "calls").exists()


def test_units_are_grouped_into_as_many_jobs_as_asked(cells):
    jobs = set()

    def watch(board):
        jobs.update(path.read_text() for path in cells[0].folder.parent.glob("*.job"))

    board = submit(cells, tasks=1, watch=watch)
    assert len(board.done) == 2
    assert len(jobs) == 1


def test_a_node_that_lacks_something_is_told_by_name(cells):
    wrong = replace(demand(cells[0].folder.parent, []), programs=(("torch", "0.1"),))
    said = []
    board = submit(cells, demands=wrong, tasks=1, say=Say(said.append))
    assert len(board.failed) == 2
    (line,) = said
    assert re.search(r"node \S+ has torch .*, and here it is 0\.1", line)
    assert demand(cells[0].folder.parent, []) == demand(cells[0].folder.parent, []), "the mark stays"
    gone = replace(demand(cells[0].folder.parent, []), key="that of another folder")
    assert "does not see the folder" in gone.fault()
    assert "/nowhere" in demand(cells[0].folder.parent, [Path("/nowhere")]).fault()
    assert demand(cells[0].folder.parent, [Path("/tmp")]).fault() == ""


def test_a_population_is_a_job_and_its_cells_are_told_by_their_folders(cells, monkeypatch):
    monkeypatch.setattr(running, "PACK", "fake_worker:serve_pack")
    beside(cells[1].folder, "say").write_text("fail")
    board = submit(cells, width=2)
    assert [cell.key for cell in board.done] == [cells[0].key]
    assert board.failed == {cells[1].key: "no such clip"}
    assert len(submit(cells, width=2, retry_failed=True).done) == 2


def test_an_array_takes_one_job_less_than_the_cluster_has_room_for(monkeypatch):
    """Measured on Slurm 22.05: where an array would fill it, sbatch waits."""
    told = "MaxArraySize            = 1001\nMaxJobCount             = 5\n"
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    monkeypatch.setattr(slurm, "queue", lambda: {"7": slurm.Queued("COMPLETED", "n1", "")})
    assert slurm.job_limit("slurm") == 3


def test_wrong_parameters_and_no_slurm_are_plain_errors(cells, monkeypatch):
    with pytest.raises(RunError, match="not an assignment"):
        submit(cells, "timeout_min")
    with pytest.raises(RunError, match="refuses"):
        submit(cells, "no_such_parameter=3")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="no Slurm here"):
        slurm.Slurm(cells[0].folder, options=[], demands=demand(cells[0].folder.parent, []))


def test_without_submitit_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(RunError, match="not installed") as caught:
        slurm.Slurm(Path(), options=[], demands=None)
    assert "uv sync --group slurm" in caught.value.remedy


def test_a_job_without_a_result_is_told_in_one_line(cells):
    folder = cells[0].folder.parent
    engine = slurm.Slurm(folder / "submitit", options=["cluster=local"], demands=demand(folder, []))
    watcher = SimpleNamespace(queue={"7_1": slurm.Queued("FAILED", "n2", "")})
    job = SimpleNamespace(job_id="7_1", watcher=watcher, stderr=lambda: None)
    assert "job 7_1 ended on node n2 (FAILED) without a result or a log" in engine._why(job, None)
    job.stderr = lambda: "one\nslurmstepd: error: out of memory\n"
    assert engine._why(job, None).endswith("on node n2 (FAILED): slurmstepd: error: out of memory")
    dashes = "-" * 22
    error = RuntimeError(
        f"Job failed with trace:\n{dashes}\nTraceback\nOSError: no\n\n{dashes}\nlogs at paths:\n  - /a"
    )
    assert engine._why(job, error) == "OSError: no"


def test_a_node_whose_disk_is_full_says_so(cells, monkeypatch):
    demands = demand(cells[0].folder.parent, [])
    assert demands.fault() == ""
    monkeypatch.setattr(nodes, "TemporaryFile", lambda dir: FileIO("/dev/full", "w"))
    assert demands.fault() == f"cannot write into {cells[0].folder.parent}: No space left on device"
