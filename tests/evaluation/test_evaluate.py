from __future__ import annotations

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_cases import make_checkpoint, make_dataset, make_settings
from memory import MemoryWeights

from mbcd_cli import checksums, console
from mbcd_cli.cli.evaluate import show_evaluation
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.errors import CheckpointError, MbcdError, SettingsError
from mbcd_cli.evaluation.evaluate import evaluate
from mbcd_cli.evaluation.report.results import pretraining_words, provenance
from mbcd_cli.files import read_json, read_records
from mbcd_cli.json_values import json_values
from mbcd_cli.model import build_model
from mbcd_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from mbcd_cli.scoring.clip_sets import clip_sets
from mbcd_cli.scoring.deployed import build_models
from mbcd_cli.scoring.history import Oracle, accuracy_history
from mbcd_cli.settings import role_of

CPU = torch.device("cpu")


def by_hand(settings, dataset, state, clips):
    """Top-1 of every head, clip by clip, with plain modules."""
    model = build_model(dataset.modalities, settings=settings.model, classes=dataset.classes)
    model.load_state_dict(state)
    model.eval()
    right = {"fused": 0, **dict.fromkeys(dataset.modalities, 0)}
    for clip in clips:
        with torch.no_grad():
            fused, unimodal = model({n: (v[clip : clip + 1],) for n, v in dataset.arrays.items()})
        for name, logits in {"fused": fused, **unimodal}.items():
            right[name] += int(logits[0].argmax()) == dataset.labels[clip]
    return {name: count / len(clips) for name, count in right.items()}


def test_results_are_of_the_file_that_was_read_whatever_a_training_writes_meanwhile(settings, dataset, tmp_path):
    path = tmp_path / "checkpoints" / "best.pt"
    save_checkpoint(path, make_checkpoint(settings, dataset))
    read, told = load_checkpoint(path), checksums.checksum(path)
    save_checkpoint(path, make_checkpoint(settings, dataset, seed=1))
    how = {"device": CPU, "run": tmp_path, "output": tmp_path, "pictures": False}
    assert evaluate(settings, dataset, {"best": read}, **how).results.checkpoints == {"best": told}
    assert checksums.checksum(path) != told


@pytest.mark.parametrize("target_split", ["test", "all"])
def test_every_model_on_every_set_of_clips(settings, dataset, tmp_path, target_split):
    settings = settings.model_copy(
        update={"dataset": settings.dataset.model_copy(update={"target_split": target_split})}
    )
    checkpoints = {n: make_checkpoint(settings, dataset, seed=i) for i, n in enumerate(("best", "last"))}
    figures = evaluate(settings, dataset, checkpoints, device=CPU, run=None, output=tmp_path).results
    target = (dataset.domain == 2) & ((dataset.split == 1) | (target_split == "all"))
    source = (dataset.domain != 2) & (dataset.split == 1)
    for name, checkpoint in checkpoints.items():
        # The teacher's uni-modal heads are the student's.
        states = {"student": checkpoint.student, "teacher": {**checkpoint.student, **checkpoint.teacher}}
        for model, state in states.items():
            for clip_set, mask in {"source": source, "target": target}.items():
                clips = np.nonzero(mask)[0]
                measured = figures.models[name][model][clip_set]
                assert measured["fused"].clips == len(clips)
                expected = by_hand(settings, dataset, state, clips)
                assert {h: f.top1 for h, f in measured.items()} == pytest.approx(expected)
    headline = figures.headline
    assert (headline.checkpoint, headline.model, headline.clips) == ("best", "teacher", "target")
    assert headline.top1["fused"] == figures.models["best"]["teacher"]["target"]["fused"].top1
    assert set(figures.models["best"]["teacher"]["source"]["fused"].per_domain) == {"studio", "tilted"}
    stored = read_json(tmp_path / "results.json")
    assert stored.pop("files").keys() >= {"plots/confusion-target.png"}
    assert stored == json_values(figures)
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "confusion-source.png",
        "confusion-target.png",
        "classes-source.png",
        "classes-target.png",
    }


def test_teacher_heads_of_the_checkpoint_are_ignored_for_the_students(settings, dataset):
    checkpoint = make_checkpoint(settings, dataset)
    junk = {k: torch.full_like(v, 7.0) for k, v in checkpoint.student.items() if k.startswith("heads.")}
    weights = MemoryWeights(checkpoint.student, {**checkpoint.teacher, **junk}, dataset.label_names)
    teacher = build_models(settings, dataset, weights, device=CPU)["teacher"].state_dict()
    for key, value in checkpoint.student.items():
        expected = value if key.startswith("heads.") else checkpoint.teacher[key]
        assert torch.equal(teacher[key], expected)


def test_without_teacher_and_without_target(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 160)
    settings = make_settings(target_domain=None, method="erm")
    dataset = make_dataset(settings)
    checkpoints = {"last": make_checkpoint(settings, dataset, teacher=False)}
    done = evaluate(settings, dataset, checkpoints, device=CPU, run=None, output=tmp_path)
    figures = done.results
    assert figures.headline.model == "student"
    assert figures.headline.clips == "source"
    assert set(figures.models["last"]) == {"student"}
    assert set(figures.models["last"]["student"]) == {"source"}
    assert figures.models["last"]["student"]["source"]["fused"].clips == int((dataset.split == 1).sum())
    show_evaluation(done)
    printed = capsys.readouterr().out
    assert "last student *" in printed
    assert str(tmp_path / "results.json") in printed
    assert f"{100 * figures.headline.top1['fused']:.1f}" in printed


def test_accuracy_per_epoch_comes_from_the_run(settings, dataset, tmp_path):
    records = [{"epoch": e, "validation": {"teacher": {"fused": {"accuracy": e / 10}}}} for e in (1, 2, 3)]
    records[1]["target"] = {"teacher": {"fused": {"accuracy": 0.7}}}
    run = tmp_path / "run"
    run.mkdir()
    text = "\n".join(json.dumps(r) for r in records) + '\n{"epoch": 4, "valid'  # killed while writing
    (run / "metrics.jsonl").write_text(text)
    history = accuracy_history(read_records(run / "metrics.jsonl"))
    assert history.epochs == [1, 2, 3]
    assert history.lines == {
        ("validation", "teacher"): [0.1, 0.2, 0.3],
        ("target", "teacher"): [None, 0.7, None],
    }
    assert history.oracle("teacher") == Oracle("teacher", 2, 0.7)
    assert history.oracle("student") is None
    checkpoints = {"best": make_checkpoint(settings, dataset)}
    (run / "plots").mkdir()
    (run / "plots" / "accuracy.png").write_bytes(b"drawn by the training")
    done = evaluate(settings, dataset, checkpoints, device=CPU, run=run, output=run)
    assert done.results.oracle.top1 == 0.7
    assert done.files["accuracy per epoch"] == run / "plots" / "accuracy.png"  # so a report shows it once


def test_diverged_weights_are_reported_not_hidden(settings, dataset, tmp_path, capsys):
    checkpoint = make_checkpoint(settings, dataset)
    student = {k: torch.full_like(v, float("nan")) if "heads.audio" in k else v for k, v in checkpoint.student.items()}
    checkpoint = replace(checkpoint, student=student, fingerprints={"video": "old"})
    dataset.fingerprints = {"video": "new"}
    done = evaluate(settings, dataset, {"best": checkpoint}, device=CPU, run=None, output=tmp_path)
    assert any("diverged" in w for w in done.results.warnings)
    assert any("another cache of video" in w for w in done.results.warnings)
    assert done.results.models["best"]["teacher"]["target"]["audio"].top1 == 0.0
    show_evaluation(done)
    assert "diverged" in capsys.readouterr().err


def test_what_does_not_fit_is_one_clear_error(settings, dataset):
    other = make_checkpoint(settings, make_dataset(settings, classes=5))
    with pytest.raises(CheckpointError, match="trained on the classes"):
        build_models(settings, dataset, other, device=CPU)
    checkpoint = make_checkpoint(settings, dataset)
    wide = settings.model_copy(update={"model": settings.model.model_copy(update={"hidden": 16})})
    with pytest.raises(CheckpointError, match="does not fit these settings: size mismatch"):
        build_models(wide, dataset, checkpoint, device=CPU)
    with pytest.raises(SettingsError, match="no domain 'cellar'"):
        clip_sets(make_settings(target_domain="cellar"), dataset)
    dataset.split[:] = 0
    with pytest.raises(SettingsError, match="target domain 'street' has no usable clips of the test split"):
        clip_sets(settings, dataset)
    with pytest.raises(MbcdError, match="clips to test"):
        clip_sets(make_settings(target_domain=None), dataset)


def test_a_plot_that_fails_costs_no_figures_and_an_interrupt_keeps_the_earlier_results(
    settings, dataset, tmp_path, monkeypatch
):
    def run():
        return evaluate(settings, dataset, {"best": checkpoint}, device=CPU, run=None, output=tmp_path).results

    def failing(*_, **__):
        raise ValueError("a label that cannot be drawn")

    checkpoint = make_checkpoint(settings, dataset)
    before = run()
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("mbcd_cli.evaluation.report.plots.plot_per_class", lambda *_, **__: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    monkeypatch.setattr("mbcd_cli.evaluation.report.plots.plot_confusion", failing)
    after = run()
    assert after.headline == before.headline
    assert any("confusion on target could not be drawn" in w for w in after.warnings)
    assert not list(tmp_path.glob("plots/confusion-*"))


def test_results_name_the_pretraining_as_far_as_it_is_known(settings, dataset):
    sound, video = AudioModality(encoder="audio-resnet18", cut="layer4"), VideoModality(encoder="small-video")

    def told(modality: Modality, **passport: object) -> str:
        dataset.modalities = {"m": modality}
        cache = SimpleNamespace(passport=json.dumps(passport) if passport else None, provenance={})
        dataset.caches = {"m": cache} if passport else {}
        return provenance(dataset, {}, torch.device("cpu"))["m pretraining"]

    assert told(video) == "none"
    assert told(sound, sha256=None, wants={"pretraining": None}) == "none"
    assert told(sound, sha256="0" * 64, wants={"pretraining": None}) == "unknown"
    assert told(sound, sha256="0" * 64, wants={"pretraining": "VGGSound"}) == "VGGSound"
    assert told(ArrayModality()) == "unknown", "it may be a model's features"
    assert told(ArrayModality(pretraining="WebLI")) == "WebLI"
    # What the user says of it changes neither cache nor run.
    assert role_of("modalities.m.pretraining") == "report"
    assert role_of("modalities.m.encoder") == "weights"
    assert role_of("modalities.m.frames") == role_of("modalities.m.cut") == "cache"
    words = {"audio pretraining": "VGGSound", "video pretraining": "VGGSound"}
    assert pretraining_words(["audio", "video"], words) == "VGGSound"
    assert pretraining_words(["audio", "flow"], words) == "audio VGGSound; flow unknown"
