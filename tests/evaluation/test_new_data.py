"""New clips: predicted as the same clips are from the prepared dataset, labelled or not, bad ones reported."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from memory import checkpoint_of
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.data.modalities import default_modality
from mbcd_cli.data.readers.new_clips import UNKNOWN, given, read_new
from mbcd_cli.encoders import build_encoder
from mbcd_cli.errors import ManifestError
from mbcd_cli.model import build_model
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.checkpoint import save_checkpoint
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.settings import DatasetSettings
from mbcd_cli.settings.sources import to_toml

# The video's trunk is frozen and has weights of its own; sound and vectors are cut at the input.
SMALL = [
    *("modalities.video.kind=video", "modalities.video.frames=4", "modalities.video.short_side=32"),
    *("modalities.video.crop=28", "modalities.video.width=4", "modalities.video.cut=layer3"),
    *("modalities.audio.kind=audio", "modalities.audio.samples=4000", "modalities.audio.nperseg=128"),
    *("modalities.audio.noverlap=64", "modalities.audio.width=4", "modalities.pose.kind=array"),
    *("cache.views=1", "cache.workers=0", "modalities.video.weights=trunk.pt", "model.hidden=16"),
    *("training.target_domain=beta", "dataset.target_split=all"),
]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny")


@pytest.fixture(scope="module")
def run(media, tmp_path_factory) -> Path:
    """A run folder whose weights are random, and its evaluation on the prepared dataset."""
    folder = tmp_path_factory.mktemp("run")
    flags = {"dataset.root": media, "dataset.name": "tiny", "cache.dir": folder / "cache"}
    settings = resolve(sets=SMALL, flags=flags | {"cache.weights_dir": folder / "weights"})
    torch.manual_seed(5)
    (folder / "weights").mkdir()
    trunk = build_encoder("video", settings.modalities["video"]).stages.state_dict()
    torch.save(trunk, folder / "weights" / "trunk.pt")
    prepare(settings)
    settings, dataset = open_for_training(settings)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_model(dataset.modalities, settings=settings.model, classes=dataset.classes)
        states.append(model.state_dict())
    run = folder / "run"
    teacher = states[1] | {k: v for k, v in states[0].items() if k.startswith("heads.")}
    checkpoint = checkpoint_of(settings, dataset, student=states[0], teacher=teacher, epoch=1)
    for name in ("best", "last"):
        save_checkpoint(run / "checkpoints" / f"{name}.pt", checkpoint)
    (run / "settings.toml").write_text(to_toml(settings))
    evaluate(run)
    return run


def evaluate(run: Path) -> None:
    flags = ["--set", "evaluation.report=false", "--analyses", "trust", "--export", "csv"]
    done = CliRunner().invoke(app, ["evaluate", "--run", str(run), *flags])
    assert done.exit_code == 0, done.output


def predict(run: Path, *words: object):
    done = CliRunner().invoke(app, ["evaluate", "--run", str(run), *map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rewrite(media: Path, target: Path, columns: dict[str, str], edit=lambda row: row) -> Path:
    """A copy of the dataset whose manifest has the columns {new name: old name}."""
    shutil.copytree(media, target)
    rows = [edit({new: row[old] for new, old in columns.items()}) for row in table(media / "manifest.csv")]
    helpers.write_manifest(target / "manifest.csv", rows)
    return target


FILES = {"video": "video", "audio": "audio", "pose": "pose"}


def test_unlabelled_clips_are_predicted_as_in_the_evaluation(run, media, tmp_path):
    root = rewrite(media, tmp_path / "fresh", FILES)
    code, found = predict(run, "--data-root", root, "--output", tmp_path / "out")
    assert code == 0
    assert (found["clips"], found["predicted"], found["labelled"], found["accuracy"]) == (12, 12, 0, None)
    rows = table(tmp_path / "out" / "predict.csv")
    votes = [f"{m}_{what}" for m in ("video", "audio", "pose") for what in ("class", "probability")]
    assert list(rows[0]) == ["clip", "class", "probability", *votes]
    mine = {row["clip"]: row for row in rows}
    measured = table(run / "evaluation" / "predictions-target.csv") + table(run / "evaluation/predictions-source.csv")
    assert len(measured) == 8  # six clips of beta, two held-out ones of alpha
    for row in measured:
        one = mine[row["id"]]
        for head in ("", "video_", "audio_", "pose_"):
            assert one[f"{head}class"] == row[f"{head}predicted"]
            assert float(one[f"{head}probability"]) == pytest.approx(float(row[f"{head}probability"]), abs=2e-6)
    assert not (tmp_path / "out" / "rejected.csv").exists()
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["predicted"] == 12


def test_labelled_clips_give_accuracy_by_class_name_whatever_their_numbers(run, media, tmp_path):
    def renumber(row):
        return row | {"label": 7 - int(row["label"]), "comment": "x"}  # the names decide

    columns = {**FILES, "id": "id", "domain": "domain", "label": "label", "label_name": "label_name", "comment": "id"}
    root = rewrite(media, tmp_path / "fresh", columns, renumber)
    kept = tmp_path / "kept"
    code, found = predict(run, "--manifest", root / "manifest.csv", "--cache-dir", kept, "--output", tmp_path / "out")
    assert code == 0
    rows = table(tmp_path / "out" / "predict.csv")
    right = np.mean([row["class"] == row["label"] for row in rows])
    assert found["accuracy"]["fused"]["top1"] == pytest.approx(right)
    assert set(found["accuracy"]["fused"]["per_domain"]) == {"alpha", "beta"}
    assert {row["domain"] for row in rows} == {"alpha", "beta"}
    truth = {row["id"]: row["label_name"] for row in table(media / "manifest.csv")}
    assert {row["clip"]: row["label"] for row in rows} == truth
    # The named cache is kept, is reused, and is not mistaken for the training's dataset.
    assert [path.name for path in kept.iterdir()] == ["new-fresh"]
    before = {p: p.stat().st_mtime_ns for p in kept.rglob("shard-*.h5")}
    code, again = predict(run, "--data-root", root, "--cache-dir", kept, "--output", tmp_path / "out")
    assert again["accuracy"] == found["accuracy"]
    assert {p: p.stat().st_mtime_ns for p in kept.rglob("shard-*.h5")} == before


def test_bad_clips_are_recorded_and_counted(run, media, tmp_path):
    root = rewrite(media, tmp_path / "fresh", FILES)
    (root / "audio" / "alpha_0_0.wav").write_bytes(b"no sound")
    words = ["--data-root", root, "--output", tmp_path / "out"]
    code, found = predict(run, *words)
    assert code == 3
    assert (found["clips"], found["predicted"]) == (12, 11)
    (bad,) = table(tmp_path / "out" / "rejected.csv")
    assert (bad["clip"], bad["modality"]) == ("alpha_0_0", "audio")
    assert bad["cause"]
    assert "alpha_0_0" not in {row["clip"] for row in table(tmp_path / "out" / "predict.csv")}
    assert predict(run, *words, "--max-bad", 1)[0] == 0
    shutil.copy(media / "audio" / "alpha_0_0.wav", root / "audio")
    assert predict(run, *words)[0] == 0
    assert not (tmp_path / "out" / "rejected.csv").exists()


def test_what_does_not_fit_is_one_clear_error(run, media, tmp_path):
    columns = {**FILES, "label_name": "label_name"}
    root = rewrite(media, tmp_path / "a", columns, lambda row: row | {"label_name": "juggle"})
    code, found = predict(run, "--data-root", root)
    assert code == 1
    assert "line 2: the model knows class0, class1, and no class that is named here" in found["error"]
    root = rewrite(media, tmp_path / "b", {"video": "video", "audio": "audio"})
    code, found = predict(run, "--data-root", root)
    assert code == 1
    assert "there is no column for modality 'pose'" in found["error"]
    code, found = predict(run, "--data-root", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in found["error"]
    code, found = predict(run, "--data-root", root, "--ood", root)
    assert code == 2
    assert "one model alone" in found["error"]


def test_another_trunk_is_refused_and_the_same_elsewhere_taken(run, media, tmp_path):
    root = rewrite(media, tmp_path / "fresh", FILES)
    words = ["--data-root", root, "--output", tmp_path / "out", "--weights-dir"]
    shutil.copytree(run.parent / "weights", tmp_path / "moved")
    assert predict(run, *words, tmp_path / "moved")[0] == 0
    state = torch.load(tmp_path / "moved" / "trunk.pt")
    torch.save({name: values + 0.01 for name, values in state.items()}, tmp_path / "moved" / "trunk.pt")
    code, found = predict(run, *words, tmp_path / "moved")
    assert code == 1
    assert "SHA-256" in found["error"]


def test_a_copied_run_evaluates_to_the_same_bytes(run, tmp_path):
    shutil.copytree(run, tmp_path / "elsewhere")
    for name in ("results.json", "evaluation/predictions-target.csv", "plots/confusion-target.png"):
        (tmp_path / "elsewhere" / name).unlink()
    evaluate(tmp_path / "elsewhere")
    for name in ("results.json", "evaluation/predictions-target.csv", "plots/confusion-target.png"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (run / name).read_bytes()
    # One checkpoint alone says the same of itself.
    shutil.copy(run / "checkpoints" / "best.pt", tmp_path / "alone.pt")
    words = ["evaluate", "--checkpoint", str(tmp_path / "alone.pt"), "--analyses", "trust", "--json"]
    done = CliRunner().invoke(app, [*words, "--set", "evaluation.report=false"])
    whole = json.loads((run / "results.json").read_text())
    assert json.loads(done.stdout)["models"]["alone"] == whole["models"]["best"]


def listing(root: Path, text: str, classes=("cut", "pour")):
    root.mkdir(exist_ok=True)
    (root / "manifest.csv").write_text(text)
    modalities = {"audio": default_modality("audio")}
    return read_new(DatasetSettings(root=root), modalities, label_names=classes)


def test_tables_with_gaps(tmp_path):
    found = listing(tmp_path, "audio,label\na/x.wav,1\na/y.wav,\na/z.wav,0\n")
    assert [(c.id, c.label, c.label_name) for c in found.clips] == [
        ("x", 1, "pour"),
        ("y", UNKNOWN, ""),
        ("z", 0, "cut"),
    ]
    assert {(c.domain, c.split) for c in found.clips} == {("new", "test")}
    # One clip of a class that the model does not know costs nothing but its own part in the accuracy.
    found = listing(tmp_path, "audio,label_name\na/x.wav,pour\na/y.wav,juggle\n")
    assert [clip.label for clip in found.clips] == [1, UNKNOWN]
    assert "juggle (1)" in found.warnings[0]
    # Names that are not distinct cannot be ids.
    found = listing(tmp_path, "audio\na/x.wav\nb/x.wav\n")
    assert [c.id for c in found.clips] == ["line-2", "line-3"]
    with pytest.raises(ManifestError, match=r"line 3: 3 cells where the header has 2(.|\n)*line 4: audio: no file"):
        listing(tmp_path, "audio,label\nx.wav,0\ny.wav,1,0\n,1\n")
    with pytest.raises(ManifestError, match="line 2: label '2' is none of the model's 2 classes"):
        listing(tmp_path, "audio,label\nx.wav,2\n")
    with pytest.raises(ManifestError, match="empty"):
        listing(tmp_path, "")


def test_root_and_manifest(tmp_path):
    (tmp_path / "t.csv").write_text("audio\n")
    assert given(tmp_path / "t.csv", None) == (tmp_path, Path("t.csv"))
    assert given(None, tmp_path) == (tmp_path, Path("manifest.csv"))
    assert given(Path("t.csv"), tmp_path) == (tmp_path, Path("t.csv"))
    assert given(tmp_path / "t.csv", tmp_path / "elsewhere")[1] == (tmp_path / "t.csv").resolve()
    with pytest.raises(ManifestError, match="--data-root"):
        given(None, None)
