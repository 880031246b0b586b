"""`average.snapshots`: what is kept is the explicit average of every step's weights, whatever stops the training."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import MemoryDataset, Signalling, memory_settings
from small import KINDS_ALL, make_step, small_batch, small_model
from test_population import together

from mbcd_cli.errors import CheckpointError, RunError
from mbcd_cli.files import read_json, read_records
from mbcd_cli.integrity import examine
from mbcd_cli.methods.base import Method
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.runs.snapshot_files import kept_snapshots, load_snapshot, save_snapshot
from mbcd_cli.training import train as command
from mbcd_cli.training.assemble import assemble
from mbcd_cli.training.profiles import KEPT, PowerProfile, gamma_of
from mbcd_cli.training.snapshots import Snapshots

EPOCHS = 3


def settings_of(*, method="mbcd", snapshots=True, **training):
    groups = {"method": {"name": method}, "training": {"epochs": EPOCHS, **training}}
    return memory_settings(**groups, average={"beta": 0.9, "snapshots": snapshots})


def train(run, *, dataset=None, resume=False, **how):
    return command.train(settings_of(**how), dataset or MemoryDataset(), run=run, resume=resume, overwrite=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(run)
    return run


@pytest.mark.parametrize("average", [None, 0.8])
def test_it_is_the_explicit_average_of_all_steps_in_float64(average, tmp_path):
    """Batch norms' statistics and uni-modal heads too; of a student that a teacher taught, and of one alone."""
    model = small_model(2, KINDS_ALL, dropout=0.3)
    step = make_step(model, Method, average=average, lr=0.05)
    step.snapshots = Snapshots(model)
    history, ends = [], [4, 9, 11]
    for number in range(1, ends[-1] + 1):
        step(small_batch(2, KINDS_ALL, seed=number))
        history.append({name: value.clone() for name, value in model.state_dict().items()})
        if number not in ends:
            continue
        epoch = ends.index(number) + 1
        save_snapshot(tmp_path, step.snapshots.close(epoch, number))
        kept = load_snapshot(tmp_path, epoch)
        begun = 0 if epoch == 1 else ends[epoch - 2]
        assert (kept.epoch, kept.step, kept.steps) == (epoch, number, number - begun)
        names = {name for name, value in history[0].items() if value.is_floating_point()}
        assert set(kept.mean) == names
        assert any("running_var" in name for name in names)
        assert any(name.startswith("heads.") for name in names)
        of_steps = [PowerProfile(number, gamma_of(sigma)).of_steps(number) for sigma in KEPT]
        of_steps.append(np.array([0.0] * begun + [1 / (number - begun)] * (number - begun)))
        for state, weights in zip([*kept.averages, kept.mean], of_steps, strict=True):
            assert weights.sum() == pytest.approx(1, abs=1e-14)
            for name in names:
                expected = sum(weight * weights_of[name] for weight, weights_of in zip(weights, history, strict=True))
                torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-13)
        assert kept.counters == {n: v for n, v in history[-1].items() if n not in names}


def test_frozen_weights_are_not_kept():
    model = small_model(2, KINDS_ALL, live=True)
    assert any(name.startswith("trunks.") for name, _ in model.named_parameters())
    kept = Snapshots(model).weights
    assert not [name for name, parameter in model.named_parameters() if not parameter.requires_grad and name in kept]
    assert any(name.startswith("trunks.") and "running_mean" in name for name in kept)


def test_nobody_is_taught_by_it(whole, tmp_path):
    train(tmp_path / "plain", snapshots=False)
    assert not (tmp_path / "plain/snapshots").exists()
    for log in ("metrics.jsonl", "steps.jsonl"):
        assert (tmp_path / "plain" / log).read_bytes() == (whole / log).read_bytes()
    one, other = (load_checkpoint(run / "checkpoints/last.pt") for run in (whole, tmp_path / "plain"))
    assert all(torch.equal(one.student[name], other.student[name]) for name in one.student)


def test_every_epoch_has_its_file_and_verify_knows_it(whole):
    assert kept_snapshots(whole) == [1, 2, 3]
    names = [f"snapshots/epoch-00{epoch}.pt" for epoch in (1, 2, 3)]
    assert set(names) <= set(read_json(whole / "done")["files"])
    assert examine(whole).faults == []
    steps = [record["step"] for record in read_records(whole / "metrics.jsonl")]
    assert [load_snapshot(whole, epoch).step for epoch in (1, 2, 3)] == steps


@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_stopped_and_resumed_it_keeps_the_same_bytes(whole, tmp_path, at):
    run = tmp_path / "run"
    with pytest.raises(RunError, match="Stopped by SIGTERM"):
        train(run, dataset=Signalling(at))
    train(run, resume=True)
    for name in ("epoch-001.pt", "epoch-002.pt", "epoch-003.pt"):
        assert (run / "snapshots" / name).read_bytes() == (whole / "snapshots" / name).read_bytes()


def test_a_population_keeps_what_each_would_have_kept_alone(tmp_path):
    members = [replace_seed(settings_of(), seed) for seed in (0, 1)]
    together(tmp_path / "population", members)
    for number, settings in enumerate(members):
        command.train(settings, MemoryDataset(), run=tmp_path / str(number), resume=False, overwrite=False)
        for epoch in kept_snapshots(tmp_path / str(number)):
            one, other = (
                load_snapshot(run, epoch) for run in (tmp_path / "population" / str(number), tmp_path / str(number))
            )
            assert (one.step, one.steps, one.gammas) == (other.step, other.steps, other.gammas)
            for state, alone in zip([*one.averages, one.mean], [*other.averages, other.mean], strict=True):
                for name, value in state.items():
                    torch.testing.assert_close(value, alone[name], rtol=0, atol=5e-3)  # Adam makes much of little


def replace_seed(settings, seed):
    return settings.model_copy(update={"training": settings.training.model_copy(update={"seed": seed})})


def test_they_begin_with_the_first_step(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RunError, match="Stopped by SIGTERM"):
        train(run, dataset=Signalling(6), snapshots=False)
    with pytest.raises(CheckpointError, match=r"without average\.snapshots"):
        train(run, resume=True)
    train(run, resume=True, snapshots=False)


def test_what_is_missing_or_damaged_is_told(whole, tmp_path):
    with pytest.raises(RunError, match=r"--set average\.snapshots=true"):
        kept_snapshots(tmp_path)
    snapshot = load_snapshot(whole, 2)
    save_snapshot(tmp_path, snapshot)
    with pytest.raises(RunError, match="lacks averages of some epochs"):
        kept_snapshots(tmp_path)
    with pytest.raises(CheckpointError, match="There is no snapshot"):
        load_snapshot(tmp_path, 1)
    path = save_snapshot(tmp_path, replace(snapshot, epoch=1, gammas=[1.0]))
    with pytest.raises(CheckpointError, match="damaged: its exponents are none"):
        load_snapshot(tmp_path, 1)
    (tmp_path / "snapshots/epoch-002 (copy).pt").write_bytes(path.read_bytes())
    assert kept_snapshots(tmp_path) == [1, 2]
    shutil.copy(whole / "snapshots/epoch-003.pt", tmp_path / "snapshots/epoch-002.pt")
    with pytest.raises(CheckpointError, match=r"damaged: it is of epoch 3\n.*average\.snapshots=true"):
        load_snapshot(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no readable snapshot"):
        load_snapshot(tmp_path, 1)
    (tmp_path / "snapshots/epoch-001.pt").write_bytes((whole / "checkpoints/best.pt").read_bytes())
    with pytest.raises(CheckpointError, match="was not written by mbcd train"):
        load_snapshot(tmp_path, 1)


def test_one_seed_of_the_first_weights_for_all_seeds():
    def first(**training):
        parts = assemble(settings_of(**training), MemoryDataset(), device=torch.device("cpu"))
        return parts.step.model.state_dict(), torch.rand(3)

    (one, drawn), (other, drawn_by_other) = first(seed=1, init_seed=7), first(seed=2, init_seed=7)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(drawn, drawn_by_other)
    (plain, _), (seeded, _) = first(seed=7), first(seed=1, init_seed=8)
    name = "fused_head.0.weight"
    assert torch.equal(one[name], plain[name])
    assert not torch.equal(one[name], seeded[name])
