from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score

from mbcd_cli.errors import FileError
from mbcd_cli.evaluation.analyses.embedding import embeddings, spread, tsne
from mbcd_cli.evaluation.report.export import hardest_rows, prediction_rows, vote_rows, write_hdf5
from mbcd_cli.files import write_rows
from mbcd_cli.model import build_model
from mbcd_cli.scoring.predictions import Predictions, predict


@pytest.fixture
def model(settings, dataset):
    torch.manual_seed(1)
    return build_model(dataset.modalities, settings=settings.model, classes=dataset.classes).eval()


def names(dataset):
    return {"ids": dataset.clips.ids, "label_names": dataset.label_names, "domain_names": dataset.domains}


def test_votes_hold_class_and_probability_of_every_head(model, dataset):
    clips = dataset.select(domains=("street",))
    predictions = predict(model, dataset.batches(clips, batch_size=4, training=False), device="cpu")
    labels = predictions.labels.clone()
    labels[0] = -1
    predictions = replace(predictions, labels=labels)
    rows = vote_rows(predictions, ids=dataset.clips.ids, label_names=dataset.label_names)
    votes = ["video_class", "video_probability", "audio_class", "audio_probability"]
    assert list(rows[0]) == ["clip", "class", "probability", *votes, "label", "label_probability"]
    with torch.no_grad():
        fused, unimodal = model({n: (v[clips],) for n, v in dataset.arrays.items()})
    for n, row in enumerate(rows):
        p = fused[n].softmax(0)
        assert row["clip"] == dataset.clips.ids[clips[n]]
        assert row["class"] == dataset.label_names[int(p.argmax())]
        assert row["probability"] == pytest.approx(float(p.max()), abs=2e-6)
        assert row["audio_class"] == dataset.label_names[int(unimodal["audio"][n].argmax())]
        assert row["label"] == (dataset.label_names[labels[n]] if n else "")
    unknown = replace(predictions, labels=torch.full_like(labels, -1))
    assert "label" not in vote_rows(unknown, ids=dataset.clips.ids, label_names=dataset.label_names)[0]


def test_labelled_rows_and_the_hardest(model, dataset):
    clips = dataset.select(domains=("street",))
    predictions = predict(model, dataset.batches(clips, batch_size=4, training=False), device="cpu")
    rows = list(prediction_rows(predictions, **names(dataset)))
    p = predictions.fused.double().softmax(1)[torch.arange(len(clips)), predictions.labels]
    assert [row["label_probability"] for row in rows] == pytest.approx(p.tolist(), abs=1e-6)
    worst = hardest_rows(rows, 3)
    assert [row["id"] for row in worst] == [dataset.clips.ids[clips[i]] for i in p.argsort()[:3]]
    assert len(hardest_rows(rows, 10_000)) == len(rows)


def test_a_clip_without_prediction_is_blank(dataset):
    bad = torch.tensor([[float("nan"), 0, 0, 0]])
    one = torch.zeros(1, dtype=torch.int64)
    rows = list(prediction_rows(Predictions(one, one, one, bad, {}), **names(dataset)))
    assert (rows[0]["predicted"], rows[0]["probability"]) == ("", 0.0)


def test_hdf5_round_trip(model, dataset, tmp_path):
    clips = dataset.select(domains=("tilted",))
    predictions = predict(model, dataset.batches(clips, batch_size=4, training=False), device="cpu", features=True)
    path = write_hdf5(predictions, tmp_path / "x.h5", **names(dataset))
    with h5py.File(path) as file:
        assert list(file["id"].asstr()) == [dataset.clips.ids[i] for i in clips]
        np.testing.assert_array_equal(file["label"], dataset.labels[clips])
        np.testing.assert_array_equal(file["logits/fused"], predictions.fused)
        np.testing.assert_array_equal(file["features/audio"], predictions.features["audio"])
        assert list(file["label_names"].asstr()) == list(dataset.label_names)


def test_a_failed_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def rows():
        yield {"a": 1}
        raise ValueError("cut off")

    with pytest.raises(ValueError, match="cut off"):
        write_rows(path, rows())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_rows(path, iter([{"a": 1, "b": 2}, {"a": 3, "b": 4}]))
    assert path.read_text() == "a,b\n1,2\n3,4\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        write_rows(tmp_path / "file" / "a.csv", [{"a": 1}])


def test_tsne_separates_what_is_separate_and_repeats():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    features = rng.normal(size=(90, 12)) + 8 * np.eye(3, 12)[labels]
    points = tsne(features, seed=1)
    assert points.shape == (90, 2)
    assert silhouette_score(points, labels) > 0.5
    np.testing.assert_array_equal(points, tsne(features, seed=1))


def test_maps_of_every_space_and_of_too_few_clips(model, dataset):
    def features(count):
        batches = dataset.batches(np.arange(count), batch_size=8, training=False)
        return predict(model, batches, device="cpu", features=True)

    assert {n: v.shape for n, v in embeddings(features(20)).items()} == dict.fromkeys(
        ("fused", "video", "audio"), (20, 2)
    )
    assert embeddings(features(5)) == {}
    # A collapsed encoder: scikit-learn would crash the process.
    for constant in (np.zeros((20, 8)), np.full((20, 8), 0.3, np.float32)):
        assert np.array_equal(tsne(constant), np.zeros((20, 2)))
    assert spread(np.arange(10), 20).tolist() == list(range(10))
    assert spread(np.arange(100), 3).tolist() in ([0, 49, 99], [0, 50, 99])
