"""The demo dataset: same bytes every time, nothing but content tells the label, looks mislead across domains."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import multiprocessing
import os
import signal
from dataclasses import astuple
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
import soundfile
from sklearn.linear_model import LogisticRegression

from mbcd_cli.data.readers import demo, demo_content
from mbcd_cli.errors import ManifestError
from mbcd_cli.settings import DatasetSettings

SMALL = {"seed": 3, "clips_per_class_train": 1, "clips_per_class_test": 1}


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decode(path: Path) -> np.ndarray:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (got := capture.read())[0]:
        frames.append(got[1])
    capture.release()
    return np.stack(frames)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "media"
    demo.generate_demo(root, workers=1, **SMALL)
    return root


def test_same_bytes_for_any_number_of_workers(made, tmp_path):
    demo.generate_demo(tmp_path / "again", workers=2, **SMALL)
    assert digests(tmp_path / "again") == digests(made)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_another_seed_gives_other_clips(made, tmp_path):
    demo.generate_demo(tmp_path / "other", workers=1, **{**SMALL, "seed": 4})
    assert not set(digests(made)) & set(digests(tmp_path / "other")) - {"manifest.csv", "generated.json"}


def test_manifest_and_media(made):
    table = rows(made)
    assert len(table) == 3 * 8 * 2
    assert {row["domain"] for row in table} == set(demo.DOMAINS)
    for row in table:
        assert demo.VERBS[int(row["label"])] == row["label_name"]
    for row in table[:6]:
        for name in (row["video"], row["flow"], row["flow"].replace("_x", "_y")):
            assert decode(made / name).shape == (16, 64, 64, 3)
        sound, rate = soundfile.read(made / row["audio"])
        assert (rate, sound.shape) == (8000, (8000,))
        assert 0.02 < np.abs(sound).max() < 1
        assert sound.std() > 0.005


def test_size_length_and_name_do_not_tell_the_label(made):
    for pattern in ("*/*[0-9a-f].mp4", "*/*_flow_x.mp4", "*/*_flow_y.mp4", "*/*.wav"):
        sizes = {p.stat().st_size for p in made.glob(pattern) if ("flow" in p.name) == ("flow" in pattern)}
        assert len(sizes) == 1, pattern
    for row in rows(made):
        assert row["label_name"] not in row["video"] + row["audio"] + row["flow"]
        assert len(row["id"]) == 12
        int(row["id"], 16)


@pytest.mark.parametrize("by", ["row", "id"])
def test_order_does_not_tell_the_label(by):
    plans = demo._plans(demo.Parameters())
    if by == "id":
        plans = sorted(plans, key=lambda plan: plan.id)
    labels = np.array([plan.label for plan in plans])
    assert len({plan.id for plan in plans}) == len(plans) == 720
    # Neighbours share the label by chance (1/8), and no stretch is richer in one label than chance makes it.
    assert abs(np.mean(labels[1:] == labels[:-1]) - 1 / 8) < 0.05
    assert abs(np.corrcoef(np.arange(len(labels)), labels)[0, 1]) < 0.12


def test_habits_differ_between_domains():
    looks: dict[tuple[str, int], set] = {}
    for plan in demo._plans(demo.Parameters(shortcut=1.0)):
        looks.setdefault((plan.domain, plan.label), set()).add(plan.look)
    assert all(len(found) == 1 for found in looks.values())
    for label in range(8):
        three = [next(iter(looks[domain, label])) for domain in demo.DOMAINS]
        for part in zip(*map(astuple, three), strict=True):
            assert len(set(part)) == 3
    for domain in demo.DOMAINS:
        assert len({next(iter(looks[domain, label])).colour for label in range(8)}) == 8


def test_without_shortcut_looks_are_independent_of_the_label():
    plans = demo._plans(demo.Parameters(shortcut=0.0, clips_per_class_train=200))
    table = np.zeros((8, 8))
    for plan in plans:
        table[plan.label, plan.look.colour] += 1
    assert np.abs(table / table.sum(1, keepdims=True) - 1 / 8).max() < 0.06


def test_looks_work_at_home_and_mislead_abroad():
    """A linear classifier on colours of the middle frame: far above chance in domain, no better than chance outside."""
    plans = demo._plans(demo.Parameters(clips_per_class_train=12, clips_per_class_test=4))
    features, labels, domains, train = [], [], [], []
    for plan in plans:
        rng = np.random.default_rng([0, 1, plan.number])
        frame = demo_content.render(demo.VERBS[plan.label], plan.domain, plan.look, rng)[8]
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).reshape(-1, 3)
        vivid = hsv[hsv[:, 1] > 110]
        features.append(np.histogram(vivid[:, 0], bins=18, range=(0, 180))[0] / 500)
        labels.append(plan.label)
        domains.append(plan.domain)
        train.append(plan.split == "train")
    x, y, d, t = np.array(features), np.array(labels), np.array(domains), np.array(train)
    home, abroad = [], []
    for domain in demo.DOMAINS:
        model = LogisticRegression(C=10, max_iter=2000).fit(x[(d == domain) & t], y[(d == domain) & t])
        home.append(model.score(x[(d == domain) & ~t], y[(d == domain) & ~t]))
        abroad.append(model.score(x[d != domain], y[d != domain]))
    assert np.mean(home) > 0.5
    assert np.mean(abroad) < 0.25


@pytest.mark.parametrize(("verb", "sign"), [("take", -1), ("put", 1)])
def test_flow_points_where_the_object_goes(made, verb, sign):
    for row in rows(made):
        if row["label_name"] == verb:
            flow = decode(made / row["flow"].replace("_x", "_y"))[..., 0].astype(float) - 128
            strongest = flow.reshape(-1)[np.argsort(np.abs(flow), axis=None)[-1000:]]
            assert np.sign(strongest.mean()) == sign


def test_still_frames_have_no_flow():
    frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert np.all(demo_content.optical_flow(np.stack([frame] * 3)) == 128)


def _generate(root: Path) -> None:
    demo.generate_demo(root, workers=1, **SMALL)


def test_killed_generation_begins_again(made, tmp_path):
    root = tmp_path / "media"
    process = multiprocessing.get_context("spawn").Process(target=_generate, args=(root,))
    process.start()
    helpers.until(lambda: len(list(tmp_path.rglob("*.wav"))) >= 5)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not root.exists()
    assert list(tmp_path.rglob("*.wav"))
    _generate(root)
    assert digests(root) == digests(made)
    assert [p.name for p in tmp_path.iterdir()] == ["media"]


def test_what_is_in_the_way_is_kept(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ManifestError, match="holds"):
        demo.generate_demo(tmp_path / "mine", workers=1, **SMALL)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    before = digests(made)
    with pytest.raises(ManifestError, match="holds"):
        demo.generate_demo(made, workers=1, **{**SMALL, "seed": 5})
    demo.generate_demo(made, workers=1, **SMALL)
    assert digests(made) == before


def test_wrong_parameters(tmp_path):
    for wrong in ({"shortcut": 1.5}, {"clips_per_class_train": 0}):
        with pytest.raises(ValueError):
            demo.generate_demo(tmp_path / "x", workers=1, **{**SMALL, **wrong})


def test_read_generates_once_and_lists_every_clip(tmp_path, monkeypatch):
    calls = []

    def small(root, *, workers):
        calls.append(root)
        generate(root, workers=1)

    generate = functools.partial(demo.generate_demo, **SMALL)
    monkeypatch.setattr(demo, "generate_demo", small)
    settings = DatasetSettings(reader=demo.DemoSettings(), name="demo", root=tmp_path / "media")
    listing = demo.read(settings, {})
    again = demo.read(settings, {})
    assert len(calls) == 1
    assert [clip.id for clip in listing.clips] == [clip.id for clip in again.clips]
    assert len(listing.clips) == 48
    assert listing.label_names == demo.VERBS
    assert set(listing.modalities) == {"video", "audio", "flow"}
    clip = listing.clips[0]
    assert clip.media["flow"].path_v.name == f"{clip.id}_flow_y.mp4"
    assert json.loads((tmp_path / "media" / "generated.json").read_text())["version"] == demo.VERSION
