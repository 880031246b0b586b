"""Decoders against media whose content is known, whole, odd and broken."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import (
    AV_DIGITS,
    cause,
    frame_numbers,
    moving_texture,
    needs_av_digits,
    numbered_frames,
    retime_mp4,
    rotate_mp4,
    tone,
    trim_mp4,
    write_array,
    write_frames,
    write_video,
    write_wav,
)

from mbcd_cli.data.media import video
from mbcd_cli.data.media.arrays import read_array
from mbcd_cli.data.media.sound import read_audio
from mbcd_cli.data.media.video import read_frames, resize_short_side
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()
REJECT = DatasetSettings(missing_frames="reject")


def every(count: int) -> np.ndarray:
    return np.arange(count)


def numbers(path: Path, dataset: DatasetSettings = DATASET, **span) -> list[int]:
    return frame_numbers(read_frames(Media(path, **span), every, dataset=dataset))


# --- video ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
def test_video_frames_and_colours(tmp_path, suffix):
    frames = numbered_frames(16)
    got = read_frames(Media(write_video(tmp_path / f"a{suffix}", frames)), every, dataset=DATASET)
    assert got.shape == (16, 48, 64, 3)
    assert got.dtype == np.uint8
    assert frame_numbers(got) == list(range(16))
    assert np.abs(got.astype(int) - frames).mean() < 4  # red is red: RGB, not BGR


def test_only_chosen_frames_come_back(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(20))
    seen = []

    def choose(count: int) -> np.ndarray:
        seen.append(count)
        return np.array([3, 11, 19])

    assert frame_numbers(read_frames(Media(path), choose, dataset=DATASET)) == [3, 11, 19]
    assert seen == [20]


def test_spans_in_frames_and_seconds(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(24), fps=16)
    assert numbers(path, start=5, stop=9, unit="frame") == [5, 6, 7, 8]
    assert numbers(path, start=20, unit="frame") == [20, 21, 22, 23]
    assert numbers(path, start=0.5, stop=0.75) == [8, 9, 10, 11]
    assert numbers(path, stop=0.25) == [0, 1, 2, 3]
    assert numbers(write_video(tmp_path / "a.mkv", numbered_frames(24)), start=0.0625, stop=0.1875) == [1, 2]


def test_clips_of_one_recording_share_a_reader(tmp_path, monkeypatch):
    """Any order of spans gives the frames that a fresh reader gives, and the recording is opened once."""
    opened = []
    real = video.open_container
    monkeypatch.setattr(video, "open_container", lambda path: opened.append(path) or real(path))
    path = write_video(tmp_path / "a.mp4", numbered_frames(25), fps=10)
    rng = np.random.default_rng(0)
    for _ in range(40):
        start = int(rng.integers(20))
        stop = int(rng.integers(start + 2, 26))
        assert numbers(path, start=start, stop=stop, unit="frame") == list(range(start, stop))
    assert numbers(path, start=0.5, stop=1.0) == [5, 6, 7, 8, 9]
    assert len(opened) == 1
    assert "after the end" in cause(lambda: numbers(path, start=30, unit="frame"))
    assert numbers(path, start=3, stop=5, unit="frame") == [3, 4]  # a failed reader is not used again
    assert len(opened) == 2
    other = write_video(tmp_path / "b.mp4", numbered_frames(12), fps=10)
    assert numbers(other, start=2, stop=6, unit="frame") == [2, 3, 4, 5]
    write_video(path, numbered_frames(25)[::-1], fps=10)  # replaced: seen
    assert numbers(path, start=3, stop=5, unit="frame") == [21, 20]
    assert len(opened) == 4


def test_spans_past_the_end(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(16))
    notes: list[str] = []
    media = Media(path, start=12, stop=20, unit="frame")
    assert frame_numbers(read_frames(media, every, dataset=DATASET, notes=notes)) == [12, 13, 14, 15]
    assert "4 of the clip's 8 frames" in notes[0]
    assert "4 of the clip's 8 frames" in cause(lambda: read_frames(media, every, dataset=REJECT))
    seconds = Media(path, start=0.75, stop=1.25)
    assert "4 of the clip's 8 frames" in cause(lambda: read_frames(seconds, every, dataset=REJECT))
    assert numbers(path, REJECT, start=0.75, stop=1.0) == [12, 13, 14, 15]
    assert "after the end of the video" in cause(lambda: numbers(path, start=30, unit="frame"))
    assert "after the end of the video" in cause(lambda: numbers(path, start=5.0))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_video_is_turned_upright(tmp_path, degrees):
    plain = write_video(tmp_path / "a.mp4", numbered_frames(12))
    upright = read_frames(Media(rotate_mp4(plain, tmp_path / "b.mp4", degrees)), every, dataset=DATASET)
    original = read_frames(Media(plain), every, dataset=DATASET)
    expected = np.rot90(original, k=-degrees // 90, axes=(1, 2))  # the matrix turns clockwise
    assert upright.shape == expected.shape
    assert np.abs(upright.astype(int) - expected).mean() < 2


def test_trimmed_video_shows_only_what_its_edit_list_shows(tmp_path):
    plain = write_video(tmp_path / "a.mp4", numbered_frames(24), fps=16)
    assert numbers(trim_mp4(plain, tmp_path / "b.mp4", skip=0, seconds=0.5)) == list(range(8))
    tail = trim_mp4(plain, tmp_path / "c.mp4", skip=0.25, seconds=1.25)
    assert numbers(tail) == list(range(4, 24))
    assert numbers(tail, start=0.25, stop=0.375) == [8, 9]


def test_variable_frame_rate_is_cut_by_time(tmp_path):
    plain = write_video(tmp_path / "a.mp4", numbered_frames(8), fps=16)
    uneven = retime_mp4(plain, tmp_path / "b.mp4", [1, 1, 1, 1, 4, 4, 4, 4])  # times 0 1 2 3 4 8 12 16 (/16 s)
    assert numbers(uneven) == list(range(8))
    assert numbers(uneven, start=3 / 16, stop=9 / 16) == [3, 4, 5]
    turned = rotate_mp4(uneven, tmp_path / "c.mp4", 180)
    assert read_frames(Media(turned, start=8 / 16), every, dataset=DATASET).shape[0] == 3
    sideways = rotate_mp4(uneven, tmp_path / "d.mp4", 90)
    assert read_frames(Media(sideways, start=3 / 16, stop=9 / 16), every, dataset=DATASET).shape == (3, 64, 48, 3)


@pytest.mark.parametrize(("fps", "expected"), [(60, [8, 10, 12, 14]), (30, [4, 5, 6, 7]), (24, [3, 4, 4, 5])])
def test_turned_recordings_of_another_frame_rate_show_the_same_moments(tmp_path, fps, expected):
    """Frames 3, 5, 7, 9 of a clip counted at 60 per second from frame 5, upright or turned, at any rate of the file."""
    plain = write_video(tmp_path / "a.mp4", numbered_frames(25), fps=fps)
    for path in (plain, rotate_mp4(plain, tmp_path / "b.mp4", 90)):
        media = Media(path, start=0.083334, stop=0.30, unit="s", rate=60.0)
        shown = read_frames(media, lambda _: np.array([3, 5, 7, 9]), dataset=DATASET)
        # Grey lies outside the red corner, which is turned along.
        assert [round(float(frame[-8:, 2:10].mean()) / 10) for frame in shown] == expected


@pytest.mark.parametrize(("width", "height"), [(50, 38), (8, 8), (130, 98)])
def test_sizes_that_decoders_pad(tmp_path, width, height):
    frames = np.zeros((6, height, width, 3), np.uint8)
    frames[:, :, : width // 2] = 255
    got = read_frames(Media(write_video(tmp_path / "a.avi", frames)), every, dataset=DATASET)
    assert got.shape == frames.shape
    assert np.abs(got.astype(int) - frames).mean() < 12


def test_a_clip_s_own_file_of_another_rate_shows_the_annotated_moments(tmp_path):
    """Half the frames at half the rate are the whole clip; half of the clip is said."""
    path = write_video(tmp_path / "a.mp4", numbered_frames(20), fps=10)
    for frames, rate, expected in ((40, 20.0, [n // 2 for n in range(40)]), (10, 5.0, [2 * n for n in range(10)])):
        got = read_frames(Media(path, frames=frames, rate=rate), every, dataset=REJECT)
        assert frame_numbers(got) == expected
    assert frame_numbers(read_frames(Media(path, frames=21, rate=10.0), every, dataset=REJECT)) == list(range(20))
    short = Media(path, frames=80, rate=20.0)
    assert "20 frames where the annotation gives 80" in cause(lambda: read_frames(short, every, dataset=REJECT))


def test_too_few_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(3))
    assert cause(lambda: numbers(path, DatasetSettings(min_frames=4))) == "3 frames, fewer than the 4 needed"
    assert numbers(path, DatasetSettings(min_frames=3)) == [0, 1, 2]
    assert "1 frame," in cause(lambda: numbers(path, start=1, stop=2, unit="frame"))


def test_not_video(tmp_path):
    wav = write_wav(tmp_path / "sound.wav", tone())
    assert cause(lambda: numbers(wav)) == "it has no video stream"
    renamed = tmp_path / "sound.mp4"
    renamed.write_bytes(b"once upon a time " * 40)
    assert "not a video" in cause(lambda: numbers(renamed))
    noise = tmp_path / "noise.bin"
    noise.write_bytes(np.random.default_rng(0).bytes(2000))
    assert "not a video" in cause(lambda: numbers(noise))
    assert cause(lambda: numbers(tmp_path / "none.mp4")) == "no such file"


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_video_cut_short_is_never_taken_for_whole(tmp_path, keep):
    data = write_video(tmp_path / "a.mp4", numbered_frames(24)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(len(data) * keep)])
    assert "cut short" in cause(lambda: numbers(cut))


def test_index_that_claims_more_frames_than_there_are(tmp_path):
    # The index first, as "fast start" files have it, and the data end between two frames: no reader notices.
    data = write_video(tmp_path / "a.mp4", numbered_frames(16)).read_bytes()
    at = data.index(b"stsz") + 12
    sizes = struct.unpack_from(">16I", data, at + 4)
    body = data.index(b"mdat") + 4
    end = body + sum(sizes)
    hole = bytearray(data)
    hole[end - sum(sizes[3:]) : end] = bytes(sum(sizes[3:]))
    broken = tmp_path / "hole.mp4"
    broken.write_bytes(hole)
    assert cause(lambda: numbers(broken)) == "13 of its 16 frames cannot be decoded: the data are damaged"


def test_damage_beyond_the_chosen_frames_is_found(tmp_path):
    data = bytearray(write_video(tmp_path / "a.mp4", numbered_frames(24)).read_bytes())
    sizes = struct.unpack_from(">24I", data, data.index(b"stsz") + 16)
    last = data.index(b"mdat") + 4 + sum(sizes[:-1])
    data[last : last + sizes[-1]] = bytes(sizes[-1])
    broken = tmp_path / "last.mp4"
    broken.write_bytes(data)
    few = lambda dataset, notes=None: read_frames(  # noqa: E731
        Media(broken), lambda count: np.array([0, 5]), dataset=dataset, notes=notes
    )
    assert cause(lambda: few(REJECT)) == "1 of its 24 frames cannot be decoded: the data are damaged"
    notes: list[str] = []
    assert frame_numbers(few(DATASET, notes)) == [0, 5]
    assert "1 of its 24 frames" in notes[0]


def test_frames_that_a_decoder_makes_up(tmp_path):
    # Packets that decode to nothing: a neighbour stands for a few frames at most.
    data = write_video(tmp_path / "a.mp4", moving_texture(24)).read_bytes()
    sizes = struct.unpack_from(">24I", data, data.index(b"stsz") + 16)
    for count, tolerated in ((1, True), (6, False)):
        spoiled = bytearray(data)
        for frame in range(3, 3 + count):
            at = data.index(b"mdat") + 4 + sum(sizes[:frame])
            spoiled[at + 4 : at + sizes[frame]] = bytes(sizes[frame] - 4)
        path = tmp_path / f"{count}.mp4"
        path.write_bytes(spoiled)
        assert f"{count} of its 24 frames" in cause(lambda path=path: numbers(path, REJECT))
        if tolerated:
            assert len(numbers(path)) == 24
        else:
            assert f"{count} of its 24 frames" in cause(lambda path=path: numbers(path))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".wav", ".npy"])
def test_damaged_files_are_errors_never_crashes(tmp_path, suffix):
    reading = {
        ".wav": lambda path: read_audio(Media(path), sample_rate=4000, limit=8000, dataset=DATASET),
        ".npy": lambda path: read_array(Media(path)),
    }.get(suffix, lambda path: read_frames(Media(path), every, dataset=DATASET))
    path = tmp_path / f"a{suffix}"
    if suffix == ".wav":
        write_wav(path, tone(0.1))
    elif suffix == ".npy":
        write_array(path, np.zeros((4, 5)))
    else:
        write_video(path, numbered_frames(12))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(len(damaged)))
            damaged[at : at + 4] = rng.bytes(4)
        path.write_bytes(damaged[: int(rng.integers(len(damaged) // 2, len(damaged) + 1))])
        try:
            reading(path)
            outcomes.add("read")
        except MediaError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_memory_and_files_do_not_grow_over_many_opens(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(16, 96, 128))
    turned = rotate_mp4(path, tmp_path / "b.mp4", 90)
    wav = write_wav(tmp_path / "a.wav", tone(0.2))
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(path.read_bytes()[:900])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def handles() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) + len(list(Path("/proc/self/task").iterdir()))

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    before = (0, 0)
    for turn in range(600):
        read_frames(Media(path), every, dataset=DATASET)
        read_audio(Media(wav), dataset=DATASET)
        if turn % 10 == 0:
            read_frames(Media(turned), every, dataset=DATASET)
        with pytest.raises(MediaError):
            read_frames(Media(bad), every, dataset=DATASET)
        if turn == 100:
            before = (resident(), handles())
    # 500 clips decoded hold 290 MB; a leak of a twentieth of one frame per open would show.
    assert resident() - before[0] < 2_000_000
    assert handles() <= before[1]


# --- folders of frames ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "suffix"), [(1, "jpg"), (0, "png"), (1, "png")])
def test_folder_of_frames(tmp_path, first, suffix):
    frames = numbered_frames(12)
    folder = write_frames(tmp_path / "clip", frames, first=first, suffix=suffix)
    got = read_frames(Media(folder), every, dataset=DATASET)
    assert np.abs(got.astype(int) - frames).mean() < 2
    assert numbers(folder, start=4, stop=7, unit="frame") == [4, 5, 6]


def test_folder_of_one_clip_of_a_long_recording(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(6), first=1089)
    assert numbers(folder) == list(range(6))
    assert numbers(folder, start=1090, stop=1092, unit="frame") == [2, 3]


def test_missing_frames_nearest_or_reject(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(10))
    for number in (4, 5, 10):
        (folder / f"frame_{number:010d}.jpg").unlink()
    notes: list[str] = []
    media = Media(folder, start=0, stop=10, unit="frame")
    got = frame_numbers(read_frames(media, every, dataset=DATASET, notes=notes))
    assert got == [0, 1, 2, 2, 5, 5, 6, 7, 8, 8]
    assert "3 of 10 frames are missing, the first is frame_0000000004.jpg" in notes[0]
    why = cause(lambda: read_frames(media, every, dataset=REJECT))
    assert why == "3 of 10 frames are missing, the first is frame_0000000004.jpg"
    gone = Media(folder, start=30, stop=40, unit="frame")
    assert "all 10 frames are missing" in cause(lambda: read_frames(gone, every, dataset=DATASET))


def test_cut_and_damaged_jpegs(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(6))
    victim = folder / "frame_0000000003.jpg"
    victim.write_bytes(victim.read_bytes()[:-200])
    assert frame_numbers(read_frames(Media(folder), every, dataset=DATASET))[2] in (1, 3)
    assert "frame_0000000003.jpg is damaged" in cause(lambda: numbers(folder, REJECT))
    for file in folder.iterdir():
        file.write_bytes(b"")
    assert cause(lambda: numbers(folder)).startswith("4 of 6 frames are missing or damaged: frame_0000000004.jpg")


def test_folder_without_frames_or_with_seconds(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no numbered jpg" in cause(lambda: numbers(tmp_path / "empty"))
    folder = write_frames(tmp_path / "clip", numbered_frames(6))
    assert "in seconds" in cause(lambda: numbers(folder, start=0.5))


# --- the rest ------------------------------------------------------------------------------------------------------


def test_short_side_keeps_the_aspect():
    frames = np.random.default_rng(0).integers(0, 256, (2, 30, 47, 3), dtype=np.uint8)
    got = resize_short_side(frames, 20)
    assert got.shape == (2, 20, 31, 3)
    np.testing.assert_array_equal(got[1], cv2.resize(frames[1], (31, 20), interpolation=cv2.INTER_LINEAR))
    assert resize_short_side(frames, 30) is frames


def test_errors_cross_process_boundaries():
    error = pickle.loads(pickle.dumps(MediaError(Path("a/b.mp4"), "no such file", "Download it.")))
    assert (error.file, error.cause, error.remedy) == ("a/b.mp4", "no such file", "Download it.")
    assert str(error) == "a/b.mp4: no such file\nDownload it."


@needs_av_digits
def test_real_clips():
    frames = read_frames(Media(AV_DIGITS / "street/videos/street_4_40.mp4"), every, dataset=DATASET)
    assert frames.shape == (16, 64, 64, 3)
    capture = cv2.VideoCapture(str(AV_DIGITS / "street/videos/street_4_40.mp4"))
    for frame in frames:
        _, other = capture.read()
        assert np.abs(frame.astype(int) - other[..., ::-1]).mean() < 3
    capture.release()
