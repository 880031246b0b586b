"""A download that is completed or mended, a cache of another kind, what was asked for and is not there."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import helpers
import numpy as np
import pytest
import test_check as checking
import test_epic_kitchens as epic
import test_hac as hac
from test_awkward_media import prepared

from mbcd_cli import console
from mbcd_cli.data import cache
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.readers import read_dataset
from mbcd_cli.data.readers.presence import check_media
from mbcd_cli.errors import CacheError, ManifestError
from mbcd_cli.preparation import prepare as preparing
from mbcd_cli.preparation.check import check

SETS = ("modalities.video.frames=12", "dataset.max_bad=99", "cache.shard_clips=2")
FRAME = "rgb/train/D1/P08_01/frame_0000000005.jpg"
CLIP = "P08_01-101"


@pytest.fixture
def kitchens(tmp_path) -> Path:
    root = epic.frame_folders(tmp_path / "EPIC")
    epic.write_tables(root / "splits")
    return root


def stored(result: dict, name: str = "video") -> dict[str, np.ndarray]:
    """Every row of a prepared modality."""
    rows = {}
    for path in sorted(Path(result.modalities[name].folder).glob("shard-*.h5")):
        with h5py.File(path) as file:
            for group in ("train", "test"):
                rows[f"{path.name}/{group}"] = file[f"{group}/part0"][()]
    return rows


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def lost(path: Path) -> None:
    path.unlink()


def spoilt(path: Path) -> None:
    # As long as it was, so that neither names nor sizes tell.
    data = bytearray(path.read_bytes())
    data[2:] = bytes(len(data) - 2)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [lost, spoilt])
@pytest.mark.parametrize("policy", ["nearest", "reject"])
def test_a_restored_frame_changes_what_is_cached(kitchens, tmp_path, damage, policy):
    sets = (*SETS, "model.modalities=video", f"dataset.missing_frames={policy}")
    whole, _, _ = prepared("epic-kitchens", kitchens, tmp_path / "whole", *sets)
    good = (kitchens / FRAME).read_bytes()
    damage(kitchens / FRAME)
    first, rejected, settings = prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    doubtful = {CLIP} if policy == "reject" else {one.clip for one in first.modalities["video"].mended}
    assert CLIP in doubtful
    assert (policy == "reject") == ((CLIP, "video") in rejected)
    assert not equal(stored(first), stored(whole))
    again, _, _ = prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    assert again.modalities["video"].shards_reused == 6  # nothing changed, nothing is done
    (kitchens / FRAME).write_bytes(good)
    assert check(settings).modalities["video"].shards_there < 6
    mended, rejected, _ = prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    assert rejected == {}
    assert mended.modalities["video"].mended == []
    assert equal(stored(mended), stored(whole))


@pytest.mark.parametrize("gone", ["rgb/train/D2/P01_01", "flow/train/D2/P01_01/v", "flow/test/D3/P22_02"])
def test_a_restored_folder_changes_what_is_cached(kitchens, tmp_path, gone):
    aside = tmp_path / "aside"
    (kitchens / gone).rename(aside)
    _, rejected, settings = prepared("epic-kitchens", kitchens, tmp_path / "cache", *SETS)
    assert {kind for _, kind in rejected} == {"video" if gone.startswith("rgb") else "flow"}
    assert check(settings).clips_to_be_rejected == 2
    aside.rename(kitchens / gone)
    _, rejected, settings = prepared("epic-kitchens", kitchens, tmp_path / "cache", *SETS)
    assert rejected == {}
    assert len(open_dataset(settings, name="awkward").rejected) == 0


def test_another_version_tries_again_what_was_not_whole(kitchens, tmp_path, monkeypatch):
    sets = (*SETS, "model.modalities=video", "dataset.missing_frames=reject")
    lost(kitchens / FRAME)
    prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    monkeypatch.setattr(cache, "__version__", "999")
    again, rejected, _ = prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    assert again.modalities["video"].shards_reused == 5
    assert (CLIP, "video") in rejected
    last, _, _ = prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    assert last.modalities["video"].shards_reused == 6


def test_what_no_camera_wrote_changes_nothing(kitchens, tmp_path):
    sets = (*SETS, "model.modalities=video")
    first, _, _ = prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    (kitchens / FRAME).with_name("Thumbs.db").write_bytes(b"x")
    (kitchens / FRAME).with_name("._frame_0000000005.jpg").write_bytes(b"x")
    again, _, _ = prepared("epic-kitchens", kitchens, tmp_path / "cache", *sets)
    assert again.modalities["video"].folder == first.modalities["video"].folder
    assert again.modalities["video"].shards_reused == 6


def test_frames_added_to_whole_folders_make_another_cache(tmp_path):
    root = tmp_path / "tiny"
    rows = []
    for n in range(4):
        helpers.write_frames(root / f"clips/{n}", helpers.numbered_frames(8))
        rows.append(
            {"id": n, "domain": "ab"[n // 2], "split": ("train", "test")[n % 2], "label": 0, "video": f"clips/{n}"}
        )
    helpers.write_manifest(root / "manifest.csv", rows)
    settings = checking.tree(root, tmp_path / "cache", "model.modalities=video")
    first = preparing.prepare(settings).modalities["video"]
    assert preparing.prepare(settings).modalities["video"].shards_reused == first.shards
    shutil.copy(root / "clips/0/frame_0000000001.jpg", root / "clips/0/frame_0000000009.jpg")
    second = preparing.prepare(settings).modalities["video"]
    assert second.fingerprint != first.fingerprint
    assert second.shards_reused == 0


def test_a_rejected_file_of_the_same_size_is_tried_again_when_it_changed(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    victim = root / "audio" / "alpha_0_0.wav"
    good = victim.read_bytes()
    victim.write_bytes(bytes(len(good)))
    settings = checking.tree(root, tmp_path / "cache", "dataset.max_bad=9")
    first = preparing.prepare(settings)
    assert [r.clip for r in first.rejected] == ["alpha_0_0"]
    victim.write_bytes(good)
    second = preparing.prepare(settings)
    assert second.rejected == []
    assert second.modalities["audio"].folder == first.modalities["audio"].folder
    assert second.modalities["audio"].shards_reused == second.modalities["audio"].shards - 1


# --- --check ---------------------------------------------------------------------------------------------------------


def test_check_and_prepare_agree_about_folders(kitchens, tmp_path):
    """An empty direction, two sequences, more than half missing: rejected, and `--check` says so beforehand."""
    for path in (kitchens / "flow/train/D1/P08_01/v").iterdir():
        path.unlink()
    for number in range(1, 25):
        shutil.copy(kitchens / FRAME, kitchens / f"rgb/test/D2/P01_02/depth_{number:04d}.jpg")
    for number in range(3, 22):
        (kitchens / f"rgb/train/D3/P22_01/frame_{number:010d}.jpg").unlink()
    result, rejected, settings = prepared("epic-kitchens", kitchens, tmp_path / "cache", *SETS)
    report = check(settings)
    assert report.clips_to_be_rejected == len({clip for clip, _ in rejected}) == 6
    assert {Path(r.file).name for r in result.rejected if r.modality == "flow"} == {"v"}
    gaps = {gap.clip: gap for gap in report.modalities["video"].gaps}
    assert "2 sequences of frames: depth_0001.jpg" in gaps["P01_02-107"].cause


def test_a_frame_0_of_another_spelling_shifts_nothing(kitchens):
    def spans() -> list[list[str]]:
        listing = read_dataset(epic.settings(kitchens), {"video": epic.VIDEO})
        assert all(not found.files_missing for found in check_media(listing).values())
        views = [
            epic.load_views(c, "video", epic.VIDEO, views=[-1], seed=0, dataset=epic.settings(kitchens))
            for c in listing.clips
        ]
        return [epic.levels(view[0][0]) for view in views]

    right = spans()
    names = ["frame_000000.jpg", "frame_0000000000.JPG", "frame_0000000000.png", "cover_0.jpg", "frame_0.jpg"]
    for name in names:
        made = [kitchens / "rgb" / split / domain / video / name for domain, split, video in epic.recordings()]
        for path in made:
            cv2.imwrite(str(path), np.zeros((48, 64, 3), np.uint8))
        assert spans() == right, name
        for path in made:
            path.unlink()


def test_the_first_decoding_is_not_timed(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "tiny")
    room, clock, calls = check.__globals__, [0.0], []
    real = room["decode"]

    def slow_at_first(index, *rest):
        clock[0] += 0.5 if calls else 2.0  # as long as imports take
        calls.append(index)
        return real(index, *rest)

    monkeypatch.setitem(room, "decode", slow_at_first)
    monkeypatch.setitem(room, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    report = check(checking.tree(root, tmp_path / "cache", "model.modalities=audio"))
    assert report.modalities["audio"].decode_timed_clips > 1
    assert report.modalities["audio"].decode_seconds_per_clip == 0.5
    assert calls[0] == calls[1]


# --- what is not there, or not to be read ----------------------------------------------------------------------------


def test_what_was_asked_for_by_name_must_be_there(kitchens, tmp_path):
    packed = []
    for domain, split, video in epic.recordings():
        folder = kitchens / "flow" / split / domain / video
        with tarfile.open(folder.with_suffix(".tar"), "w"):
            packed.append(folder.with_suffix(".tar"))
        shutil.rmtree(folder)
    listing = read_dataset(epic.settings(kitchens), {})
    assert f"unpack {packed[0]} and 5 more" in next(line for line in listing.warnings if line.startswith("flow:"))
    with pytest.raises(ManifestError, match="flow: asked for, and not in the dataset") as caught:
        prepared("epic-kitchens", kitchens, tmp_path / "cache", "model.modalities=video,audio,flow")
    assert str(packed[0]) in str(caught.value)
    assert not (tmp_path / "cache").exists()
    for domain, split, video in epic.recordings():
        shutil.rmtree(kitchens / "rgb" / split / domain / video)
        (kitchens / "rgb" / split / domain / f"{video}.wav").unlink()
        (kitchens / "rgb" / split / domain / f"{video}.tar").write_bytes(b"")
    with pytest.raises(ManifestError, match="no media of the clips") as caught:
        read_dataset(epic.settings(kitchens), {})
    assert "video; unpack" in str(caught.value)


def test_hac_flow_that_is_not_there(tmp_path):
    root = hac.write_media(tmp_path / "HAC", flow=False)
    hac.write_splits(root / "HAC_Splits")
    with pytest.raises(ManifestError, match="flow: asked for"):
        prepared("hac", root, tmp_path / "cache", "model.modalities=video,flow")


def denied(monkeypatch, folder: Path) -> None:
    """Nobody but root's tests may list or enter `folder`."""
    scandir, stat, access = os.scandir, os.stat, os.access

    def listing(path=".", *args):
        if folder in (Path(os.fspath(path)), *Path(os.fspath(path)).parents):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path, *args)

    def entering(path, *args, **kwargs):
        if not isinstance(path, int) and folder in Path(os.fspath(path)).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(os, "stat", entering)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))


def test_a_folder_without_permission_costs_its_clips(kitchens, tmp_path, monkeypatch):
    denied(monkeypatch, kitchens / "flow/train/D1/P08_01")
    _, rejected, settings = prepared("epic-kitchens", kitchens, tmp_path / "cache", *SETS)
    assert set(rejected) == {("P08_01-101", "flow"), ("P08_01-102", "flow")}
    assert {r.cause for r in rejected.values()} == {"Permission denied"}
    assert {r.remedy for r in rejected.values()} == {"Give yourself the right to read it."}
    assert check(settings).clips_to_be_rejected == 2
    monkeypatch.undo()
    _, rejected, _ = prepared("epic-kitchens", kitchens, tmp_path / "cache", *SETS)
    assert rejected == {}


def test_a_place_without_permission_is_named(kitchens, monkeypatch):
    denied(monkeypatch, kitchens / "rgb/train")
    listing = read_dataset(epic.settings(kitchens), {})
    (line,) = [line for line in listing.warnings if line.startswith("video: nothing is on disk for 6 of 12")]
    assert f"give yourself the right to read {kitchens / 'rgb/train'}" in line


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_a_clip_file_shorter_than_its_annotation_is_said(tmp_path):
    root = epic.clip_files(tmp_path / "EPIC")
    epic.write_tables(root / "splits")
    helpers.write_video(root / "video/train/D1/D1_P08_01_7_23_1.mp4", helpers.numbered_frames(9), fps=60)
    helpers.write_video(root / "video/train/D2/D2_P01_01_7_23_1.mp4", helpers.numbered_frames(14), fps=60)
    sets = ("model.modalities=video", "dataset.max_bad=9")
    result, rejected, _ = prepared("epic-kitchens", root, tmp_path / "cache", *sets)
    (note,) = result.modalities["video"].mended
    assert note.clip == "P08_01-102"
    assert "9 frames where the annotation gives 16" in note.note
    assert rejected == {}
    _, rejected, _ = prepared("epic-kitchens", root, tmp_path / "strict", *sets, "dataset.missing_frames=reject")
    assert set(rejected) == {("P08_01-102", "video")}


def test_flow_shorter_than_its_video_is_said(tmp_path):
    root = hac.write_media(tmp_path / "HAC")
    hac.write_splits(root / "HAC_Splits")
    for direction in "xy":
        helpers.write_video(root / f"animal/flow/test_2_flow_{direction}.mp4", helpers.numbered_frames(12))
        helpers.write_video(root / f"human/flow/test_2_flow_{direction}.mp4", helpers.numbered_frames(8))
    sets = ("modalities.video.frames=4", "modalities.video.interval=1", "dataset.max_bad=9")
    result, rejected, _ = prepared("hac", root, tmp_path / "cache", *sets)
    notes = result.modalities["flow"].mended
    assert {note.clip for note in notes} == {"animal-test-test_2"}
    assert "12 frames where the annotation gives 19" in notes[0].note
    (lost,) = rejected.values()
    assert lost.cause == "8 frames where the annotation gives 19"


# --- caches ----------------------------------------------------------------------------------------------------------


def test_rejecting_every_clip_leaves_no_cache(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    settings = checking.tree(root, tmp_path / "cache", "modalities.pose.kind=audio", "model.modalities=pose")
    with pytest.raises(CacheError, match="All 12 clips of tiny were rejected"):
        preparing.prepare(settings)
    assert not list((tmp_path / "cache").rglob("*.h5"))


def test_a_cache_of_another_kind_is_passed_over(tmp_path):
    """One `prepare` with the wrong kind, then the right one."""
    root = helpers.write_dataset(tmp_path / "tiny")
    for path in sorted((root / "audio").glob("*.wav"))[::3]:  # some that either kind can read
        shutil.copy(path, root / "pose" / f"{path.stem}.npy")
    only = ("model.modalities=pose", "dataset.max_bad=99", "modalities.pose.dimension=6")
    right = checking.tree(root, tmp_path / "cache", *only, "modalities.pose.kind=array")
    wrong = checking.tree(root, tmp_path / "cache", "modalities.pose.kind=audio", *only[:2])
    preparing.prepare(wrong)
    with pytest.raises(CacheError, match="kind: cache has audio, settings say array"):
        open_dataset(right, name="tiny", modalities=("pose",))
    preparing.prepare(right)
    preparing.prepare(wrong)
    assert open_dataset(right, name="tiny", modalities=("pose",)).modalities["pose"].kind == "array"
    assert open_dataset(wrong, name="tiny", modalities=("pose",)).modalities["pose"].kind == "audio"


def test_the_table_of_rejected_clips_counts_those_of_a_kind(tmp_path, capsys):
    root = helpers.write_dataset(tmp_path / "tiny", train=8, test=2)
    bad = sorted((root / "audio").glob("*.wav"))[:15]
    for path in bad:
        path.write_bytes(b"no sound")
    (root / "audio" / "beta_1_9.wav").unlink()
    settings = checking.tree(root, tmp_path / "cache", "model.modalities=audio", "dataset.max_bad=99")
    result = preparing.prepare(settings, say=console.terminal)
    assert len(result.rejected) == 16
    shown = capsys.readouterr().err
    assert sum(path.stem in shown for path in bad) == 10
    assert "... and 5" in shown
    assert "beta_1_9" in shown
    # 32 training clips have two views each, 8 test clips one.
    kept = sum(2 if int(name.rpartition("_")[2]) < 8 else 1 for name in {p.stem for p in (root / "video").iterdir()})
    lost_views = sum(2 if int(r.clip.rpartition("_")[2]) < 8 else 1 for r in result.rejected)
    assert f"24 clips, {kept - lost_views} views" in " ".join(shown.split())
