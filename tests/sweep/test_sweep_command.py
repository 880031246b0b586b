"""`mbcd sweep` on a tiny dataset, with real trainings in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
from sweep_cases import plan_of
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.files import read_records
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.launch import begin, launch
from mbcd_cli.launch.local import Local
from mbcd_cli.launch.unit import BUSY_CODE, DONE_CODE, FAILED_CODE, beside, read_failure
from mbcd_cli.locks import lock
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.settings.sources import to_toml
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep.cell import run_cell
from mbcd_cli.sweep.estimate import estimate_sweep
from mbcd_cli.sweep.packing import small
from mbcd_cli.sweep.run import CellUnit, check_prepared, run
from mbcd_cli.sweep.search import Search
from mbcd_cli.sweep.state import CellProgress, progress, state
from mbcd_cli.training import train
from mbcd_cli.training.together import member_bytes

# Short trainings: what is tested is how they are run.
SETS = (
    "training.epochs=3",
    "training.limit_clips=96",
    "cache.views=1",
    "cache.workers=0",
    "evaluation.analyses=[]",
    "evaluation.export=[]",
    "evaluation.report=false",
    "runtime.device=cpu",
)


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    sets = [word for text in SETS for word in ("--set", text)]
    done = invoke(
        "prepare", "synthetic", "--preset", "synthetic-4", "--root", folder / "media", "--cache-dir", folder / "cache",
        *sets,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder / "cache"


def cells_of(cache, runs, **request):
    flags = {"cache.dir": cache}
    return plan_of("synthetic-4", runs=runs, sets=SETS, flags=flags, **{"targets": "south", "seeds": "1", **request})


@pytest.mark.stress  # three processes that import torch: slow where cores are few
def test_a_killed_child_resumes_to_the_numbers_of_an_uninterrupted_run(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(running.__file__).parents[2]))
    (cell,) = cells_of(cache, tmp_path / "runs", methods="mbcd")
    killed = []

    def kill_once(board):
        if board.running and not killed and len(read_records(cell.folder / "metrics.jsonl")) >= 1:
            killed.append(json.loads(beside(cell.folder, "lock").read_text())["process"])
            os.kill(killed[0], signal.SIGKILL)

    board = begin([CellUnit([cell])], retry_failed=False)
    launch(board, Local(jobs=1, threads=1), watch=kill_once, poll=0.01)
    assert killed
    assert board.failed == {}
    assert len(board.done) == 1

    settings, data = open_for_training(cell.settings)
    configure(settings.runtime.model_copy(update={"threads": 1}))
    train.train(settings, data, run=tmp_path / "straight", resume=False, overwrite=False)
    kept = read_records(cell.folder / "metrics.jsonl")
    straight = read_records(tmp_path / "straight" / "metrics.jsonl")
    assert [r["epoch"] for r in kept] == [1, 2, 3]
    for one, other in zip(kept, straight, strict=True):
        assert one["validation"] == other["validation"]
        assert one["target"] == other["target"]
    best = straight[kept[-1]["best_epoch"] - 1]["target"]["teacher"]["fused"]["accuracy"]
    headline = json.loads((cell.folder / "results.json").read_text())["headline"]
    assert headline["top1"]["fused"] == pytest.approx(best)

    # The command finds that run done, and collects it; a table over one run is one figure.
    arguments = ["sweep", "--preset", "synthetic-4", "--targets", "south", "--seeds", "1", "--methods", "mbcd"]
    arguments += ["--cache-dir", cache, "--runs-dir", tmp_path / "runs", "--output", tmp_path / "out", "--json"]
    done = invoke(*arguments, *(word for text in SETS for word in ("--set", text)))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["done"] == 1
    row = next(t for t in found["tables"] if t["name"].endswith("multi-source"))["rows"][0]
    assert row[0] == "mbcd"
    assert row[1]["value"] == pytest.approx(100 * best)


def test_what_the_board_reads_may_be_anything(tmp_path):
    def told(accuracy):
        return {"teacher": {"fused": {"accuracy": accuracy}}}

    log = tmp_path / "metrics.jsonl"
    assert progress(tmp_path) == CellProgress(0)
    log.write_text(json.dumps({"epoch": 3, "validation": told(0.5), "target": told(0.25)}) + "\n")
    whole = log.read_bytes()
    assert progress(tmp_path) == CellProgress(3, 0.5, 0.25)
    for last in (b'{"epoch": null}\n', b'{"epoch": 4, "validation": 5}\n', b'\xff\n{"epoch": 4}\n'):
        log.write_bytes(whole + last)
        assert progress(tmp_path) == CellProgress(0)
    log.write_bytes(whole + '{"epoch": "ä'.encode()[:-1])
    assert progress(tmp_path).epochs == 3
    log.write_text(json.dumps({"epoch": 4, "validation": told(float("nan"))}))
    assert progress(tmp_path) == CellProgress(4)


def test_dry_run_times_steps_and_writes_nothing(cache, tmp_path):
    cells = cells_of(cache, tmp_path / "runs", methods="erm", seeds="2")
    planned = estimate_sweep(cells, jobs=2)
    assert planned.left == 2
    assert planned.seconds == pytest.approx(planned.seconds_one_after_another / 2)
    assert 0 < planned.seconds < 600
    assert planned.disk_bytes > 0, "the prepared dataset tells the shapes of array modalities"
    with pytest.raises(RunError, match="--jobs 0"):
        estimate_sweep(cells, jobs=0)
    assert not (tmp_path / "runs").exists()


def test_dry_run_tells_what_is_trained_together(cache, tmp_path):
    cells = cells_of(cache, tmp_path / "runs", methods="erm,ema", seeds="5", grid=["optimizer.lr=1e-3,1e-4"])
    planned = estimate_sweep(cells, jobs=2, width=4)
    assert [(one.runs, one.processes, one.width) for one in planned.populations] == [(10, 2, 4)] * 2
    erm, larger = planned.populations
    assert erm.methods == ["erm, lr=1e-3", "erm, lr=1e-4"]
    assert 0 < 4 * erm.memory_bytes < 4 * larger.memory_bytes
    assert planned.seconds > 0
    assert estimate_sweep(cells, jobs=2, width=0).populations == []
    huge = cells_of(cache, tmp_path / "runs", methods="erm", seeds="2", grid=["training.batch_size=9999"])
    assert estimate_sweep(huge, jobs=1, width=2).seconds == 0, "as a dry run of one: `train` refuses it"
    assert not (tmp_path / "runs").exists()


def test_more_trainings_at_a_time_than_fit_are_refused_with_the_number_that_do(cache, tmp_path, monkeypatch):
    cells = cells_of(cache, tmp_path / "runs", methods="erm", seeds="3")
    settings, data = open_for_training(cells[0].settings)
    each = member_bytes(settings, data, device=configure(settings.runtime))
    monkeypatch.setattr("mbcd_cli.training.together.free_memory", lambda device: 5 * each)
    with pytest.raises(SettingsError, match=r"--pack 3: so many trainings in each of 2 processes") as caught:
        run(cells, how=Launching(jobs=2), pack="3")
    assert caught.value.remedy == "--pack 2 is the largest that fits."
    assert not (tmp_path / "runs").exists()
    check_prepared(cells, width=5, jobs=1)
    larger = cells_of(cache, tmp_path / "runs", methods="simmmdg", seeds="1")
    with pytest.raises(SettingsError, match="--pack 5"):
        check_prepared([*cells, *larger], width=5, jobs=1)


def test_what_is_prepared_tells_which_cells_are_small(cache, tmp_path):
    (cell,) = cells_of(cache, tmp_path / "runs", methods="erm", seeds="1")
    untold = replace(cell, settings=cell.settings.model_copy(update={"modalities": {}}))
    assert not small(untold.settings)
    assert small(check_prepared([untold])[untold.key])


def test_a_dataset_that_is_not_prepared_is_one_message(tmp_path):
    done = invoke("sweep", "--preset", "synthetic-4", "--cache-dir", tmp_path / "none", "--runs-dir", tmp_path / "runs")
    assert done.exit_code == 1
    assert "There is no cache of dataset 'synthetic-4'" in done.output
    assert "mbcd prepare" in done.output
    assert not (tmp_path / "runs").exists()


def test_a_launcher_that_is_none_is_refused_in_a_dry_run_too(tmp_path):
    done = invoke(
        "sweep", "--preset", "synthetic-4", "--launcher", "cloud", "--dry-run", "--runs-dir", tmp_path / "runs"
    )
    assert done.exit_code == 1
    assert "There is no launcher 'cloud'" in done.output


def test_with_a_root_the_dataset_is_prepared_first(tmp_path, monkeypatch):
    started = []

    monkeypatch.setattr(running, "launch", lambda board, *_, **__: started.extend(board.waiting.values()))
    arguments = ["sweep", "--preset", "synthetic-4", "--targets", "all", "--seeds", "1", "--methods", "erm"]
    arguments += ["--root", tmp_path / "media", "--cache-dir", tmp_path / "cache", "--runs-dir", tmp_path / "runs"]
    sets = [word for text in SETS for word in ("--set", text)]
    done = invoke(*arguments, "--dry-run", *sets)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "cache").exists()
    done = invoke(*arguments, *sets)
    assert "No run of this sweep is finished" in done.output  # `execute` only said so
    assert len(started) == len(open_for_training(started[0].settings)[1].domains)


def test_a_dataset_that_only_its_files_know_is_planned_after_it_is_prepared(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha", "beta", "gamma"))
    started = []

    monkeypatch.setattr(running, "launch", lambda board, *_, **__: started.extend(board.waiting.values()))
    sets = [word for text in (*helpers.SMALL, "dataset.reader=manifest") for word in ("--set", text)]
    words = ["sweep", "--preset", "none", "--dataset", "tiny", "--targets", "all", "--methods", "erm", "--seeds", "1"]
    words += ["--cache-dir", tmp_path / "cache", "--runs-dir", tmp_path / "runs", *sets]
    assert "no cache of dataset 'tiny'" in " ".join(invoke(*words).output.split())
    invoke(*words, "--root", root)
    assert [cell.settings.training.target_domain for cell in started] == ["alpha", "beta", "gamma"]


def test_a_search_killed_between_its_phases_goes_on(cache, tmp_path, monkeypatch):
    """As a user sees it: trials are one population, so are the runs that are reported; nothing is done twice."""
    words = ["sweep", "--preset", "synthetic-4", "--targets", "south,north", "--methods", "erm", "--search", "2"]
    words += [
        "--seeds",
        "2",
        "--threads",
        "1",
        "--cache-dir",
        cache,
        "--runs-dir",
        tmp_path / "runs",
        "--output",
        tmp_path / "out",
    ]
    words += [word for text in SETS for word in ("--set", text)]
    plan = json.loads(invoke(*words, "--dry-run", "--json").stdout)
    assert [one["runs"] for one in plan["populations"]] == [6, 4]
    assert [cell["key"].startswith("chosen") for cell in plan["cells"]] == [False] * 6 + [True] * 4
    assert plan["searched"][1] == {"setting": "optimizer.lr", "low": 1e-4, "high": 1e-2, "methods": ["erm"]}
    begun = []

    def submit(engine, units):
        begun.extend((unit.order(1).call, len(unit.pieces)) for unit in units)
        taken(engine, units)

    taken = Local.submit
    monkeypatch.setattr(Local, "submit", submit)
    monkeypatch.setenv("PYTHONPATH", str(Path(running.__file__).parents[2]))
    with monkeypatch.context() as killed:
        killed.setattr(Search, "choose", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert invoke(*words).exit_code == 130
    assert len(list((tmp_path / "runs" / "synthetic-4").glob("*/results.json"))) == 6
    done = invoke(*words, "--json")
    assert done.exit_code == 0, done.output
    assert begun == [(running.PACK, 6), (running.PACK, 4)]
    found = json.loads(done.stdout)
    assert (found["done"], found["failed"], len(found["runs"])) == (10, {}, 4)
    assert {Path(run).name.rpartition("-")[0][-2:] for run in found["runs"]} == {"s0", "s1"}
    (chosen,) = (table for table in found["tables"] if table["name"].endswith("-search"))
    assert [row[:2] for row in chosen["rows"]] == [["erm", "north"], ["erm", "south"]]
    assert "2 more are drawn" in chosen["note"]


def test_a_cell_that_fails_says_why_and_one_that_is_held_is_left_alone(cache, tmp_path):
    (cell,) = cells_of(cache, tmp_path / "runs", methods="erm", grid=("training.batch_size=4096",))
    CellUnit([cell]).write(cell)
    with lock(beside(cell.folder, "lock")):
        assert run_cell(cell.folder, threads=1) == BUSY_CODE
    assert state(cell.folder) == "waiting"
    assert run_cell(cell.folder, threads=1) == FAILED_CODE
    assert state(cell.folder) == "failed"
    assert "batch_size" in read_failure(cell.folder)
    # Mended (here: by other settings under the same name), it is done, and the mark of the failure goes.
    (cell.folder / "settings.toml").unlink()
    (good,) = cells_of(cache, tmp_path / "runs", methods="erm", grid=("training.epochs=1",))
    beside(cell.folder, "toml").write_text(to_toml(good.settings))
    assert run_cell(cell.folder, threads=1) == DONE_CODE
    assert (state(cell.folder), read_failure(cell.folder)) == ("done", "")
    files = json.loads((cell.folder / "results.json").read_text())["files"]
    assert [name for name in files if name.endswith(".png")] == ["plots/accuracy.png"], "training's own alone"
    assert run_cell(cell.folder, threads=1) == DONE_CODE


def test_a_place_where_no_table_can_be_written_is_told_before_the_trainings(cache, tmp_path):
    (tmp_path / "file").write_text("")
    sets = [word for text in SETS for word in ("--set", text)]
    words = ["sweep", "--preset", "synthetic-4", "--cache-dir", cache, "--targets", "south", "--methods", "erm", *sets]
    words += ["--runs-dir", tmp_path / "runs"]
    done = invoke(*words, "--output", tmp_path / "file" / "tables")
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr
    assert "--output" in done.stderr
    assert not (tmp_path / "runs").exists()
