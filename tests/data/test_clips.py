"""Clips as columns: each comes back as it was, and none is an object until it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import write_array, write_manifest

from mbcd_cli.data.cache import fingerprint, recipe_of
from mbcd_cli.data.clips import AT_ONCE, Clips, MediaColumn, Texts
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.modalities import KINDS
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.records import Clip, Media
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve

MEDIA = [
    Media(Path("/data/a.mp4")),
    Media(Path("u/a.mp4"), Path("v/a.mp4"), start=0.25, stop=1 / 3),
    Media(Path("a.npy"), start=7, stop=8, unit="row"),
    Media(Path("/data/frames"), start=0, stop=12, unit="frame", computed=1, rate=29.97),
    Media(Path("/data/caf\udce9.wav"), clock=Path("/data/v/ü.mp4"), frames=5),
    Media(Path("/")),
    Media(Path()),
]


def clip_of(number: int, folder: Path = Path("/data/features")) -> Clip:
    media = {"x": Media(folder / f"{number}.npy")}
    label = number % 4
    return Clip(f"c{number}", "ab"[number % 2], ("train", "test")[number % 3 == 0], label, f"class{label}", media)


def clips_of(count: int, folder: Path = Path("/data/features")) -> list[Clip]:
    return [clip_of(number, folder) for number in range(count)]


def test_media_come_back_as_they_were():
    column = MediaColumn(MEDIA)
    assert list(column) == MEDIA
    assert column[-2] == MEDIA[-2]
    assert column[1:3] == MEDIA[1:3]
    assert [type(one.start) for one in column] == [type(one.start) for one in MEDIA]


def test_clips_come_back_as_they_were():
    clips = clips_of(9)
    clips[4].media["y"] = MEDIA[1]  # a modality that begins in the middle
    columns = Clips(clips)
    assert list(columns) == clips
    assert columns[-1] == clips[-1]
    assert columns[:2] == clips[:2]
    assert list(columns.media_of("x")) == [clip.media["x"] for clip in clips]
    assert list(columns.media_of("y")) == [MEDIA[1]]
    assert columns.domain_names == ("a", "b")
    assert columns.labels.tolist() == [clip.label for clip in clips]
    assert len(Clips()) == 0
    with pytest.raises(IndexError):
        columns[9]


def test_a_listing_takes_any_sequence_of_clips():
    clips = clips_of(3)
    assert list(Listing("x", clips, ("a", "b"), ("0",), {}).clips) == clips


def test_texts():
    texts = Texts(["", "a", "ü", "\udce9"])
    assert list(texts) == ["", "a", "ü", "\udce9"]
    assert (texts[-1], texts[1:3], len(texts)) == ("\udce9", ["a", "ü"], 4)
    with pytest.raises(IndexError):
        texts[4]


def test_digests_are_those_of_one_json_text(tmp_path):
    """Written out: what is streamed in chunks is SHA-256 of the JSON of everything, every file looked at once."""
    clips = clips_of(AT_ONCE + 5, tmp_path)
    for clip in clips[::100]:
        write_array(clip.media["x"].path, [1.0, 2.0])
    listed = [[c.id, c.domain, c.split, c.label, c.label_name] for c in clips]
    listing = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    assert Clips(clips).digest == listing
    rows = []
    for clip in clips:
        path = clip.media["x"].path
        size = path.stat().st_size if path.exists() else -1
        rows.append([[os.path.relpath(path, tmp_path.parent)], [size], [None, None, "s", 0, None, None]])
    whole = json.dumps([{"a": 1}, listing, rows]).encode()
    seen: list[int] = []
    found = fingerprint({"a": 1}, Clips(clips), name="x", root=tmp_path.parent, seen=seen.append)
    assert found == hashlib.sha256(whole).hexdigest()[:12]
    assert seen == [AT_ONCE, 5]


@pytest.mark.parametrize(
    ("version", "kinds"),
    [
        ("cv2.__version__", {"video", "flow"}),
        ("soundfile.__libsndfile_version__", {"audio"}),
        ("mbcd_cli.data.media.timeline.DECODER", {"video", "flow", "audio"}),
    ],
)
def test_a_cache_is_stale_where_what_decodes_its_files_is_another(tmp_path, monkeypatch, version, kinds):
    def fingerprints() -> dict[str, str]:
        recipes = {
            kind: recipe_of(resolve(), kind, modality(), weights_sha256=None) for kind, modality in KINDS.items()
        }
        return {kind: fingerprint(recipe, clips, name="x", root=tmp_path) for kind, recipe in recipes.items()}

    clips = Clips(clips_of(1, tmp_path))
    before = fingerprints()
    monkeypatch.setattr(version, "0.1")
    assert {kind for kind, now in fingerprints().items() if now != before[kind]} == kinds


def test_a_packed_array_is_looked_at_once(tmp_path, monkeypatch):
    path = write_array(tmp_path / "x.npy", [[0.0]] * 3)
    clips = Clips(
        Clip(f"c{i}", "a", "train", 0, "0", {"x": Media(path, start=i, stop=i + 1, unit="row")})
        for i in range(2 * AT_ONCE)
    )
    looked: list[Path] = []
    monkeypatch.setattr("mbcd_cli.data.cache.holding", lambda one: looked.append(one) or 1)
    fingerprint({}, clips, name="x", root=tmp_path)
    assert looked == [path]


def test_a_clip_takes_few_bytes():
    path = Path("/data/x.npy")  # of a path of its own, Python keeps the name
    rows = (Media(path, start=number, stop=number + 1, unit="row") for number in range(20_000))
    first = clip_of(0)
    tracemalloc.start()
    columns = Clips(replace(first, id=f"c{row.start}", media={"x": row}) for row in rows)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(columns) < 100, "as objects they take 900"


def test_ids_are_read_when_one_is_named(tmp_path):
    write_array(tmp_path / "d/x.npy", [[float(i)] for i in range(8)])
    rows = [
        {"id": f"c{i}", "domain": "ab"[i % 2], "split": ("train", "test")[i // 6], "label": 0, "x": f"x.npy#{i}"}
        for i in range(8)
    ]
    write_manifest(tmp_path / "d/manifest.csv", rows)
    flags = {"dataset.root": tmp_path / "d", "cache.dir": tmp_path / "cache", "cache.workers": 0}
    settings = resolve(flags=flags)
    prepare(settings)
    dataset = open_dataset(settings, name="d")
    assert isinstance(dataset.modalities["x"], ArrayModality)
    clips = dataset.select(domains=["a"], splits=["train"])
    next(iter(dataset.batches(clips, batch_size=2, training=True)))
    assert "ids" not in vars(dataset.clips)
    assert list(dataset.clips.ids) == [f"c{i}" for i in range(8)]
