"""The array job, run by submitit's local executor (skips where submitit is not installed: `uv sync --group slurm`)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from sweep_cases import plan_of

from mbcd_cli.errors import RunError
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep import slurm
from mbcd_cli.sweep.state import beside, state
from mbcd_cli.sweep.task import Task

HERE = Path(__file__).parent


@pytest.fixture
def cells(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(running, "WORKER", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parents[1]}")
    found = plan_of("hac", runs=tmp_path / "runs", targets="human", methods="erm", seeds="2")
    found[0].folder.parent.mkdir(parents=True)
    return found


def submit(cells, *options, **more):
    return slurm.submit(cells, options=["cluster=local", "timeout_min=2", *options], poll=0.1, **more)


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


def test_a_killed_job_is_submitted_again_and_a_node_that_goes_down_three_times_is_told(cells):
    beside(cells[0].folder, "say").write_text("kill")
    beside(cells[1].folder, "say").write_text("kill kill kill")
    board = submit(cells)
    assert [cell.key for cell in board.done] == [cells[0].key]
    assert "killed by signal 9, 3 times" in board.failed[cells[1].key]
    assert [len(beside(cell.folder, "calls").read_text().splitlines()) for cell in cells] == [2, 3]


def test_a_cell_that_slurm_itself_has_begun_anew_is_waited_for(cells):
    beside(cells[0].folder, "say").write_text("slow")
    other = running.command_of(cells[:1], threads=1).begin()
    helpers.until(lambda: state(cells[0].folder) == "running", other)

    def watch(board):
        if board.elsewhere:
            beside(cells[0].folder, "go").touch()

    board = submit(cells, watch=watch)
    assert other.wait() == 0
    assert {cell.key for cell in board.done} == {cell.key for cell in cells}
    assert not board.failed
    assert len(beside(cells[0].folder, "calls").read_text().splitlines()) == 1


def test_what_a_job_imports_is_little():
    """On every node, for every cell."""
    code = "import sys, mbcd_cli.sweep.task; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_before_the_time_limit_the_process_is_stopped_and_the_job_submitted_again(cells):
    beside(cells[0].folder, "say").write_text("slow")
    task = Task(running.command_of(cells[:1], threads=1))
    task.process = task.command.begin()
    following = task.checkpoint()
    assert task.process.returncode is not None
    job = pickle.loads(pickle.dumps(following.function))
    assert (job.command, job.process) == (task.command, None)


def test_a_population_is_a_job_and_its_cells_are_told_by_their_folders(cells, monkeypatch):
    monkeypatch.setattr(running, "PACKER", "fake_packer")
    beside(cells[1].folder, "say").write_text("fail")
    board = submit(cells, width=2)
    assert [cell.key for cell in board.done] == [cells[0].key]
    assert board.failed == {cells[1].key: "no such clip"}
    assert len(submit(cells, width=2, retry_failed=True).done) == 2


def test_wrong_parameters_and_no_slurm_are_plain_errors(cells, monkeypatch):
    with pytest.raises(RunError, match="not an assignment"):
        slurm.submit(cells, options=["timeout_min"])
    with pytest.raises(RunError, match="refuses"):
        submit(cells, "no_such_parameter=3")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="no Slurm here"):
        slurm.submit(cells, options=[])


def test_without_submitit_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(RunError, match="not installed") as caught:
        slurm.submit([], options=[])
    assert "uv sync --group slurm" in caught.value.remedy
