"""The EPIC-Kitchens reader on miniatures of its three layouts, and on the real tables."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import numbered_frames, tone, write_video, write_wav

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.readers import read_dataset
from mbcd_cli.data.readers.presence import check_media
from mbcd_cli.data.records import TEST_VIEW
from mbcd_cli.errors import ManifestError, MediaError, SettingsError
from mbcd_cli.settings import DatasetSettings

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "mm-sada-splits"
needs_tables = pytest.mark.skipif(not REAL.is_dir(), reason="the MM-SADA split tables are not beside the clone")
FIELDS = [
    "uid",
    "participant_id",
    "video_id",
    "narration",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
    "verb",
    "verb_class",
]
KITCHENS = {"D1": "P08", "D2": "P01", "D3": "P22"}
RATE = 60


def stamp(frame: int) -> str:
    return f"00:00:{frame / RATE:05.2f}"


def table_rows() -> dict[tuple[str, str], list[dict]]:
    """Two clips per domain and split; spans overlap, as the real ones do; the first begins at frame 1."""
    rows, uid = {}, 100
    for domain, kitchen in KITCHENS.items():
        for number, split in enumerate(("train", "test")):
            rows[domain, split] = []
            for clip, (start, stop) in enumerate([(1, 13), (7, 23)]):
                uid += 1
                rows[domain, split].append(
                    {
                        "uid": uid,
                        "participant_id": kitchen,
                        "video_id": f"{kitchen}_0{number + 1}",
                        "narration": "open, then close",
                        "start_timestamp": stamp(start),
                        "stop_timestamp": stamp(stop),
                        "start_frame": start,
                        "stop_frame": stop,
                        "verb": "open",
                        "verb_class": (2 * number + clip) % 8,
                    }
                )
    return rows


def write_tables(folder: Path, rows: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for (domain, split), entries in (rows or table_rows()).items():
        with (folder / f"{domain}_{split}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, FIELDS)
            writer.writeheader()
            writer.writerows(entries)
    return folder


def recordings() -> list[tuple[str, str, str]]:
    return [(d, s, entries[0]["video_id"]) for (d, s), entries in table_rows().items()]


def write_numbered(folder: Path, count: int, *, first: int, offset: int = 0) -> None:
    """frame_<number>.jpg, each plain grey of level 8 x number + offset."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        image = np.full((48, 64, 3), 8 * number + offset, np.uint8)
        cv2.imwrite(str(folder / f"frame_{number:010d}.jpg"), image)


def frame_folders(root: Path, *, first: int = 1) -> Path:
    for domain, split, video in recordings():
        write_numbered(root / "rgb" / split / domain / video, 24, first=first)
        for direction, offset in (("u", 0), ("v", 4)):
            write_numbered(root / "flow" / split / domain / video / direction, 14, first=first, offset=offset)
        sound = np.concatenate([tone(0.25, rate=24000, hertz=h, level=0.5) for h in (500, 3000)])
        write_wav(root / "rgb" / split / domain / f"{video}.wav", sound, rate=24000)
    return root


def clip_files(root: Path) -> Path:
    for (domain, split), entries in table_rows().items():
        for row in entries:
            start, stop = row["start_frame"], row["stop_frame"]
            name = f"{domain}_{row['video_id']}_{start}_{stop}_{row['verb_class']}.mp4"
            write_video(root / "video" / split / domain / name, numbered_frames(stop - start), fps=60)
            half = math.ceil(start / 2)
            stem = f"{domain}_{row['video_id']}_{half}_{half + (stop - start) // 2}_{row['verb_class']}"
            for direction in "uv":
                frames = numbered_frames((stop - start) // 2)
                write_video(root / "flow" / split / domain / f"{stem}_{direction}.mp4", frames, fps=30)
        write_wav(root / "audio" / split / domain / f"{entries[0]['video_id']}.wav", tone(0.5), rate=8000)
    return root


def whole_videos(root: Path) -> Path:
    for _, _, video in recordings():
        made = write_video(root / "made.mp4", numbered_frames(25), fps=60)
        target = root / video[:3] / "videos" / f"{video}.MP4"
        target.parent.mkdir(parents=True, exist_ok=True)
        made.rename(target)
        write_wav(root / video[:3] / "audio" / f"{video}.wav", tone(0.5), rate=8000)
    return root


def touch_all_clips(folder: Path) -> None:
    """A file for every clip and modality of the real tables, with a byte in it."""
    for domain in KITCHENS:
        for split in ("train", "test"):
            with (REAL / f"{domain}_{split}.csv").open() as stream:
                rows = list(csv.DictReader(stream))
            for kind in ("video", "flow", "audio"):
                (folder / kind / split / domain).mkdir(parents=True)
            for recording in {row["video_id"] for row in rows}:
                (folder / "audio" / split / domain / f"{recording}.wav").write_bytes(b"x")
            for row in rows:
                start, stop, label = int(row["start_frame"]), int(row["stop_frame"]), row["verb_class"]
                name = f"{domain}_{row['video_id']}"
                (folder / "video" / split / domain / f"{name}_{start}_{stop}_{label}.mp4").write_bytes(b"x")
                half = (start + 1) // 2
                for direction in "uv":
                    stem = f"{name}_{half}_{half + (stop - start) // 2}_{label}_{direction}"
                    (folder / "flow" / split / domain / f"{stem}.mp4").write_bytes(b"x")


def settings(root: Path, **changes) -> DatasetSettings:
    return DatasetSettings(**{"reader": "epic-kitchens", "root": root, **changes})


def levels(view: np.ndarray) -> list[int]:
    """The grey level of each frame of a view [C, T, H, W]."""
    return [round(float(frame.mean())) for frame in view[0].astype(float)]


VIDEO = VideoModality(frames=4, interval=2, short_side=32, crop=32)
FLOW = FlowModality(frames=3, interval=2, short_side=32, crop=32)
AUDIO = AudioModality(samples=2048, short="pad", nperseg=256, noverlap=128)


@pytest.mark.parametrize("first", [0, 1])
def test_frame_folders(tmp_path, first):
    root = frame_folders(tmp_path, first=first)
    write_tables(root / "MM-SADA_Domain_Adaptation_Splits")
    listing = read_dataset(settings(root), {})
    assert listing.name == "epic-kitchens"
    assert listing.domains == ("D1", "D2", "D3")
    assert list(listing.modalities) == ["video", "audio", "flow"]
    assert len(listing.label_names) == 8
    assert len(listing.clips) == len({clip.id for clip in listing.clips}) == 12
    assert any("video: frame folders" in note and "12 of 12" in note for note in listing.notes)
    # Two rows per table instead of the published ones: said for each of the six.
    assert sum("where the published split has" in line for line in listing.warnings) == 6
    clip = listing.clips[1]
    assert (clip.id, clip.domain, clip.split, clip.label) == ("P08_01-102", "D1", "train", 1)

    # The clip spans frames 7..22; the test view takes four at interval 2 from the middle: start (16 - 7) // 2.
    (view,) = load_views(clip, "video", VIDEO, views=[TEST_VIEW], seed=0, dataset=settings(root))
    expected = [8 * (7 + 4 + 2 * t) for t in range(4)]
    assert np.allclose(levels(view[0]), expected, atol=2)
    # Flow: half the rate, from ceil(7 / 2) = 4, (23 - 7) / 2 = 8 frames; u and v side by side.
    (view,) = load_views(clip, "flow", FLOW, views=[TEST_VIEW], seed=0, dataset=settings(root))
    expected = [8 * (4 + 1 + 2 * t) for t in range(3)]
    assert np.allclose(levels(view[0]), expected, atol=2)
    assert np.allclose(levels(view[0][1:]), [level + 4 for level in expected], atol=2)


def test_sound_is_cut_by_time_stamps(tmp_path):
    rows = table_rows()
    for entries in rows.values():
        entries[0] |= {"start_timestamp": "00:00:00.00", "stop_timestamp": "00:00:00.24"}
        entries[1] |= {"start_timestamp": "00:00:00.26", "stop_timestamp": "00:00:00.49"}
    root = frame_folders(tmp_path)
    write_tables(root / "splits", rows)
    listing = read_dataset(settings(root), {"audio": AUDIO})
    low, high = (
        load_views(c, "audio", AUDIO, views=[TEST_VIEW], seed=0, dataset=settings(root)) for c in listing.clips[:2]
    )
    loudest = [int(view[0][0][0].mean(axis=1).argmax()) for view in (low, high)]
    hertz = [bin_ * 24000 / 256 for bin_ in loudest]
    assert abs(hertz[0] - 500) < 100
    assert abs(hertz[1] - 3000) < 100


@pytest.mark.parametrize("nested", ["", "EPIC-mp4"])
def test_one_file_per_clip(tmp_path, nested):
    root = clip_files(tmp_path / nested)
    write_tables(tmp_path / "splits")
    for given in {tmp_path, root} if not nested else {tmp_path}:
        listing = read_dataset(settings(given), {})
        assert not any("nothing is on disk" in line for line in listing.warnings)
        assert any("one file per clip" in note for note in listing.notes)
        clip = listing.clips[1]
        assert clip.media["video"].path.name == "D1_P08_01_7_23_1.mp4"
        assert clip.media["flow"].path.name == "D1_P08_01_4_12_1_u.mp4"
        assert clip.media["flow"].path_v.name == "D1_P08_01_4_12_1_v.mp4"
        (view,) = load_views(clip, "video", VIDEO, views=[TEST_VIEW], seed=0, dataset=settings(given))
        assert view[0].shape == (3, 4, 32, 32)
        (view,) = load_views(clip, "flow", FLOW, views=[TEST_VIEW], seed=0, dataset=settings(given))
        assert view[0].shape == (2, 3, 32, 32)


def test_flow_named_after_the_frames_of_the_video(tmp_path):
    """Some keep the video clip's own name, D1_P08_01_7_23_1.mp4, for its flow."""
    root = clip_files(tmp_path)
    write_tables(tmp_path / "splits")
    for (domain, split), entries in table_rows().items():
        for row in entries:
            start, stop, label = row["start_frame"], row["stop_frame"], row["verb_class"]
            half = math.ceil(start / 2)
            folder, name = root / "flow" / split / domain, f"{domain}_{row['video_id']}"
            for direction in "uv":
                made = folder / f"{name}_{half}_{half + (stop - start) // 2}_{label}_{direction}.mp4"
                made.rename(folder / f"{name}_{start}_{stop}_{label}_{direction}.mp4")
    listing = read_dataset(settings(root), {})
    assert any(note.startswith("flow: one file per clip") and "12 of 12" in note for note in listing.notes)
    media = listing.clips[1].media["flow"]
    assert (media.path.name, media.path_v.name) == ("D1_P08_01_7_23_1_u.mp4", "D1_P08_01_7_23_1_v.mp4")


def test_videos_as_epic_kitchens_55_comes(tmp_path):
    """Both splits are cut from its training videos: videos/train/P08/P08_01.MP4."""
    made = whole_videos(tmp_path / "made")
    for _, _, video in recordings():
        for kind, suffix in (("videos", "MP4"), ("audio", "wav")):
            target = tmp_path / "EPIC" / "videos" / "train" / video[:3] / f"{video}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            (made / video[:3] / kind / f"{video}.{suffix}").rename(target)
    write_tables(tmp_path / "EPIC" / "splits")
    listing = read_dataset(settings(tmp_path / "EPIC"), {"video": VIDEO, "audio": AUDIO})
    assert sum("12 of 12 clips found" in note for note in listing.notes) == 2


@pytest.mark.parametrize(
    ("rgb", "flow"),
    [
        ("{kitchen}/rgb_frames/{video}", "{kitchen}/flow_frames/{video}"),
        ("frames_rgb_flow/rgb/train/{kitchen}/{video}", "frames_rgb_flow/flow/train/{kitchen}/{video}"),
        ("rgb/train/{kitchen}/{video}", "flow/train/{kitchen}/{video}"),
    ],
)
def test_frames_as_epic_kitchens_is_downloaded(tmp_path, rgb, flow):
    made, root = frame_folders(tmp_path / "made"), tmp_path / "EPIC"
    write_tables(tmp_path / "made" / "splits")
    write_tables(root / "splits")
    for domain, split, video in recordings():
        for kind, pattern in (("rgb", rgb), ("flow", flow)):
            target = root / pattern.format(kitchen=video[:3], video=video)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made / kind / split / domain / video, target)
    asked = {"video": VIDEO, "flow": FLOW}
    ours, theirs = (read_dataset(settings(place), asked) for place in (made, root))
    assert sum("frame folders" in note and "12 of 12" in note for note in theirs.notes) == 2
    for one, other in zip(ours.clips, theirs.clips, strict=True):
        for name, modality in asked.items():
            views = [
                load_views(clip, name, modality, views=[TEST_VIEW, 0], seed=0, dataset=settings(root))
                for clip in (one, other)
            ]
            assert all(np.array_equal(a[0], b[0]) for a, b in zip(*views, strict=True))


def test_frame_numbers_written_as_floats_and_others(tmp_path):
    rows = table_rows()
    rows["D1", "train"][0] |= {"start_frame": "1.0", "stop_frame": "13.0", "verb_class": "3.0"}
    root = frame_folders(tmp_path)
    write_tables(root / "splits", rows)
    clip = read_dataset(settings(root), {"video": VIDEO}).clips[0]
    assert (clip.media["video"].start, clip.media["video"].stop, clip.label) == (0, 12, 3)
    rows["D1", "train"][0] |= {"stop_frame": "13.5"}
    rows["D1", "train"][1] |= {"start_frame": "soon"}
    write_tables(root / "splits", rows)
    with pytest.raises(ManifestError) as caught:
        read_dataset(settings(root), {"video": VIDEO})
    assert "row 1: stop_frame '13.5' is not a frame number" in str(caught.value)
    assert "row 2: start_frame 'soon' is not a frame number" in str(caught.value)


@needs_tables
def test_two_tables_of_one_split_that_differ(tmp_path):
    (tmp_path / "rgb" / "train" / "D1" / "P08_01").mkdir(parents=True)
    for table in REAL.glob("D1_*"):
        shutil.copy(table, tmp_path)
    d1 = settings(tmp_path, domains=("D1",))
    assert not any("taken" in line for line in read_dataset(d1, {"video": VIDEO}).warnings)
    table = tmp_path / "D1_train.csv"
    with table.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    lines[3]["stop_frame"] = int(lines[3]["stop_frame"]) + 5
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0])
        writer.writeheader()
        writer.writerows(lines[:-1])
    (line,) = [line for line in read_dataset(d1, {"video": VIDEO}).warnings if "taken" in line]
    assert line.startswith("D1_train.csv is taken, and D1_train.pkl beside it differs in 2 clips, the first P08_")


def test_root_may_be_the_split_folder(tmp_path):
    clip_files(tmp_path / "MM-SADA_Domain_Adaptation_Splits" / "EPIC-mp4")
    splits = write_tables(tmp_path / "MM-SADA_Domain_Adaptation_Splits")
    for root in (tmp_path, splits, splits / "EPIC-mp4"):
        listing = read_dataset(settings(root), {})
        assert list(listing.modalities) == ["video", "audio", "flow"]


def test_whole_videos_are_cut_by_time_stamps(tmp_path):
    root = whole_videos(tmp_path)
    write_tables(root)
    listing = read_dataset(settings(root), {})
    assert list(listing.modalities) == ["video", "audio"]
    assert any(line.startswith("flow: there is none") and "--compute-flow" in line for line in listing.warnings)
    clip = listing.clips[1]
    assert (clip.media["video"].start, clip.media["video"].stop, clip.media["video"].unit) == (0.12, 0.38, "s")
    (view,) = load_views(clip, "video", VIDEO, views=[TEST_VIEW], seed=0, dataset=settings(root))
    assert view[0].shape == (3, 4, 32, 32)
    listing = read_dataset(settings(root, compute_flow=True), {})
    assert listing.clips[0].media["flow"].computed
    assert list(listing.modalities) == ["video", "audio", "flow"]


@pytest.mark.parametrize(("fps", "expected"), [(60, [8, 10, 12, 14]), (30, [4, 5, 6, 7]), (24, [3, 4, 4, 5])])
def test_whole_videos_of_another_frame_rate_show_the_same_moments(tmp_path, fps, expected):
    """Annotated frames 5..17 of 60 per second: the test view takes 8, 10, 12, 14, whatever the file's own rate."""
    rows = table_rows()
    for entries in rows.values():
        entries[0] |= {"start_timestamp": "00:00:00.083334", "stop_timestamp": "00:00:00.30"}
    root = whole_videos(tmp_path)
    write_video(tmp_path / "made.mp4", numbered_frames(25), fps=fps).rename(root / "P08" / "videos" / "P08_01.MP4")
    write_tables(root, rows)
    clip = read_dataset(settings(root), {"video": VIDEO}).clips[0]
    (view,) = load_views(clip, "video", VIDEO, views=[TEST_VIEW], seed=0, dataset=settings(root))
    assert [round(float(frame[-8:, -8:].mean()) / 10) for frame in view[0][0].astype(float)] == expected


def test_flow_is_computed_at_half_the_annotations_rate(tmp_path):
    root = whole_videos(tmp_path)
    write_tables(root / "splits")
    listing = read_dataset(settings(root, compute_flow=True), {"video": VIDEO, "flow": FLOW})
    assert {clip.media["flow"].computed for clip in listing.clips} == {2}


def test_incomplete_download_is_counted_per_clip(tmp_path):
    root = frame_folders(tmp_path)
    write_tables(root / "splits")
    folder = root / "rgb" / "train" / "D1" / "P08_01"
    for number in (8, 9, 20):
        (folder / f"frame_{number:010d}.jpg").unlink()
    shutil.rmtree(root / "flow" / "test" / "D2" / "P01_02" / "v")
    (root / "rgb" / "test" / "D3" / "P22_02.wav").unlink()
    listing = read_dataset(settings(root), {})
    assert any("audio: nothing is on disk for 2 of 12 clips" in line for line in listing.warnings)
    found = check_media(listing)
    gaps = {gap.clip: gap for gap in found["video"].gaps}
    assert (gaps["P08_01-101"].missing, gaps["P08_01-101"].expected) == (2, 12)
    assert (gaps["P08_01-102"].missing, gaps["P08_01-102"].expected) == (3, 16)
    assert gaps["P08_01-102"].first.endswith("P08_01/frame_0000000008.jpg")
    assert (found["video"].complete, found["video"].absent) == (10, 0)
    assert found["video"].files == 6 * (12 + 16)
    flow = {gap.clip: gap for gap in found["flow"].gaps}
    assert len(flow) == 2
    assert all(gap.first.endswith("P01_02/v") for gap in flow.values())
    assert (found["audio"].absent, found["audio"].files_missing) == (2, 2)

    clip = listing.clips[1]
    notes: list[str] = []
    load_views(clip, "video", VIDEO, views=[TEST_VIEW], seed=0, dataset=settings(root), notes=notes)
    assert "3 of 16 frames are missing, the first is frame_0000000008.jpg" in notes[0]
    with pytest.raises(MediaError, match="3 of 16 frames are missing"):
        load_views(clip, "video", VIDEO, views=[TEST_VIEW], seed=0, dataset=settings(root, missing_frames="reject"))
    broken = next(c for c in listing.clips if c.id in flow)
    with pytest.raises(MediaError, match="P01_02/v"):
        load_views(broken, "flow", FLOW, views=[TEST_VIEW], seed=0, dataset=settings(root))


def test_frames_past_the_end_are_said(tmp_path):
    rows = table_rows()
    rows["D1", "train"][1] |= {"stop_frame": 40, "stop_timestamp": stamp(40)}
    root = frame_folders(tmp_path)
    write_tables(root / "splits", rows)
    listing = read_dataset(settings(root), {"video": VIDEO})
    gap = check_media(listing)["video"].gaps[0]
    assert (gap.missing, gap.expected) == (40 - 25, 33)
    with pytest.raises(MediaError, match="15 of 33 frames are missing, the first is frame_0000000025"):
        load_views(
            listing.clips[1],
            "video",
            VIDEO,
            views=[TEST_VIEW],
            seed=0,
            dataset=settings(root, missing_frames="reject"),
        )


def test_all_bad_rows_are_listed_and_paths_cannot_leave_the_root(tmp_path):
    rows = table_rows()
    rows["D1", "train"][0] |= {"verb_class": 8}
    rows["D1", "train"][1] |= {"video_id": "../../etc/passwd"}
    rows["D2", "test"][0] |= {"stop_frame": 0}
    rows["D2", "test"][1] |= {"start_timestamp": "soon"}
    rows["D3", "test"][1] |= {"uid": rows["D3", "test"][0]["uid"]}
    root = frame_folders(tmp_path)
    write_tables(root / "splits", rows)
    with pytest.raises(ManifestError) as caught:
        read_dataset(settings(root), {})
    message = str(caught.value)
    for part in (
        "D1_train.csv, row 1: verb_class '8' is not one of 0 to 7",
        "D1_train.csv, row 2: video_id '../../etc/passwd'",
        "D2_test.csv, row 1: frames 1 to 0",
        "D2_test.csv, row 2: 'soon' is not a time stamp",
        "clip P22_02-111 is there twice",
    ):
        assert part in message


def test_missing_tables_media_domains_and_roots_are_named(tmp_path):
    with pytest.raises(ManifestError, match="does not exist"):
        read_dataset(settings(tmp_path / "nowhere"), {})
    with pytest.raises(ManifestError, match="no split tables") as caught:
        read_dataset(settings(tmp_path), {})
    assert "MM-SADA_Domain_Adaptation_Splits" in str(caught.value)
    splits = write_tables(tmp_path / "splits")
    with pytest.raises(ManifestError, match="no media of the clips"):
        read_dataset(settings(tmp_path), {})
    with pytest.raises(ManifestError, match="there is no domain 'D4'"):
        read_dataset(settings(tmp_path, domains=("D1", "D4")), {})
    with pytest.raises(SettingsError, match=r"modalities\.pose"):
        read_dataset(settings(tmp_path), {"pose": ArrayModality()})
    frame_folders(tmp_path)
    (splits / "D3_test.csv").unlink()
    with pytest.raises(ManifestError, match="no tables D3_test"):
        read_dataset(settings(tmp_path), {})
    listing = read_dataset(settings(tmp_path, domains=("D2", "D1")), {"video": VIDEO})
    assert listing.domains == ("D2", "D1")
    assert {clip.domain for clip in listing.clips} == {"D1", "D2"}


@needs_tables
def test_pickled_tables_give_the_same_clips(tmp_path):
    plain, pickled = tmp_path / "plain", tmp_path / "pickled"
    for folder, suffix in ((plain, "csv"), (pickled, "pkl")):
        (folder / "rgb" / "train" / "D1" / "P08_01").mkdir(parents=True)
        for table in REAL.glob(f"*.{suffix}"):
            shutil.copy(table, folder)
    one, other = (read_dataset(settings(root), {"video": VIDEO}) for root in (plain, pickled))
    assert [(c.id, c.label, c.split) for c in one.clips] == [(c.id, c.label, c.split) for c in other.clips]
    spans = [[(c.media["video"].start, c.media["video"].stop) for c in listing.clips] for listing in (one, other)]
    assert spans[0] == spans[1]
