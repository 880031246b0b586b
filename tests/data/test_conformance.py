"""Frames that carry their number: what is read is what a sequential decoding shows (more of it in tests/stress)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import conformance
import numpy as np
import pytest
from conformance import FFMPEG, STRICT, Coding, differences, encode, every, numbers_of, shown
from kinds import CODINGS, cuts

from mbcd_cli.data.media import timeline
from mbcd_cli.data.media.flow import read_flow
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.records import Media

KINDS = [
    *[("h264", suffix) for suffix in (".mp4", ".mkv", ".avi", ".flv", ".ts", ".h264")],
    *[("h264 open", suffix) for suffix in (".mp4", ".mkv")],
    *[("h264 field", ".mp4"), ("h264 field", ".ts"), ("h264 refresh", ".mkv"), ("h264 uneven", ".mov")],
    *[("hevc", ".mp4"), ("hevc open", ".mkv"), ("hevc closed", ".ts"), ("vp8 hidden", ".webm"), ("vp9 hidden", ".mkv")],
    *[("mpeg4 b", ".mp4"), ("mpeg4 b", ".avi"), ("mpeg2 b", ".mpg"), ("mpeg2 field", ".ts"), ("mpeg1", ".mpg")],
    *[("wmv2", ".wmv"), ("mjpeg", ".mov"), ("ffv1", ".mkv"), ("theora", ".ogv"), ("gif", ".gif"), ("flv1", ".flv")],
]


@pytest.fixture(autouse=True)
def no_open_recordings():
    """Recordings that one test left open are not the next one's."""
    yield
    conformance.close_recordings()


def made(folder: Path, name: str, suffix: str, **changes: object) -> Path:
    path = encode(folder / f"{name.replace(' ', '-')}{suffix}", replace(CODINGS[name], **changes))
    if path is None:
        pytest.skip(f"no {name} in {suffix} can be made here")
    return path


@pytest.mark.parametrize(("name", "suffix"), KINDS)
def test_frames_are_those_of_a_sequential_read(tmp_path, monkeypatch, name, suffix):
    path = made(tmp_path, name, suffix)
    truth = shown(path)
    assert set(truth.numbers) <= set(CODINGS[name].pictures())
    assert len(truth.numbers) > 0.8 * len(CODINGS[name].pictures())
    assert differences(path, truth) == []
    # A recording too long to be held in memory is sought in.
    conformance.close_recordings()
    monkeypatch.setattr(timeline, "_HELD_BYTES", 0)
    assert differences(path, truth, seed=1) == []


@pytest.mark.skipif(not FFMPEG, reason="the ffmpeg command is not installed")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_seconds_are_the_file_s_own(tmp_path, suffix):
    """Whichever of picture and sound begins first, second t of a clip is second t of the file."""
    picture = made(tmp_path, "h264 no b", ".mp4")
    tone = ["-f", "lavfi", "-i", "sine=440:d=4", "-map", "0:v", "-map", "1:a", "-c:v", "copy"]
    late = conformance.rewrap(tmp_path / f"late{suffix}", "-itsoffset", 1, "-i", picture, *tone)
    early = conformance.rewrap(tmp_path / f"early{suffix}", "-i", picture, "-itsoffset", 1, *tone)
    for path, begin in ((late, 1), (early, 0)):
        got = read_frames(Media(path, start=begin + 0.4, stop=begin + 1.2), every, dataset=STRICT)
        assert numbers_of(got) == list(range(10, 30))


@pytest.mark.skipif(not FFMPEG, reason="the ffmpeg command is not installed")
@pytest.mark.parametrize("name", ["h264 closed", "hevc open"])
def test_lossless_cuts(tmp_path, name):
    source = made(tmp_path, name, ".mp4")
    paths = cuts(tmp_path / "cuts", source, 1.92, [".mp4"])
    assert len(paths) > 8
    # Which frames at a cut's ends can be decoded differs between FFmpeg's versions: PyAV's own decides.
    truth = {path: conformance.shown_by_pyav(path) for path in paths.values()}
    assert [line for path in truth for line in differences(path, truth[path])] == []


def coloured(number: int, width: int, height: int) -> np.ndarray:
    """[H, W, 3]: a number over colours that go from edge to edge."""
    image = np.repeat(conformance.picture_of(number, width, height)[..., None], 3, axis=-1).astype(np.float64)
    image[..., 0] *= np.linspace(0.6, 1.1, width)
    image[..., 2] *= np.linspace(1.1, 0.5, height)[:, None]
    return np.clip(image + 10, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p"])
def test_levels_are_those_of_a_plain_read(tmp_path, pixels):
    coding = Coding("libx264", {"bf": 2}, pixels=pixels, frames=8, size=(66, 50), draw=coloured)
    path = encode(tmp_path / "a.mp4", coding)
    got = read_frames(Media(path), every, dataset=STRICT)
    np.testing.assert_array_equal(got, conformance.shown_by_pyav(path, rgb=True).pictures)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm", ".ts", ".mpg"])
def test_both_directions_of_a_flow_and_the_picture_stay_in_step(tmp_path, suffix):
    name = {".webm": "vp9", ".mpg": "mpeg2 b", ".avi": "mpeg4 b"}.get(suffix, "h264 open")
    picture = made(tmp_path, name, suffix)
    u, v = (made(tmp_path, name, f"-{side}{suffix}", draw=shifted(shift)) for side, shift in (("u", 100), ("v", 200)))
    for start, stop in ((20, 33), (3, 17), (0, 48)):
        span = {"start": start / 25, "stop": stop / 25}
        flow = read_flow(Media(u, path_v=v, **span), every, dataset=STRICT)
        numbers = numbers_of(read_frames(Media(picture, **span), every, dataset=STRICT))
        assert numbers == list(range(start, stop))
        assert numbers_of(flow[..., 0]) == [number + 100 for number in numbers]
        assert numbers_of(flow[..., 1]) == [number + 200 for number in numbers]


def shifted(shift: int):
    """A picture whose number is greater by `shift`."""
    return lambda number, width, height: conformance.picture_of(number + shift, width, height)
