"""Folders of frames: what counts as a frame, what is ambiguous, what is mended, and spans in seconds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import frame_numbers, moving_texture, numbered_frames, tone, write_frames, write_wav

from mbcd_cli.data.media import folders
from mbcd_cli.data.media.checks import allowed_seconds
from mbcd_cli.data.media.decoding import DecodeJob, decode
from mbcd_cli.data.media.flow import read_flow
from mbcd_cli.data.media.folders import counts_from, frames_of, names_digest
from mbcd_cli.data.media.sound import read_audio
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.modalities.audio import AudioModality, followed_spans
from mbcd_cli.data.modalities.frames import FrameSampling
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import TEST_VIEW, Clip, Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()


def every(count: int) -> np.ndarray:
    return np.arange(count)


def numbers(folder: Path, **span) -> list[int]:
    return frame_numbers(read_frames(Media(folder, **span), every, dataset=DATASET))


def cause(folder: Path, **span) -> str:
    with pytest.raises(MediaError) as caught:
        read_frames(Media(folder, **span), every, dataset=DATASET)
    assert caught.value.remedy
    return caught.value.cause


def images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        cv2.imwrite(str(folder / name), np.zeros((48, 64, 3), np.uint8))
    return folder


AMBIGUOUS = {
    "two beginnings": (["color_%04d.jpg", "depth_%04d.jpg"], "color_0001.jpg", "depth_0001.jpg"),
    "left and right": (["left_%04d.png", "right_%04d.png"], "left_0001.png", "right_0001.png"),
    "two suffixes": (["f_%04d.jpg", "f_%04d.png"], "f_0001.jpg", "f_0001.png"),
    "upper and lower case": (["f_%04d.JPG", "f_%04d.jpg"], "f_0001.JPG", "f_0001.jpg"),
    "two paddings": (["f_%04d.jpg", "f_%06d.jpg"], "f_0001.jpg", "f_000001.jpg"),
    "flow in one folder": (["flow_x_%05d.jpg", "flow_y_%05d.jpg"], "flow_x_00001.jpg", "flow_y_00001.jpg"),
}


@pytest.mark.parametrize("fault", AMBIGUOUS)
def test_two_sequences_are_an_error_that_names_both(tmp_path, fault):
    patterns, *named = AMBIGUOUS[fault]
    images(tmp_path / "clip", *(pattern % number for pattern in patterns for number in range(1, 5)))
    why = cause(tmp_path / "clip")
    assert all(name in why for name in named)


@pytest.mark.parametrize("one_each", [False, True])
def test_times_are_no_numbers(tmp_path, one_each):
    step = 1.0 if one_each else 0.1
    images(tmp_path / "clip", *(f"{1305031102.25 + step * t:.6f}.png" for t in range(9)))
    assert "named after times (1305031102.250000.png)" in cause(tmp_path / "clip")


def test_names_that_share_nothing_are_no_sequence(tmp_path):
    images(tmp_path / "clip", "12-00-05.jpg", "12-01-06.jpg")
    assert "12-00-05.jpg" in cause(tmp_path / "clip")
    assert "12-01-06.jpg" in cause(tmp_path / "clip")


STRAY = ("._frame_0000000003.jpg", ".frame_0000000099.jpg", "cover_0.jpg", "Thumbs.db", "poster.png", "notes.txt")


@pytest.mark.parametrize("first", [0, 1])
def test_what_no_camera_writes_is_no_frame_and_hides_no_gap(tmp_path, first):
    folder = write_frames(tmp_path / "clip", numbered_frames(10), first=first)
    for name in STRAY:
        (folder / name).write_bytes(b"\0\5\x16\7")
    images(folder, *(f"thumb_{number:04d}.jpg" for number in range(40)))
    digest = names_digest(folder)
    for number in range(40):  # as some systems copy every file
        (folder / f"._frame_{number:010d}.jpg").write_bytes(b"\0\5\x16\7")
    assert names_digest(folder) == digest
    assert numbers(folder) == list(range(10))
    assert numbers(folder, start=3, stop=6, unit="frame") == [3, 4, 5]
    assert counts_from(folder) == first
    (folder / f"frame_{2 + first:010d}.jpg").unlink()
    notes: list[str] = []
    media = Media(folder, start=0, stop=10, unit="frame")
    assert frame_numbers(read_frames(media, every, dataset=DATASET, notes=notes))[2] in (1, 3)
    assert f"1 of 10 frames are missing, the first is frame_{2 + first:010d}.jpg" in notes[0]


def test_a_beginning_with_other_digits_or_suffix_is_one_sequence(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(6), first=0)
    (folder / "frame_0000000000.jpg").rename(folder / "frame_000000.JPG")
    (folder / "frame_0000000003.jpg").unlink()
    frames = frames_of(folder)
    assert (frames.base, frames.numbers.tolist()) == (0, [0, 1, 2, 4, 5])
    assert frames.name(3) == "frame_0000000003.jpg"
    plain = images(tmp_path / "plain", *(f"{number}.png" for number in range(1, 13)))
    assert frames_of(plain).numbers.tolist() == list(range(1, 13))
    assert frames_of(plain).name(30) == "30.png"


def test_more_than_half_missing_is_rejected(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(20))
    media = Media(folder, start=0, stop=20, unit="frame")
    for number in range(6, 16):
        (folder / f"frame_{number:010d}.jpg").unlink()
    assert frame_numbers(read_frames(media, every, dataset=DATASET))[:5] == [0, 1, 2, 3, 4]
    (folder / "frame_0000000016.jpg").unlink()
    assert cause(folder, start=0, stop=20, unit="frame") == (
        "11 of 20 frames are missing, the first is frame_0000000006.jpg"
    )


def test_frames_that_cannot_be_read_are_as_if_missing(tmp_path, monkeypatch):
    folder = write_frames(tmp_path / "clip", numbered_frames(10))
    names = [folder / f"frame_{number:010d}.jpg" for number in (2, 4, 6)]
    for path in names[:2]:
        path.unlink()
    names[0].symlink_to("gone.jpg")
    names[1].mkdir()
    read_bytes = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path == names[2]:
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    notes: list[str] = []
    got = frame_numbers(read_frames(Media(folder), every, dataset=DATASET, notes=notes))
    assert [got[n] for n in (0, 2, 4)] == [0, 2, 4]
    assert [abs(got[n] - n) for n in (1, 3, 5)] == [1, 1, 1]
    for path, why in zip(names, ("No such file", "Is a directory", "Permission denied"), strict=True):
        assert any(path.name in note and why in note for note in notes)


def test_the_folder_at_fault_is_named(tmp_path):
    frames = moving_texture(6, 32)[..., 0]
    media = Media(write_frames(tmp_path / "u", frames), write_frames(tmp_path / "v", frames))

    def blamed(media: Media) -> tuple[str, str]:
        with pytest.raises(MediaError) as caught:
            read_flow(media, every, dataset=DATASET)
        return caught.value.file, caught.value.cause

    for number in range(2, 6):
        (media.path_v / f"frame_{number:010d}.jpg").unlink()
    file, why = blamed(media)
    assert (file, why) == (str(media.path_v), "4 of 6 frames are missing, the first is frame_0000000002.jpg")
    for path in media.path_v.iterdir():
        path.unlink()
    assert blamed(media) == (str(media.path_v), "the folder holds no numbered jpg or png frames")


@pytest.mark.parametrize("fault", ["the folder", "a folder above it", "its frames"])
def test_a_folder_that_may_not_be_read_is_the_clips_own_fault(tmp_path, monkeypatch, fault):
    folder = write_frames(tmp_path / "clip", numbered_frames(4))
    scandir, stat = os.scandir, os.stat

    def denied(real):
        def call(path, *args, **kwargs):
            if str(path if fault != "its frames" else os.path.dirname(path)) == str(folder):  # noqa: PTH120
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        return call

    monkeypatch.setattr(*((os, "scandir", denied(scandir)) if fault == "the folder" else (os, "stat", denied(stat))))
    if fault == "its frames":  # a folder that may be listed and not entered
        assert cause(folder).endswith("cannot be read (Permission denied)")
        return
    assert cause(folder) == "Permission denied"
    assert (counts_from(folder), names_digest(folder)) == (1, "")
    assert allowed_seconds(folder) == 30
    clip = Clip("c", "a", "train", 0, "0", {"video": Media(folder)})
    job = DecodeJob("video", VideoModality(sampling="reference"), DATASET, 0)
    found = decode(0, clip, [TEST_VIEW], job).rejected
    assert (found.file, found.cause) == (str(folder), "Permission denied")
    assert found.remedy == "Give yourself the right to read it."


def test_flow_as_denseflow_writes_it(tmp_path):
    names = [f"flow_{direction}_{number:05d}.jpg" for direction in "xy" for number in range(4)]
    folder = images(tmp_path / "clip", *names)
    media = Media(folder / "u", folder / "v")
    with pytest.raises(MediaError, match="both directions lie in one folder"):
        read_flow(media, every, dataset=DATASET)
    for direction, name in (("x", "u"), ("y", "v")):  # the remedy
        (folder / name).mkdir()
        for path in folder.glob(f"flow_{direction}_*"):
            path.rename(folder / name / path.name)
    assert read_flow(media, every, dataset=DATASET).shape == (4, 48, 64, 2)


# --- spans in seconds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_a_rate_gives_frames_their_times(tmp_path, first):
    folder = write_frames(tmp_path / "clip", numbered_frames(20), first=first)
    assert "column `fps`" in _remedy(folder, start=0.5, stop=1.0)
    assert numbers(folder, start=0.5, stop=1.0, rate=10.0) == [5, 6, 7, 8, 9]
    assert numbers(folder, start=0.26, stop=0.64, rate=10.0) == [3, 4, 5]  # those whose middle lies in the span
    assert numbers(folder, start=1.5, rate=10.0) == [15, 16, 17, 18, 19]
    assert numbers(folder, stop=0.3, rate=10.0) == [0, 1, 2]
    one = DatasetSettings(min_frames=1)
    media = Media(folder, start=0.56, stop=0.64, rate=10.0)
    assert frame_numbers(read_frames(media, every, dataset=one)) == [5]  # between two middles: what is shown then
    assert cause(folder, start=5.0, stop=6.0, rate=10.0).startswith("all 10 frames are missing")


def _remedy(folder: Path, **span) -> str:
    with pytest.raises(MediaError) as caught:
        read_frames(Media(folder, **span), every, dataset=DATASET)
    return caught.value.remedy


def test_sound_of_a_span_in_frames_is_cut_by_the_folders_rate(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(20))
    wav = write_wav(tmp_path / "a.wav", np.concatenate([tone(1.0, hertz=h) for h in (500, 1500)]))
    media = Media(wav, start=10, stop=20, unit="frame", clock=folder, rate=10.0)
    samples, rate = read_audio(media, dataset=DATASET)
    assert len(samples) == rate
    assert np.abs(np.fft.rfft(samples)).argmax() == 1500


# --- large folders -------------------------------------------------------------------------------------------------


def test_a_recordings_folder_is_listed_once_for_all_its_clips(tmp_path, monkeypatch):
    folder = write_frames(tmp_path / "clip", numbered_frames(20))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(folders.os, "scandir", lambda path: listed.append(path) or scandir(path))
    for start in range(0, 18, 2):
        assert numbers(folder, start=start, stop=start + 2, unit="frame") == [start, start + 1]
    assert listed == [folder]
    digest = names_digest(folder)
    for _ in range(5):
        assert (names_digest(folder), counts_from(folder)) == (digest, 1)
    assert len(listed) <= 2
    (folder / "frame_0000000003.jpg").unlink()
    assert names_digest(folder) != digest


def test_folders_that_count_from_0_and_from_1_are_told(tmp_path):
    """Where nothing says that a folder lost its frame 0, it counts from 1: only its like show that it may have."""
    for name, first in (("a", 0), ("b", 0), ("c", 1)):
        write_frames(tmp_path / name, numbered_frames(6), first=first)
    clips = [Media(tmp_path / name, start=1, stop=4, unit="frame") for name in "abc"]
    (text,) = VideoModality().warnings(clips, name="video")
    assert text.startswith("video: 2 folders of frames have a frame 0")
    assert str(tmp_path / "c") in text
    assert VideoModality().warnings(clips[:2], name="video") == []
    assert VideoModality().warnings([Media(clip.path) for clip in clips], name="video") == []


def test_sound_follows_the_frames_of_a_folder(tmp_path):
    """By the rate that the manifest gives: frames 5 to 15 of 20 at 10 per second are the second half of a second on."""
    folder = write_frames(tmp_path / "clip", numbered_frames(20))
    samples = tone(2.0)
    sound = Media(write_wav(tmp_path / "a.wav", samples), clock=folder, rate=10.0)
    kind = AudioModality(follow="video", followed=FrameSampling(frames=2, interval=0))
    (span,) = followed_spans(sound, kind, [None])
    assert (span.start, span.stop) == (0.5, 1.5)
    heard, _ = read_audio(span, dataset=DATASET, sample_rate=kind.sample_rate, limit=kind.samples, silent_end=True)
    np.testing.assert_allclose(heard, samples[4000:12000], atol=1e-4)
    with pytest.raises(MediaError, match="nothing tells their times") as caught:
        followed_spans(replace(sound, rate=None), kind, [None])
    assert "fps" in caught.value.remedy
