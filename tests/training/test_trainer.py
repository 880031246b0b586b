"""The loop: selection, averages, limits, warnings, non-finite losses, plots and the dry run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import MemoryDataset, memory_settings

from mbcd_cli import console
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import FileError, RunError, SettingsError
from mbcd_cli.files import read_records
from mbcd_cli.methods.mbcd import MBCD
from mbcd_cli.randomness import Randomness, seed_everything, step_seed
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.runs.events import Events
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.scoring.deployed import build_models
from mbcd_cli.training import train as command
from mbcd_cli.training import watch
from mbcd_cli.training.dry_run import dry_run
from mbcd_cli.training.trainer import better
from mbcd_cli.training.validation import EpochRecord, HeadRecord, HeldOutRecord, ModelRecord


def run_training(run, settings, dataset=None):
    return command.train(
        settings, dataset or MemoryDataset(), run=run, resume=False, overwrite=False, say=console.terminal
    )


def accuracy(model, dataset, clips):
    """Fused accuracy by a plain loop over single clips."""
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in dataset.batches(clips, batch_size=1, training=False):
            logits, _ = model(batch.inputs)
            right += int(logits[0].argmax() == batch.labels[0])
    return right / len(clips)


@pytest.mark.parametrize("method", ["erm", "ema", "mbcd"])
def test_training_learns_and_the_record_is_true(tmp_path, method):
    settings = memory_settings(training={"epochs": 8}, method={"name": method}, average={"beta": 0.7})
    dataset = MemoryDataset()
    summary = run_training(tmp_path / "run", settings, dataset)
    assert summary.deployed == ("student" if method == "erm" else "teacher")
    assert summary.best.validation >= 0.9
    assert summary.oracle.target >= summary.best.target
    best = load_checkpoint(tmp_path / "run/checkpoints/best.pt")
    models = build_models(settings, dataset, best, device=torch.device("cpu"))
    validation = dataset.select(domains=("a", "b"), splits=("test",))
    target = dataset.select(domains=("c",), splits=("test",))
    model = models[summary.deployed]
    assert accuracy(model, dataset, validation) == pytest.approx(summary.best.validation)
    assert accuracy(model, dataset, target) == pytest.approx(summary.best.target)
    history = read_records(tmp_path / "run/metrics.jsonl")
    scores = [r["validation"][summary.deployed]["fused"] for r in history]
    expected = max(range(8), key=lambda i: (scores[i]["accuracy"], -scores[i]["loss"], -i)) + 1
    assert best.epoch == summary.best.epoch == expected


def test_selection_breaks_ties_by_loss_then_by_the_earlier_epoch():
    best = HeadRecord(0.9, 0.4)
    assert better(HeadRecord(0.91, 0.8), best)
    assert better(HeadRecord(0.9, 0.3), best)
    assert not better(HeadRecord(0.9, 0.4), best)
    assert not better(HeadRecord(0.9, 0.5), best)
    assert not better(HeadRecord(0.89, 0.1), best)


def test_the_target_never_influences_training(tmp_path):
    def weights(name, spoil):
        dataset = MemoryDataset()
        if spoil:
            rows = np.flatnonzero(dataset.clips.domains == 2)
            for values in (*dataset.arrays.values(), *dataset.training.values()):
                values[rows] = 100
            dataset.labels[rows] = 0
        run_training(tmp_path / name, memory_settings(), dataset)
        return load_checkpoint(tmp_path / name / "checkpoints/best.pt")

    one, two = weights("one", False), weights("two", True)
    assert one.epoch == two.epoch
    assert all(torch.equal(one.student[k], two.student[k]) for k in one.student)


def test_step_records_are_means_and_epoch_means_weigh_all_steps(tmp_path):
    run_training(tmp_path / "one", memory_settings(training={"log_steps": 1}))
    run_training(tmp_path / "three", memory_settings(training={"log_steps": 3}))
    single, triple = (read_records(tmp_path / n / "steps.jsonl") for n in ("one", "three"))
    # 4 steps per epoch: records after steps 3 and 4, then (an epoch's end also ends a record) 6 and 8.
    assert [(r["step"], r["steps"]) for r in triple] == [(3, 3), (4, 1), (6, 2), (8, 2)]
    assert triple[0]["total"] == pytest.approx(np.mean([r["total"] for r in single[:3]]), abs=1e-12)
    epochs = [read_records(tmp_path / n / "metrics.jsonl") for n in ("one", "three")]
    for r, s in zip(*epochs, strict=True):
        expected = np.mean([q["total"] for q in single if q["epoch"] == r["epoch"]])
        assert r["train"]["total"] == pytest.approx(expected, abs=1e-12)
        assert s["train"]["total"] == pytest.approx(expected, abs=1e-12)
        assert r["validation"] == s["validation"]


def test_same_seed_same_bits_other_seed_other_weights(tmp_path):
    def weights(name, seed):
        run_training(tmp_path / name, memory_settings(training={"seed": seed}))
        return load_checkpoint(tmp_path / name / "checkpoints/last.pt").student

    one, same, other = weights("one", 1), weights("same", 1), weights("other", 2)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["fused_head.0.weight"], other["fused_head.0.weight"])


def test_limits(tmp_path):
    summary = run_training(tmp_path / "steps", memory_settings(training={"max_steps": 6, "epochs": 9}))
    assert (summary.steps, summary.epochs) == (6, 2)
    summary = run_training(tmp_path / "clips", memory_settings(training={"limit_clips": 17}))
    assert summary.steps == 2 * (17 // 8)
    with pytest.raises(SettingsError, match="fewer than one batch"):
        run_training(tmp_path / "few", memory_settings(training={"limit_clips": 5}))
    with pytest.raises(SettingsError, match="batch of one clip"):
        run_training(tmp_path / "one", memory_settings(training={"batch_size": 1}))


def test_no_target_trains_in_domain(tmp_path):
    settings = memory_settings(training={"target_domain": None, "source_domains": ("a", "b", "c")})
    summary = run_training(tmp_path / "run", settings)
    assert summary.oracle is None
    assert summary.best.target is None


def test_a_target_that_leaves_no_source_is_refused():
    settings = memory_settings(
        training={"target_domain": "a", "source_domains": ()}, dataset={"name": "memory", "domains": ("a",)}
    )
    with pytest.raises(SettingsError, match="No source domain is left to train on beside a") as caught:
        open_for_training(settings, MemoryDataset())
    assert "--target-domain" in caught.value.remedy


class Poisoned(MemoryDataset):
    """One training clip holds NaN."""

    def __init__(self) -> None:
        super().__init__()
        for values in (self.arrays, self.training):
            values["left"][self.bad] = torch.nan

    bad = 3


def test_a_non_finite_loss_stops_names_the_clips_and_keeps_the_last_good_checkpoint(tmp_path):
    run = tmp_path / "run"
    settings = memory_settings(training={"checkpoint_minutes": 1e-9})
    with pytest.raises(RunError) as caught:
        run_training(run, settings, Poisoned())
    assert "not finite" in caught.value.message
    assert "a_3" in caught.value.message
    assert "optimizer.lr" in caught.value.remedy
    assert not (run / "done").exists()
    assert json.loads((run / "warnings.jsonl").read_text())["warning"] == caught.value.message
    if (run / "checkpoints/last.pt").exists():
        good = load_checkpoint(run / "checkpoints/last.pt")
        assert all(torch.isfinite(v).all() for v in good.student.values())


def test_infinite_weights_never_reach_a_checkpoint(tmp_path):
    """The loss of the first step is finite, its update is not, and a checkpoint is due after it."""
    settings = memory_settings(
        optimizer={"name": "sgd", "lr": 1e38, "weight_decay": 1e4}, training={"checkpoint_minutes": 1e-9}
    )
    with pytest.raises(RunError, match="not finite"):
        run_training(tmp_path / "run", settings)
    assert not list((tmp_path / "run/checkpoints").glob("*.pt"))


def record(epoch, *, dropped=0.0, teacher=0.9, student=0.9, divergence=0.1):
    teachers, students = (ModelRecord(HeadRecord(accuracy, 1.0), {}) for accuracy in (teacher, student))
    return EpochRecord(
        epoch=epoch,
        step=epoch,
        train={"modalities": {"video": {"dropped": dropped}, "audio": {"dropped": 0.0}}},
        validation=HeldOutRecord(teacher=teachers, student=students, divergence=divergence),
    )


def test_warnings():
    assert watch.training_warnings([record(1)], epochs=4) == {}
    assert "video" in watch.training_warnings([record(1, dropped=0.95)], epochs=4, alarms=MBCD.alarms)["collapse video"]
    assert watch.training_warnings([record(1, teacher=0.2)], epochs=4) == {}  # a young teacher is always behind
    assert "beta" in watch.training_warnings([record(3, teacher=0.2)], epochs=4)["lag"]
    drifting = [record(e, divergence=d) for e, d in enumerate((0.5, 0.9, 1.5, 2.5), start=1)]
    assert "drift" in watch.training_warnings(drifting, epochs=20)["divergence"]
    assert watch.training_warnings(drifting[::-1], epochs=20) == {}


def test_a_warning_is_given_once_and_recorded(tmp_path, capsys):
    settings = memory_settings(training={"epochs": 3}, method={"dropout": {"strategy": "fixed", "rate": 1.0}})
    summary = run_training(tmp_path / "run", settings)
    assert len([w for w in summary.warnings if "collapse" in w]) == 2
    assert capsys.readouterr().err.count("modality left was dropped") == 1
    assert "collapse left" in read_records(tmp_path / "run/metrics.jsonl")[0]["warnings"]


def test_plots_and_events_are_written(tmp_path):
    summary = run_training(tmp_path / "run", memory_settings())
    assert summary.plots == ["plots/losses.png", "plots/balance.png", "plots/accuracy.png"]
    for name in summary.plots:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/events")).Reload()
    scalars = {(e.step, round(e.value, 5)) for e in events.Scalars("step/total")}
    assert scalars == {
        (r["step"], round(float(np.float32(r["total"])), 5)) for r in read_records(tmp_path / "run/steps.jsonl")
    }
    assert "epoch/validation/teacher/fused/accuracy" in events.Tags()["scalars"]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for number, after in enumerate((0, 2)):
        events = Events(tmp_path, purge_after=after)
        for step in range(after + 1, 5):
            events.scalars("step", {"total": 10.0 * number + step}, step)
        events.close()
        (tmp_path / "later").mkdir(exist_ok=True)
        next(tmp_path.glob("events.*")).rename(tmp_path / f"later/events.out.tfevents.{number}")  # in other seconds
    read = EventAccumulator(str(tmp_path / "later")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("step/total")] == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]


def test_events_on_a_full_disk_are_one_message(tmp_path):
    events = Events(tmp_path)
    events._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 (closed below)
    with pytest.raises(FileError, match="The disk is full"):
        events.scalars("step", {"total": 1.0}, 1)
    events.close()


def test_dry_run_counts_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = dry_run(memory_settings(), MemoryDataset())
    # Tail: (6+1)*16 + 2*16 + (16+1)*16 + 2*16 = 448; head: (16+1)*8 + (8+1)*4 = 172; fused: (32+1)*8 + (8+1)*4 = 300.
    assert report.parameters.tails == {"left": 448, "right": 448}
    assert report.parameters.unimodal_heads == 344
    assert report.parameters.fused_head == 300
    assert report.parameters.trained == 2 * 448 + 344 + 300
    assert report.shapes == {"left": [[6]], "right": [[6]]}
    assert report.steps == 8
    assert report.step_seconds > 0
    assert not list(tmp_path.iterdir())


def test_the_dataset_in_memory_is_what_the_protocol_says():
    assert isinstance(MemoryDataset(), Dataset)


def test_an_average_that_remembers_longer_than_the_training_is_told(tmp_path, capsys):
    run_training(tmp_path / "a", memory_settings(training={"epochs": 1}, method={"name": "mbcd"}))
    assert "% of the initial weights (average.beta = 0.9): train longer" in capsys.readouterr().err
    run_training(tmp_path / "b", memory_settings(training={"epochs": 1}, method={"name": "erm"}))
    assert "initial weights" not in capsys.readouterr().err


def test_a_plot_that_fails_does_not_cost_the_training_its_end(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise ValueError("a value that cannot be drawn")

    monkeypatch.setattr("mbcd_cli.training.curves._losses", failing)
    with pytest.warns(UserWarning, match="A plot could not be drawn"):
        summary = run_training(tmp_path / "run", memory_settings(training={"epochs": 1}))
    assert (tmp_path / "run" / "done").is_file()
    assert "plots/accuracy.png" in summary.plots


def test_classes_that_are_only_tested_are_told(tmp_path, capsys):
    dataset = MemoryDataset()
    sources = dataset.select(domains=("a", "b"), splits=("train",))
    dataset.labels[sources] = 0
    run_training(tmp_path / "run", memory_settings(training={"epochs": 1}), dataset)
    assert "No training clip is of class" in capsys.readouterr().err


def test_the_steps_draws_are_not_those_of_the_weights():
    for seed in (0, 1, -1, 2**63):
        seed_everything(seed)
        weights, draws = torch.rand(64), Randomness(seed=step_seed(seed)).uniform(64)
        assert not torch.isin(weights, draws).any()
    assert len({step_seed(seed) for seed in range(100)}) == 100
