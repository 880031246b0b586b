"""Checkpoints and run folders: what comes back, what is refused, what is never lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from fakes import MemoryDataset, memory_settings

from mbcd_cli import locks
from mbcd_cli.errors import CheckpointError, FileError, RunError
from mbcd_cli.integrity import examine
from mbcd_cli.runs import checkpoint as module
from mbcd_cli.runs import folder as folder_module
from mbcd_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from mbcd_cli.runs.folder import open_run
from mbcd_cli.scoring.deployed import build_models
from mbcd_cli.training import train as command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "run"
    command.train(memory_settings(), MemoryDataset(), run=run, resume=False, overwrite=False)
    return run


def test_a_checkpoint_says_all_that_later_stages_need(trained):
    last, best = load_checkpoint(trained / "checkpoints/last.pt"), load_checkpoint(trained / "checkpoints/best.pt")
    dataset = MemoryDataset()
    assert last.settings == memory_settings()
    assert last.modalities == dataset.modalities
    assert (last.label_names, last.domains, last.fingerprints) == (
        dataset.label_names,
        dataset.domains,
        dataset.fingerprints,
    )
    assert (last.epoch, last.epoch_step, last.step) == (2, 0, 8)
    assert [record["epoch"] for record in last.history] == [1, 2]
    assert best.epoch == last.best["epoch"]
    assert best.training is None
    models = build_models(last.settings, dataset, last, device=torch.device("cpu"))
    assert list(models) == ["teacher", "student"]
    teacher, student = (models[name].state_dict() for name in ("teacher", "student"))
    assert all(torch.equal(teacher[k], student[k]) for k in teacher if k.startswith("heads."))
    assert not torch.equal(teacher["fused_head.0.weight"], student["fused_head.0.weight"])


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile(path: Path, proof: Path) -> None:
    torch.save({"format": module._FORMAT, "version": module._VERSION, "student": Touch(proof)}, path)


def raw_pickle(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps(Touch(proof)))


def truncated(path: Path, proof: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path, proof: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path, proof: Path) -> None:
    payload = torch.load(path, weights_only=True)
    payload["student"] = {"tails": [1, 2]}
    torch.save(payload, path)


def incomplete(path: Path, proof: Path) -> None:
    payload = torch.load(path, weights_only=True)
    del payload["label_names"]
    torch.save(payload, path)


def foreign(path: Path, proof: Path) -> None:
    torch.save({"state_dict": {"conv.weight": torch.zeros(2)}}, path)


def bare(path: Path, proof: Path) -> None:
    torch.save(torch.zeros(3), path)


def newer(path: Path, proof: Path) -> None:
    payload = torch.load(path, weights_only=True)
    torch.save(payload | {"version": 99}, path)


def other_settings(path: Path, proof: Path) -> None:
    payload = torch.load(path, weights_only=True)
    settings = json.loads(payload["settings"]) | {"no_such_slice": {}}
    torch.save(payload | {"settings": json.dumps(settings)}, path)


def missing(path: Path, proof: Path) -> None:
    path.unlink()


SPOILERS = (
    hostile, raw_pickle, truncated, emptied, flipped, incomplete, foreign, bare, newer, other_settings, missing
)  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS)
def test_bad_checkpoints_are_refused_with_a_remedy_and_nothing_runs(trained, tmp_path, spoil):
    path, proof = tmp_path / "last.pt", tmp_path / "proof"
    path.write_bytes((trained / "checkpoints/last.pt").read_bytes())
    spoil(path, proof)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy
    assert not proof.exists()


def test_an_error_that_says_nothing_is_told_by_its_kind(trained, monkeypatch):
    def refuse(payload):
        raise ValueError

    monkeypatch.setattr(module, "_parse", refuse)
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged: ValueError"):
        load_checkpoint(trained / "checkpoints/last.pt")


def test_a_full_disk_keeps_the_previous_checkpoint(trained, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, load_checkpoint(trained / "checkpoints/last.pt"))
    before = path.read_bytes()

    def full(payload, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(FileError, match="The disk is full"):
        save_checkpoint(path, load_checkpoint(path))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_an_existing_run_is_never_overwritten_unasked(trained):
    before = (trained / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="already holds a run"):
        open_run(trained, settings=memory_settings(), resume=False, overwrite=False)
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_who_goes_on_with_a_run_clears_what_was_left_half_written_of_it(tmp_path):
    """Of other hosts too: who holds the run's lock is alone."""
    open_run(tmp_path, settings=memory_settings(), resume=False, overwrite=False).close()
    for part in (".", "checkpoints", "plots"):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / ".last.pt.elsewhere.17.partial").touch()
    open_run(tmp_path, settings=memory_settings(), resume=True, overwrite=False).close()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_that_ended_before_its_first_epoch_is_in_nobodys_way(tmp_path):
    """A setting that is refused, or a kill, at the start: the command with the mended setting needs no --overwrite."""
    open_run(tmp_path, settings=memory_settings(), resume=False, overwrite=False).close()
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n')
    open_run(tmp_path, settings=memory_settings(training={"seed": 1}), resume=False, overwrite=False).close()
    assert not (tmp_path / "steps.jsonl").exists()
    for name in ("metrics.jsonl", "done", "checkpoints/last.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        with pytest.raises(RunError, match="already holds a run"):
            open_run(tmp_path, settings=memory_settings(), resume=False, overwrite=False)
        (tmp_path / name).unlink()


def test_overwrite_deletes_runs_only(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="no run folder"):
        open_run(tmp_path, settings=memory_settings(), resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    run = tmp_path / "run"
    open_run(run, settings=memory_settings(), resume=False, overwrite=False).close()
    (run / "metrics.jsonl").write_text("{}\n")
    open_run(run, settings=memory_settings(), resume=False, overwrite=True).close()
    assert not (run / "metrics.jsonl").exists()


def test_an_overwrite_that_is_killed_leaves_no_run_to_be_gone_on_with_or_believed(trained, tmp_path, monkeypatch):
    """Whatever else is gone by then: the order of a folder's entries is nobody's."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "results.json").touch()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "clear", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run(run, settings=memory_settings(), resume=False, overwrite=True)
    assert not any((run / name).exists() for name in ("done", "results.json"))
    command.train(memory_settings(), MemoryDataset(), run=run, resume=True, overwrite=False)
    assert (run / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_without_locks_a_new_run_keeps_its_lease_and_a_finished_one_does_not_tell_of_it(tmp_path, monkeypatch):
    def none(handle, kind):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".lock.holder").touch()  # a kill before settings.toml was written
    os.utime(tmp_path / ".lock.holder", (0, 0))
    monkeypatch.setattr(locks, "_LEASE", 0.3)
    with open_run(tmp_path, settings=memory_settings(), resume=False, overwrite=False) as folder:
        assert (tmp_path / ".lock.holder").exists()
        folder.finish({})
    assert not examine(tmp_path).faults


def test_a_finished_run_tells_of_its_own_files_alone(tmp_path):
    """Others may evaluate an epoch of a training, or look at its landscape, and do so again after its end."""
    with open_run(tmp_path, settings=memory_settings(), resume=False, overwrite=False) as folder:
        folder.append("metrics.jsonl", {"epoch": 1})
        for name in ("plots/losses.png", "plots/confusion-target.png", "report.html", "landscape/surface.h5.journal-0"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("now")
        folder.finish({"plots": ["plots/losses.png"]})
    told = json.loads((tmp_path / "done").read_text())["files"]
    assert told.keys() == {"settings.toml", "metrics.jsonl", "plots/losses.png"}


def test_resume_names_the_settings_that_changed(trained):
    changed = memory_settings(optimizer={"lr": 0.5, "momentum": 0.8})
    with pytest.raises(RunError) as caught:
        open_run(trained, settings=changed, resume=True, overwrite=False)
    assert "optimizer.lr: was 0.01, now 0.5" in caught.value.message
    assert "optimizer.momentum" in caught.value.message
    assert "optimizer.name" not in caught.value.message


def test_resume_may_change_what_no_weight_depends_on(trained):
    settings = memory_settings(runtime={"threads": 1}, cache={"dir": "elsewhere"}, evaluation={"batch_size": 3})
    with open_run(trained, settings=settings, resume=True, overwrite=False) as folder:
        assert folder.resumed
        assert folder.summary["epochs"] == 2


def test_resume_of_nothing_and_a_file_in_the_way(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        open_run(tmp_path / "none", settings=memory_settings(), resume=True, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        open_run(tmp_path / "file", settings=memory_settings(), resume=False, overwrite=True)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run = tmp_path / "run"
    with (
        open_run(run, settings=memory_settings(), resume=False, overwrite=False),
        pytest.raises(RunError, match="Another process"),
    ):
        open_run(run, settings=memory_settings(), resume=True, overwrite=False)
    open_run(run, settings=memory_settings(), resume=True, overwrite=False).close()
