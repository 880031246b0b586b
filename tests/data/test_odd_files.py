"""Files that end before their segment, mirrored pictures, pipes and decimal times among frames, endless names."""

from __future__ import annotations

import os
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from conformance import numbers_of
from helpers import cause, frame_numbers, numbered_frames, tone, write_frames, write_video, write_wav
from test_whole import video

from mbcd_cli.data.media import timeline
from mbcd_cli.data.media.checks import allowed_seconds
from mbcd_cli.data.media.condition import condition
from mbcd_cli.data.media.sound import read_audio, stored_rate
from mbcd_cli.data.media.timeline import beginning
from mbcd_cli.data.media.video import _upright, read_frames, timeline_of
from mbcd_cli.data.readers.csv_table import path_fault
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()
STRICT = DatasetSettings(missing_frames="reject", min_frames=1)


def every(count: int) -> np.ndarray:
    return np.arange(count)


def test_a_matroska_file_that_ends_before_its_segment_is_cut_short(tmp_path):
    data = write_video(tmp_path / "a.mkv", numbered_frames(24)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: int(len(data) * 0.97)])
    with pytest.raises(MediaError, match="cut short"):
        timeline_of(tmp_path / "cut.mkv")


@pytest.mark.parametrize(
    ("matrix", "turned"), [((-1, 0, 0, 1), np.fliplr), ((1, 0, 0, -1), np.flipud), ((0, 1, 1, 0), np.transpose)]
)
def test_mirrored_matrices(matrix, turned):
    image = np.arange(6).reshape(2, 3)
    got = _upright(image[None, ..., None], *matrix)[0, ..., 0]
    np.testing.assert_array_equal(got, turned(image))


def test_a_pipe_among_frames_is_a_missing_frame(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(10))
    victim = folder / "frame_0000000004.jpg"
    victim.unlink()
    os.mkfifo(victim)
    assert len(read_frames(Media(folder), every, dataset=DATASET)) == 10


def test_decimal_times_behind_a_prefix_are_no_numbers(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered_frames(4))
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"t_0.1{number}.jpg")
    with pytest.raises(MediaError, match="t_0"):
        read_frames(Media(folder), every, dataset=DATASET)


def test_a_deadline_has_time_for_bytes_and_pixels(tmp_path, monkeypatch):
    path, clock, told = tmp_path / "a.mp4", SimpleNamespace(now=0.0), []
    path.write_bytes(bytes(2_000_000))
    monkeypatch.setattr(timeline.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(timeline.Deadline, "told", told.append)
    assert allowed_seconds(path) == 32
    for pixels, seconds in ((0, 32), (640 * 480 * 1000, 32 + 30.72)):
        clock.now = 0.0
        deadline = timeline.Deadline(path, pixels=pixels)
        clock.now = seconds - 0.1
        deadline.check()
        clock.now = seconds + 0.1
        with pytest.raises(MediaError, match=f"did not finish within {seconds:.0f} s"):
            deadline.check()
    assert told == [pytest.approx(62.72)]


def test_a_time_stamp_said_twice_belongs_to_two_frames(tmp_path):
    """Those after it keep their own times."""
    path = video(tmp_path / "a.avi", 100)
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.pts = packet.dts = 4 if number == 5 else number + 50 * (number > 50)
            packet.stream = stream
            target.mux(packet)
    assert timeline_of(tmp_path / "b.mkv").starts[[4, 5, 6, 51]] == pytest.approx([0.16, 0.16, 0.24, 4.04], abs=1e-3)
    for span, expected in (
        ({}, range(100)),
        ((0.4, 0.8), range(10, 20)),
        ((0.16, 0.28), (4, 5, 6)),
        ((4.4, 4.8), range(60, 70)),
    ):
        media = Media(tmp_path / "b.mkv", *([None, *span] if span else []))
        assert numbers_of(read_frames(media, every, dataset=STRICT)) == list(expected)


def test_loops_of_links_are_said(tmp_path):
    """A link to itself, two that lead to each other, and one on the way: of a video, a sound, a folder of frames."""
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    (tmp_path / "a.wav").symlink_to("b.wav")
    (tmp_path / "b.wav").symlink_to("a.wav")
    (tmp_path / "round").symlink_to("round")
    for path in (tmp_path / "self.mp4", tmp_path / "a.wav", tmp_path / "round", tmp_path / "round/a.mp4"):
        for read in (partial(read_frames, choose=every), read_audio):
            with pytest.raises(MediaError, match="symbolic links"):
                read(Media(path), dataset=DATASET)
        assert condition(Media(path))


@pytest.mark.parametrize("name", ["-", "http:/127.0.0.1:9/a.mp4", "concat:a|b.mp4", "%03d.mp4", "pipe:0"])
def test_a_name_is_a_file_whatever_else_it_would_be_to_a_decoder(tmp_path, monkeypatch, name):
    """Standard input, an address, several files, a pattern, a pipe."""
    monkeypatch.chdir(tmp_path)
    sound, picture = write_wav(Path("a.wav"), tone()), write_video(Path("a.mp4"), numbered_frames(4))
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    sound.rename(path)
    assert len(read_audio(Media(path), dataset=DATASET)[0]) == 4000
    assert stored_rate(path) == 8000
    picture.rename(path)
    assert len(read_frames(Media(path), every, dataset=DATASET)) == 4


@pytest.mark.parametrize(
    "head", ["#EXTM3U\n", "ffconcat version 1.0\n", "\ufeff\n<?xml version='1.0'?><MPD>", "[playlist]\n"]
)
def test_lists_of_other_files_are_none_of_media(tmp_path, head):
    (tmp_path / "secret.wav").write_bytes(write_wav(tmp_path / "a.wav", tone()).read_bytes())
    (tmp_path / "list.avi").write_text(f"{head}file:secret.wav\n", encoding="utf-8")
    for read in (partial(read_frames, choose=every), read_audio):
        with pytest.raises(MediaError, match="a list of other files"):
            read(Media(tmp_path / "list.avi"), dataset=DATASET)


def test_endless_names_are_bad_lines():
    assert path_fault("a" * 300)
    assert not path_fault("videos/a.mp4")


@pytest.mark.parametrize(
    ("starts", "zero"), [((0.0, 1.5), 0.0), ((1.4, 1.5), 1.4), ((-0.02, 0.0), 0.0), ((-4.3, -4.2), -4.3)]
)
def test_where_a_file_begins(starts, zero):
    """With its earliest stream; an encoder's run-in does not count, a clock that wrapped does."""
    video, audio = (SimpleNamespace(start_time=round(at * 1000), time_base=Fraction(1, 1000)) for at in starts)
    container = SimpleNamespace(streams=SimpleNamespace(video=(video,), audio=(audio,)))
    assert beginning(container) == pytest.approx(zero)


def seen(path: Path, **span) -> list[int]:
    return frame_numbers(read_frames(Media(path, **span), every, dataset=DATASET))


@pytest.mark.parametrize("span", [{"start": 12, "stop": 20, "unit": "frame"}, {"start": 0.75, "stop": 1.25}])
def test_more_than_half_past_the_end_is_rejected(tmp_path, span):
    path = write_video(tmp_path / "a.mp4", numbered_frames(16))
    frame = 1 if "unit" in span else 1 / 16
    assert seen(path, **span) == [12, 13, 14, 15]
    beyond = span | {"stop": span["stop"] + frame}
    assert "5 of the clip's 9 frames lie after the video's end" in cause(lambda: seen(path, **beyond))


def test_a_clip_s_own_file_with_less_than_half_of_its_frames_is_rejected(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(16))
    assert seen(path, frames=32) == list(range(16))
    assert cause(lambda: seen(path, frames=33)) == "16 frames where the annotation gives 33"


@pytest.mark.parametrize("progressive", [False, True])
def test_bytes_behind_the_end_of_a_jpg_are_none_of_it(tmp_path, progressive):
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(numbered_frames(6)):
        flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive), cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
        data = cv2.imencode(".jpg", frame[..., ::-1], flags)[1].tobytes()
        behind = (b"", data, data[:-40], b"\xff\xda", b"\xff\xd9\xff\xda\0", b"\0" * 9)[number]
        (tmp_path / f"clip/{number}.jpg").write_bytes(data + behind)
    assert seen(tmp_path / "clip") == list(range(6))
    (tmp_path / "clip/3.jpg").write_bytes(data[:-40])
    assert seen(tmp_path / "clip") == [0, 1, 2, 2, 4, 5]
    (tmp_path / "clip/3.jpg").write_bytes(data[:-2])  # the mark of its end alone
    assert seen(tmp_path / "clip") == [0, 1, 2, 2, 4, 5]


def test_a_frame_belongs_to_the_span_that_holds_its_middle(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(16))
    assert seen(path, start=3.4 / 16, stop=8.6 / 16) == [3, 4, 5, 6, 7, 8]
    assert seen(path, start=3.6 / 16, stop=8.4 / 16) == [4, 5, 6, 7]
