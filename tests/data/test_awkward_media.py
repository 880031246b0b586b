"""Awkward files through the whole of `prepare`: used, mended with a note, or rejected with cause and remedy."""

from __future__ import annotations

from pathlib import Path

import helpers
import numpy as np
import pytest
import test_epic_kitchens as epic
import test_hac as hac

from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve

SMALL = [*helpers.SMALL, "modalities.flow.frames=4", "modalities.flow.short_side=24", "modalities.flow.crop=20"]


def prepared(reader: str, root: Path, cache: Path, *sets: str):
    settings = resolve(
        sets=[*SMALL, "modalities.flow.width=2", "dataset.name=awkward", *sets],
        flags={"dataset.reader": reader, "dataset.root": root, "cache.dir": cache},
    )
    result = prepare(settings)
    rejected = {(r.clip, r.modality): r for r in result.rejected}
    assert all(r.cause and r.remedy and r.file for r in rejected.values())
    return result, rejected, settings


def test_truncated_jpg_and_missing_flow_direction(tmp_path):
    root = epic.frame_folders(tmp_path / "EPIC")
    epic.write_tables(root / "splits")
    jpg = root / "rgb/train/D1/P08_01/frame_0000000003.jpg"
    jpg.write_bytes(jpg.read_bytes()[:-40])
    gone = root / "flow/train/D2/P01_01/v"
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
    sets = ("modalities.video.frames=12", "dataset.max_bad=99")
    result, rejected, _ = prepared("epic-kitchens", root, tmp_path / "nearest", *sets)
    notes = {one.clip: one.note for one in result.modalities["video"].mended}
    assert any("frame_0000000003.jpg is damaged or cut short" in note for note in notes.values())
    assert {key[0].rpartition("-")[0] for key in rejected} == {"P01_01"}
    assert {key[1] for key in rejected} == {"flow"}
    _, rejected, _ = prepared("epic-kitchens", root, tmp_path / "reject", *sets, "dataset.missing_frames=reject")
    assert ("P08_01-101", "video") in rejected


def test_missing_flow_direction_of_files(tmp_path):
    root = hac.write_media(tmp_path / "HAC")
    hac.write_splits(root / "HAC_Splits")
    (root / "animal/flow/animal_1_flow_y.mp4").unlink()
    result, rejected, _ = prepared("hac", root, tmp_path / "cache", "modalities.video.frames=4")
    assert set(rejected) == {("animal-test-animal_1", "flow")}
    assert result.exit_code == 3


def test_containers_turned_uneven_and_short_videos(tmp_path):
    frames = helpers.numbered_frames(16)
    plain = helpers.write_video(tmp_path / "plain.mp4", frames)
    helpers.rotate_mp4(plain, tmp_path / "phone.mp4", 90)
    helpers.retime_mp4(plain, tmp_path / "uneven.mp4", [1] * 8 + [3] * 8)
    helpers.write_video(tmp_path / "three.mp4", frames[:3])
    helpers.write_video(tmp_path / "one.mp4", frames[:1])
    for suffix in ("mkv", "mov"):
        helpers.write_video(tmp_path / f"box.{suffix}", frames)
    files = ["plain.mp4", "phone.mp4", "uneven.mp4", "three.mp4", "one.mp4", "box.mkv", "box.mov"]
    rows = [
        {"id": file, "domain": "ab"[i % 2], "split": "test", "label": 0, "video": file} for i, file in enumerate(files)
    ]
    rows += [{"id": d, "domain": d, "split": "train", "label": 0, "video": "plain.mp4"} for d in "ab"]
    helpers.write_manifest(tmp_path / "manifest.csv", rows)
    _, rejected, settings = prepared("manifest", tmp_path, tmp_path / "cache", "model.modalities=video")
    assert set(rejected) == {("one.mp4", "video")}
    assert "1 frame" in rejected["one.mp4", "video"].cause
    dataset = open_dataset(settings, name="awkward", modalities=["video"])
    clips = dataset.select(domains=["a", "b"], splits=["test"])
    (batch,) = dataset.batches(clips, batch_size=16, training=False)
    shown = {
        dataset.clips.ids[int(clip)]: [
            round(float(frame.float().mean(0)[-8:, 2:10].mean()) / 10) for frame in view.permute(1, 0, 2, 3)
        ]
        for clip, view in zip(batch.clips, batch.inputs["video"][0], strict=True)
    }
    # Four frames from the middles of four equal parts of the clip; of three frames one is shown twice.
    assert shown.pop("three.mp4") == [0, 1, 1, 2]
    assert shown.pop("phone.mp4")[1:] == pytest.approx([6, 10, 14], abs=1)
    assert shown == {key: [2, 6, 10, 14] for key in ("plain.mp4", "uneven.mp4", "box.mkv", "box.mov")}


def test_sound_shorter_than_its_time_stamps(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("short", "far"):
        helpers.write_wav(tmp_path / f"{name}.wav", rng.uniform(-0.5, 0.5, 8000))
    rows = [
        {"id": "short", "domain": "a", "split": "test", "label": 0, "audio": "short.wav", "start": 0.5, "stop": 3.0},
        {"id": "far", "domain": "b", "split": "test", "label": 0, "audio": "far.wav", "start": 2.0, "stop": 3.0},
    ]
    helpers.write_wav(tmp_path / "whole.wav", rng.uniform(-0.5, 0.5, 8000))
    whole = {"split": "train", "label": 0, "audio": "whole.wav", "start": 0.0, "stop": 1.0}
    rows += [{"id": d, "domain": d, **whole} for d in "ab"]
    helpers.write_manifest(tmp_path / "manifest.csv", rows)
    result, rejected, _ = prepared("manifest", tmp_path, tmp_path / "one", "model.modalities=audio")
    assert set(rejected) == {("far", "audio")}
    ((mended),) = result.modalities["audio"].mended
    assert mended.clip == "short"
    assert "2.00 of 2.50 s" in mended.note
    strict = prepared("manifest", tmp_path, tmp_path / "two", "model.modalities=audio", "dataset.missing_frames=reject")
    assert set(strict[1]) == {("far", "audio"), ("short", "audio")}
