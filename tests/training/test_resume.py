"""Killed at any moment and resumed, a training ends in the same bits as an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import helpers
import pytest
import torch
from fakes import MemoryDataset, Signalling, memory_settings

from mbcd_cli import files
from mbcd_cli.errors import CheckpointError, RunError, StoppedError
from mbcd_cli.files import read_json, read_records
from mbcd_cli.json_values import json_values
from mbcd_cli.launch import warm
from mbcd_cli.launch.unit import STOPPED_CODE, Order
from mbcd_cli.launch.worker import Worker
from mbcd_cli.runs import checkpoint, folder
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.say import Say
from mbcd_cli.training import train as command
from mbcd_cli.training import trainer

# Heads with dropout, DSU, masks and distillation: every source of randomness is in use. A checkpoint after every step.
# On a CPU: children are forked, which no process survives that has begun with CUDA.
KEEPING = {"average": {"snapshots": True}, "runtime": {"device": "cpu"}}
SETTINGS = memory_settings(training={"epochs": 3, "checkpoint_minutes": 1e-9, "keep_checkpoints": True}, **KEEPING)
SILENT = memory_settings(training={"epochs": 3, "keep_checkpoints": True}, **KEEPING)


def run_training(run: Path, *, settings=SETTINGS, resume=False, dataset=None):
    return command.train(settings, dataset or MemoryDataset(), run=run, resume=resume, overwrite=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, without checkpoints inside epochs."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_training(run, settings=SILENT)
    return run


def assert_same(run: Path, other: Path) -> None:
    for log in ("metrics.jsonl", "steps.jsonl"):
        assert (run / log).read_bytes() == (other / log).read_bytes(), log
    names = sorted(p.name for p in (run / "checkpoints").glob("*.pt"))
    assert names == sorted(p.name for p in (other / "checkpoints").glob("*.pt"))
    assert not [*(run / "checkpoints").glob(".*"), *(run / "snapshots").glob(".*")]
    for path in (other / "snapshots").iterdir():
        assert (run / "snapshots" / path.name).read_bytes() == path.read_bytes()
    for name in names:
        one, two = (load_checkpoint(r / "checkpoints" / name) for r in (run, other))
        assert (one.epoch, one.step, one.history, one.best) == (two.epoch, two.step, two.history, two.best)
        for state in ("student", "teacher"):
            for key, value in getattr(one, state).items():
                assert torch.equal(value, getattr(two, state)[key]), (name, state, key)
    one, two = (load_checkpoint(r / "checkpoints/last.pt").training for r in (run, other))
    assert one["optimizer"]["moments"].keys() == two["optimizer"]["moments"].keys() != set()
    for key, flat in one["optimizer"]["moments"].items():
        assert torch.equal(flat, two["optimizer"]["moments"][key])
    assert one["logs"] == two["logs"]
    assert torch.equal(one["randomness"], two["randomness"])
    assert torch.equal(one["global"]["torch"], two["global"]["torch"])
    one, two = (read_json(r / "done") for r in (run, other))
    timed = ("run", "seconds", "steps_per_second", "peak_memory_mb", "files")
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}


def killed_at(event: int, run: Path, *, resume: bool, settings=SETTINGS) -> bool:
    """Train in a child that gets SIGKILL at its event-th write, rename, sync or step; False if it ended before."""

    def action():
        seen = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen >= event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        Path.replace = counted(Path.replace)
        os.fsync = counted(os.fsync)
        checkpoint.torch.save = counted(torch.save)
        folder.RunFolder.append = counted(folder.RunFolder.append)
        trainer.TrainStep.__call__ = counted(trainer.TrainStep.__call__)
        run_training(run, resume=resume, settings=settings)

    status = helpers.in_child(action)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("event", [3, 9, 10, 11, 29, 57, 61, 64, 120])
def test_killed_at_any_write_and_resumed(whole, tmp_path, event):
    run = tmp_path / "run"
    assert killed_at(event, run, resume=False)
    if not (run / "settings.toml").exists():
        run_training(run)
    else:
        killed_at(event + 7, run, resume=True)  # and once more
        run_training(run, resume=True)
    assert_same(run, whole)


def test_killed_after_an_epoch_it_ends_in_the_same_bytes(whole, tmp_path):
    run = tmp_path / "run"
    assert killed_at(30, run, resume=False, settings=SILENT)
    assert load_checkpoint(run / "checkpoints/last.pt").epoch in (1, 2)
    run_training(run, resume=True, settings=SILENT)
    for log in ("timing.jsonl", "metrics.jsonl"):
        assert [record["epoch"] for record in read_records(run / log)] == [1, 2, 3]
    assert (run / "checkpoints/last.pt").read_bytes() == (whole / "checkpoints/last.pt").read_bytes()


@pytest.mark.stress
def test_killed_at_random_instants_fifty_times(whole, tmp_path):
    rng = random.Random(1)
    begun = time.monotonic()
    run_training(tmp_path / "timed")
    longest = time.monotonic() - begun
    for number in range(50):
        run = tmp_path / f"run{number}"
        while not (run / "done").exists():
            resume = (run / "settings.toml").exists()
            child = os.fork()
            if child == 0:
                try:
                    run_training(run, resume=resume)
                finally:
                    os._exit(0)
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert_same(run, whole)


# Batches 1-4 of an epoch train, 5 and 6 validate teacher and student, 7 and 8 report the target.
@pytest.mark.parametrize(
    ("number", "one"),
    [(2, signal.SIGTERM), (4, signal.SIGINT), (5, signal.SIGHUP), (8, signal.SIGUSR1), (15, signal.SIGTERM)],
)
def test_signals_checkpoint_and_leave_cleanly(whole, tmp_path, number, one):
    run = tmp_path / "run"
    before = signal.getsignal(one)
    with pytest.raises(RunError) as caught:
        run_training(run, settings=SILENT, dataset=Signalling(number, one, training=False))
    assert one.name in caught.value.message
    assert "--resume" in caught.value.remedy
    assert signal.getsignal(one) is before
    assert not (run / "done").exists()
    run_training(run, settings=SILENT, resume=True)
    assert_same(run, whole)


def signalled(function, at: int, signals):
    """The function, at whose at-th call this process gets the signals, one after another."""

    def wrapper(*args):
        for one in signals if next(calls) == at else ():
            signal.raise_signal(one)
        return function(*args)

    calls = iter(range(1, 999))
    return wrapper


@pytest.mark.parametrize(
    ("signals", "more"),
    [
        ([signal.SIGTERM] * 2, []),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP], []),
        ([signal.SIGTERM], [signal.SIGTERM]),  # while the checkpoint is written: torch makes an error of it
    ],
)
def test_several_signals_ask_once(whole, tmp_path, monkeypatch, signals, more):
    """As when Slurm tells every process of a job, and each tells the one that it has begun."""
    run = tmp_path / "run"
    monkeypatch.setattr(trainer.TrainStep, "__call__", signalled(trainer.TrainStep.__call__, 3, signals))
    monkeypatch.setattr(files._Remembering, "write", signalled(files._Remembering.write, 1, more))
    with pytest.raises(StoppedError, match=f"by {signals[0].name} after step 3"):
        run_training(run, settings=SILENT)
    run_training(run, settings=SILENT, resume=True)
    assert_same(run, whole)


def test_a_signal_after_the_last_step_stops_too(whole, tmp_path, monkeypatch):
    """What comes after the training, of a cell its evaluation, does not begin."""
    run, finish = tmp_path / "run", trainer.Trainer._finish_epoch
    monkeypatch.setattr(trainer.Trainer, "_finish_epoch", signalled(finish, 3, [signal.SIGTERM]))
    with pytest.raises(StoppedError, match="after step 12 of 12"):
        run_training(run, settings=SILENT)
    run_training(run, settings=SILENT, resume=True)
    assert_same(run, whole)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_interrupts_at_once_and_the_run_goes_on(whole, tmp_path, monkeypatch, first):
    run = tmp_path / "run"
    signals = [first, signal.SIGINT]
    monkeypatch.setattr(trainer.TrainStep, "__call__", signalled(trainer.TrainStep.__call__, 6, signals))
    with pytest.raises(KeyboardInterrupt):
        run_training(run, settings=SILENT)
    assert load_checkpoint(run / "checkpoints/last.pt").step == 4
    run_training(run, settings=SILENT, resume=True)
    assert_same(run, whole)


def serve(arguments: list[str], _: Say) -> int:
    """The process of a training whose second step takes longer than one without an owner has, and says by files that it
    begins, and that it was asked for the end: RUN, FILE, FILE."""
    warm._LAST_SECONDS = 0.1
    warm.end_with_owner()
    step, steps = trainer.TrainStep.__call__, iter(range(99))

    def slow(*batch):
        if next(steps) == 1:
            note, asked = signal.getsignal(signal.SIGTERM), Path(arguments[2])
            signal.signal(signal.SIGTERM, lambda *one: (note(*one), asked.touch()))
            Path(arguments[1]).touch()
            helpers.until(asked.exists)
            time.sleep(0.3)  # long enough to be ended in, if it were asked twice
        return step(*batch)

    trainer.TrainStep.__call__ = slow
    try:
        run_training(Path(arguments[0]), settings=SILENT)
    except StoppedError:
        return STOPPED_CODE
    return 0


def test_an_owner_that_asks_for_the_end_and_waits_has_asked_once(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    run, worker = tmp_path / "run", Worker(threads=1)
    begun, asked, log = tmp_path / "begun", tmp_path / "asked", tmp_path / "log"
    worker.begin(Order("test_resume:serve", (str(run), str(begun), str(asked)), str(log)))
    helpers.until(begun.exists, worker.process)
    worker.terminate()
    helpers.until(asked.exists, worker.process)  # two signals at once may be told as one
    worker.close()
    assert (run / "checkpoints/last.pt").exists(), log.read_text()
    assert load_checkpoint(run / "checkpoints/last.pt").step == 2
    run_training(run, settings=SILENT, resume=True)
    assert_same(run, whole)


def test_a_complete_run_is_left_as_it_is(whole, tmp_path):
    stamp = (whole / "checkpoints/last.pt").stat().st_mtime_ns
    assert json_values(run_training(whole, settings=SILENT, resume=True)) == {
        key: value for key, value in read_json(whole / "done").items() if key != "files"
    }
    assert (whole / "checkpoints/last.pt").stat().st_mtime_ns == stamp


def test_resume_refuses_another_cache(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RunError):
        run_training(run, dataset=Signalling(3, training=False))
    dataset = MemoryDataset()
    dataset.fingerprints["left"] = "changed"
    with pytest.raises(CheckpointError, match="left changed"):
        run_training(run, resume=True, dataset=dataset)


def test_resume_refuses_an_edited_method(tmp_path):
    run, file = tmp_path / "run", tmp_path / "mine.py"
    code = "from mbcd_cli.methods.base import Method\nclass Mine(Method):\n    pass\n"
    file.write_text(code)
    settings = memory_settings(**KEEPING, method={"name": f"{file}:Mine"})
    with pytest.raises(StoppedError):
        run_training(run, settings=settings, dataset=Signalling(3, training=False))
    file.write_text(f"{code}    views = 2\n")
    with pytest.raises(CheckpointError, match=rf"{file} was edited since .*\n.*Set the file back, or train anew"):
        run_training(run, settings=settings, resume=True)
    file.write_text(f"# A comment is no other code.\n{code}")
    assert run_training(run, settings=settings, resume=True).epochs == 2
