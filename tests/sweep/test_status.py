"""How far a sweep is, from its folders alone."""

from __future__ import annotations

import json
import os
import time

import pytest
from sweep_cases import finish, plan_of
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.errors import RunError
from mbcd_cli.launch import slurm
from mbcd_cli.launch.slurm import Queued
from mbcd_cli.launch.unit import beside, known, write_failure
from mbcd_cli.locks import lock
from mbcd_cli.sweep.run import SweepOutcome
from mbcd_cli.sweep.status import status_of
from mbcd_cli.sweep.sweep import LISTED, report_failures

WORDS = ["sweep", "--preset", "hac", "--targets", "human", "--methods", "erm", "--seeds", "6", "--status"]


@pytest.fixture
def cells(tmp_path):
    found = plan_of("hac", runs=tmp_path / "runs", targets="human", methods="erm", seeds="6")
    found[0].folder.parent.mkdir(parents=True)
    return found


def test_every_state_is_told_and_nothing_written(cells, tmp_path, monkeypatch):
    for cell, ago in zip(cells[:2], (1800, 600), strict=True):
        finish(cell, top1=0.5)
        os.utime(cell.folder / "results.json", (time.time() - ago,) * 2)
    write_failure(cells[2].folder, RunError("no such clip", "add it"))
    beside(cells[2].folder, "log").write_text("one\ntwo\n\nthree\nfour\n")
    beside(cells[3].folder, "job").write_text("7_1\n")
    held = lock(beside(cells[4].folder, "lock"))
    before = sorted(tmp_path.rglob("*"))
    with held, known(held):
        found = status_of(cells)
        said = CliRunner().invoke(app, [*WORDS, "--runs-dir", str(tmp_path / "runs")]).output
        told = CliRunner().invoke(app, [*WORDS, "--runs-dir", str(tmp_path / "runs"), "--json"]).stdout
    assert (found.total, found.done, found.waiting, found.queued) == (6, 2, 2, 1)
    with monkeypatch.context() as patch:
        patch.setattr(slurm, "queue", lambda: {"7_1": Queued("COMPLETED", "n1", ""), "8": Queued("PENDING", "", "")})
        assert status_of(cells).queued == 0, "that job is over"
        beside(cells[3].folder, "job").write_text("8\n")
        assert status_of(cells).queued == 1
        beside(cells[3].folder, "job").write_text("7_1\n")
    (running,), (failed,) = found.running, found.failed
    assert running.host == os.uname().nodename.partition(".")[0]
    assert 0 <= running.seconds < 60
    assert (failed.error, failed.log) == ("no such clip", ["two", "three", "four"])
    assert found.per_hour == pytest.approx(2, rel=0.01), "one in the half hour since the first"
    assert found.seconds_left == pytest.approx(3 * 1800, rel=0.01)
    assert "2 of 6 runs done, 1 running, 2 waiting (1 with a job of the cluster), 1 failed." in said
    assert "| four" in said
    assert json.loads(told)["failed"][0]["log"] == ["two", "three", "four"]
    assert sorted(tmp_path.rglob("*")) == before
    assert beside(cells[4].folder, "lock").read_bytes() == b"", "who held it is gone"


def test_an_old_rate_is_none(cells):
    finish(cells[0], top1=0.5)
    assert status_of(cells).per_hour is None, "one end says nothing of a rate"
    os.utime(cells[0].folder / "results.json", (time.time() - 9000,) * 2)
    assert status_of(cells).per_hour is None
    finish(cells[1], top1=0.5)
    assert status_of(cells).per_hour == pytest.approx(1, rel=0.01)


def test_the_end_of_the_log_of_a_failed_run_is_in_the_error(tmp_path):
    folders = [str(tmp_path / f"run-{number}") for number in range(LISTED + 2)]
    (tmp_path / "run-0.log").write_text("Traceback\nwhat came last\n")
    message = str(report_failures(SweepOutcome(dict.fromkeys(folders, "killed by signal 9"), 0, 1.0)))
    assert f"{LISTED + 2} runs failed:" in message
    assert "    | what came last" in message
    assert "and 2 more" in message
