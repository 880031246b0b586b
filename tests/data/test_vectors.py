"""Generated datasets of vectors: as telling as set, the same on every call, and never written over something else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mbcd_cli.data.readers import demo, digits, generated, read_dataset, synthetic
from mbcd_cli.errors import ManifestError
from mbcd_cli.resolved import resolve
from mbcd_cli.settings import DatasetSettings


def nearest_mean(values, labels, train, test):
    """Accuracy of the nearest class mean of the training clips."""
    means = np.stack([values[train & (labels == c)].mean(axis=0) for c in np.unique(labels)])
    found = np.argmin(((values[test][:, None] - means) ** 2).sum(axis=2), axis=1)
    return (found == labels[test]).mean()


def test_informativeness_orders_the_modalities():
    data = synthetic.synthetic_vectors((4.0, 2.0, 1.0, 0.0), domain_shift=0.0)
    train = data.splits == 0
    accuracy = [nearest_mean(v, data.labels, train, ~train) for v in data.values.values()]
    assert accuracy[0] > 0.9
    assert accuracy == sorted(accuracy, reverse=True)
    assert abs(accuracy[3] - 1 / synthetic.CLASSES) < 0.06, "a modality of no informativeness is chance"


def test_domain_shift_hurts_outside_the_sources_only():
    data = synthetic.synthetic_vectors((3.0,), domain_shift=3.0)
    source = data.domains < 2
    train = source & (data.splits == 0)
    inside = nearest_mean(data.values["m1"], data.labels, train, source & (data.splits == 1))
    outside = nearest_mean(data.values["m1"], data.labels, train, ~source)
    assert inside - outside > 0.1


def test_further_modalities_change_none_of_the_first():
    four, six = (synthetic.synthetic_vectors(a, domain_shift=1.0) for a in ((4, 2, 1, 0.5), (4, 2, 1, 0.5, 0.5, 0.5)))
    for name in ("m1", "m2", "m3", "m4"):
        np.testing.assert_array_equal(four.values[name], six.values[name])
    np.testing.assert_array_equal(four.labels, six.labels)


def test_digits_groups_are_parts_of_the_real_images():
    images = load_digits().images / 16
    found = digits.features(images[:5])
    whole = np.block([[found["northwest"][0].reshape(4, 4), found["northeast"][0].reshape(4, 4)],
                      [found["southwest"][0].reshape(4, 4), found["southeast"][0].reshape(4, 4)]])  # fmt: skip
    np.testing.assert_array_equal(whole, images[0])
    np.testing.assert_allclose(found["profile"][3], [*images[3].mean(axis=0), *images[3].mean(axis=1)])
    np.testing.assert_allclose(found["spectrum"][2, 0], images[2].sum() / 8)
    data = digits.digit_vectors()
    assert len(data.labels) == 1797
    assert [int((data.domains == d).sum()) for d in range(3)] == [599, 599, 599]
    assert {name: v.shape[1] for name, v in data.values.items()} == {
        **dict.fromkeys(digits.MODALITIES[:5], 16),
        "spectrum": 15,
    }


@pytest.mark.parametrize("presets", [("synthetic-4",), ("synthetic-6",), ("digits-4", "digits-6")], ids=" ".join)
def test_presets_read_what_they_generate(presets, tmp_path):
    made = set()
    for preset in presets:  # of one generated dataset
        settings = resolve(preset=preset, flags={"dataset.root": tmp_path / "media"})
        listing = read_dataset(settings.dataset, settings.modalities)
        assert tuple(listing.modalities) == settings.model.modalities
        assert len(listing.modalities) == int(preset[-1])
        assert listing.domains == settings.dataset.domains
        assert len(listing.label_names) == settings.dataset.classes
        made.add((tmp_path / "media" / "manifest.csv").stat().st_mtime_ns)
        assert len(read_dataset(settings.dataset, settings.modalities).clips) == len(listing.clips)
        for domain in listing.domains:
            for split in ("train", "test"):
                labels = {c.label for c in listing.clips if (c.domain, c.split) == (domain, split)}
                assert labels == set(range(settings.dataset.classes))
        made.add((tmp_path / "media" / "manifest.csv").stat().st_mtime_ns)
    assert len(made) == 1, "generated once"


def test_another_dataset_in_the_folder_is_never_overwritten(tmp_path):
    root = tmp_path / "media"
    reader = synthetic.SyntheticSettings(name="synthetic", informativeness=(2.0, 1.0))
    settings = DatasetSettings(reader=reader, root=root)
    read_dataset(settings, {})
    reader = reader.model_copy(update={"informativeness": (2.0, 1.5)})
    with pytest.raises(ManifestError, match="another generated dataset"):
        read_dataset(settings.model_copy(update={"reader": reader}), {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ManifestError, match="something else"):
        read_dataset(settings.model_copy(update={"root": tmp_path / "mine"}), {})
    with pytest.raises(ManifestError, match="no m9"):
        read_dataset(settings, {"m9": resolve(preset="synthetic-4").modalities["m1"]})


def test_a_generated_dataset_has_its_name_once_every_file_is_on_the_disk(tmp_path, monkeypatch):
    root, synced, bad = tmp_path / "media", [], []

    def fsync(handle):
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        synced.append(name)  # several threads do
        assert not root.exists() or name == tmp_path.name
        if name in bad:
            raise OSError(errno.EIO, "Input/output error")

    def fill(folder):
        for number in range(20):
            (folder / f"{number}.npy").write_bytes(b"x")

    monkeypatch.setattr(os, "fsync", fsync)
    bad.append("7.npy")
    with pytest.raises(ManifestError, match="Input/output error"):
        generated.generate(root, {"of": 1}, fill)
    assert not list(tmp_path.iterdir())
    bad.clear()
    synced.clear()
    generated.generate(root, {"of": 1}, fill)
    assert {path.name for path in root.iterdir()} <= set(synced)
    assert generated.marker_of(root) == {"of": 1}


def test_the_demos_shortcut_is_a_setting(tmp_path, monkeypatch):
    real = demo.generate_demo
    monkeypatch.setattr(
        demo, "generate_demo", lambda root, **k: real(root, clips_per_class_train=1, clips_per_class_test=1, **k)
    )
    settings = DatasetSettings(reader=demo.DemoSettings(shortcut=0.25), root=tmp_path / "d")
    demo.read(settings, {})
    assert '"shortcut": 0.25' in (tmp_path / "d" / "generated.json").read_text()
    demo.read(settings, {})
    demo.read(settings.model_copy(update={"reader": demo.DemoSettings()}), {})
    with pytest.raises(ManifestError, match=r"shortcut 0\.25, not 0\.5"):
        demo.read(settings.model_copy(update={"reader": demo.DemoSettings(shortcut=0.5)}), {})


@pytest.mark.parametrize(("reader", "wrong", "near"), [(digits, "northwst", "northwest"), (synthetic, "m11", "m1")])
def test_a_modality_that_is_not_there_names_the_nearest(tmp_path, reader, wrong, near):
    settings = resolve(sets=(f"dataset.reader.name={reader.__name__.split('.')[-1]}", f"modalities.{wrong}.kind=array"))
    with pytest.raises(ManifestError, match=rf"and no {wrong}\.\nDid you mean {near}\?"):
        reader.read(settings.dataset, settings.modalities)
