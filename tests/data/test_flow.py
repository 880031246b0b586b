"""Optical flow against media whose content is known: of files, folders and arrays, and computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import (
    cause,
    moving_texture,
    write_array,
    write_frames,
    write_video,
)

from mbcd_cli.data.media.flow import compute_flow, quantise_flow, read_flow
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.records import Media
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()
REJECT = DatasetSettings(missing_frames="reject")


def flow_pair(count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    u = np.stack([np.full((32, 48), 40 + 10 * t, np.uint8) for t in range(count)])
    return u, 255 - u


def test_flow_from_videos_folders_and_arrays_agree(tmp_path):
    u, v = flow_pair()
    videos = Media(write_video(tmp_path / "a_u.mp4", u), write_video(tmp_path / "a_v.mp4", v))
    folders = Media(write_frames(tmp_path / "f/u", u), write_frames(tmp_path / "f/v", v))
    array = Media(write_array(tmp_path / "a.npy", np.stack([u, v], -1)))
    for source in (videos, folders, array):
        got = read_flow(source, np.arange, dataset=DATASET)
        assert got.shape == (8, 32, 48, 2)
        assert got.dtype == np.uint8
        assert np.abs(got.astype(int) - np.stack([u, v], -1)).max() <= 5
    few = read_flow(folders, lambda count: np.array([1, 6]), dataset=DATASET)
    assert np.abs(few[:, 0, 0, 0].astype(int) - [50, 100]).max() <= 5


def test_flow_pairs_that_do_not_match(tmp_path):
    u, v = flow_pair()
    short = Media(write_video(tmp_path / "a_u.mp4", u), write_video(tmp_path / "a_v.mp4", v[:4]))
    assert "4 frames, and its other direction" in cause(lambda: read_flow(short, np.arange, dataset=DATASET))
    # A frame or two fewer: those that both have are taken, the same ones of both.
    odd, notes = Media(tmp_path / "a_u.mp4", write_video(tmp_path / "c_v.mp4", v[:6])), []
    got = read_flow(odd, np.arange, dataset=DATASET, notes=notes).astype(int)
    assert len(got) == 6
    assert np.abs(got[..., 0] + got[..., 1] - 255).max() <= 8
    assert "6 frames, and its other direction" in notes[0]
    assert "6 frames, and its other direction" in cause(lambda: read_flow(odd, np.arange, dataset=REJECT))
    small = Media(tmp_path / "a_u.mp4", write_video(tmp_path / "b_v.mp4", v[:, :16, :32]))
    assert "32x16" in cause(lambda: read_flow(small, np.arange, dataset=DATASET))
    lost = Media(tmp_path / "a_u.mp4", tmp_path / "gone_v.mp4")
    assert cause(lambda: read_flow(lost, np.arange, dataset=DATASET)) == "no such file"
    folders = Media(write_frames(tmp_path / "f/u", u), tmp_path / "f/v")
    assert "second direction" in cause(lambda: read_flow(folders, np.arange, dataset=DATASET))


def test_flow_frames_missing_in_one_direction(tmp_path):
    u, v = flow_pair()
    folders = Media(write_frames(tmp_path / "f/u", u), write_frames(tmp_path / "f/v", v))
    (tmp_path / "f/v/frame_0000000003.jpg").unlink()
    got = read_flow(folders, np.arange, dataset=DATASET).astype(int)
    assert np.abs(got[..., 0] + got[..., 1] - 255).max() <= 4  # both directions are of the same moment
    assert "1 of 8 frames are missing" in cause(lambda: read_flow(folders, np.arange, dataset=REJECT))


def test_flow_files_out_of_step_are_named(tmp_path):
    """One direction begins two frames later by its own time stamps, or lacks a frame in its middle."""
    u, v = flow_pair()
    first = write_video(tmp_path / "a_u.mp4", u)
    late = restamped(write_video(tmp_path / "b.mp4", v[2:]), tmp_path / "b_v.mkv", lambda n: n + 2)
    gap = restamped(write_video(tmp_path / "c.mp4", v[:-1]), tmp_path / "c_v.mkv", lambda n: n + (n > 3))
    shifted = restamped(write_video(tmp_path / "d.mp4", v), tmp_path / "d_v.mkv", lambda n: n + 1)
    for path, number in ((late, 0), (gap, 4), (shifted, 0)):
        for span in ({}, {"start": 0.0, "stop": 0.4}):
            why = cause(lambda media=Media(first, path, **span): read_flow(media, np.arange, dataset=DATASET))
            assert why.startswith(f"its frame {number} is shown at ")
    same = restamped(first, tmp_path / "same.mkv", lambda n: n)
    assert len(read_flow(Media(first, same), np.arange, dataset=REJECT)) == len(u)


def restamped(source: Path, target: Path, place: Callable[[int], int]) -> Path:
    """The frames of a video, the n-th of them shown at the place of another."""
    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        packets = [packet for packet in container.demux(video=0) if packet.size]
        step = packets[1].pts - packets[0].pts
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = place(number) * step
            packet.stream = stream
            out.mux(packet)
    return target


def test_flow_folders_of_which_one_lacks_its_first_frame(tmp_path):
    """The other one counts from 0: so do the spans of both."""
    u, v = flow_pair()
    folders = Media(
        write_frames(tmp_path / "f/u", u, first=0),
        write_frames(tmp_path / "f/v", v, first=0),
        start=1,
        stop=5,
        unit="frame",
    )
    whole = read_flow(folders, np.arange, dataset=REJECT)
    (tmp_path / "f/u/frame_0000000000.jpg").unlink()
    np.testing.assert_array_equal(read_flow(folders, np.arange, dataset=REJECT), whole)
    begin, notes = replace(folders, start=0), []
    assert len(read_flow(begin, np.arange, dataset=DATASET, notes=notes)) == 5
    assert "the first is frame_0000000000.jpg" in notes[0]


def test_flow_has_one_frame_fewer_than_its_span(tmp_path):
    u, v = flow_pair(7)
    media = Media(
        write_video(tmp_path / "a_u.mp4", u), write_video(tmp_path / "a_v.mp4", v), start=2, stop=8, unit="frame"
    )
    assert read_flow(media, np.arange, dataset=REJECT).shape[0] == 5


def test_flow_arrays_are_checked(tmp_path):
    floats = np.zeros((4, 8, 8, 2), np.float32)
    floats[..., 0], floats[..., 1] = 10.0, -40.0
    got = read_flow(Media(write_array(tmp_path / "f.npy", floats)), np.arange, dataset=DATASET, bound=20.0)
    assert (got[..., 0] == round(128 + 63.5)).all()
    assert (got[..., 1] == 1).all()
    floats[2, 0, 0, 0] = np.nan
    bad = Media(write_array(tmp_path / "n.npy", floats))
    assert "not finite" in cause(lambda: read_flow(bad, np.arange, dataset=DATASET))
    shape = Media(write_array(tmp_path / "s.npy", floats[0]))
    assert "shape" in cause(lambda: read_flow(shape, np.arange, dataset=DATASET))


@pytest.mark.parametrize(("dx", "dy"), [(2.0, 0.0), (-1.5, 1.0), (0.0, -3.0), (0.0, 0.0)])
def test_computed_flow_finds_known_motion(dx, dy):
    flow = compute_flow(moving_texture(4, 96, dx=dx, dy=dy), bound=8.0).astype(np.float64)
    inside = flow[:, 20:-20, 20:-20]
    pixels = (inside - 128) * 8.0 / 127
    assert flow.shape == (3, 96, 96, 2)
    assert np.abs(np.median(pixels[..., 0]) - dx) < 0.3
    assert np.abs(np.median(pixels[..., 1]) - dy) < 0.3
    assert (compute_flow(np.repeat(moving_texture(1), 2, axis=0)) == 128).all()


def test_computed_flow_of_a_video_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_texture(12, 64, dx=2.0))
    media = Media(path, computed=1)
    counts = []

    def some(count: int) -> np.ndarray:
        counts.append(count)
        return np.array([0, 5, 10])

    got = read_flow(media, some, dataset=DATASET, bound=8.0)
    assert counts == [11]
    assert got.shape == (3, 64, 64, 2)
    frames = read_frames(Media(path), np.arange, dataset=DATASET)
    np.testing.assert_array_equal(got[1], compute_flow(frames[5:7], 8.0)[0])
    assert np.abs(np.median((got[..., 0].astype(float) - 128) * 8 / 127) - 2.0) < 0.4
    assert read_flow(media, some, dataset=DATASET, short_side=32).shape == (3, 32, 32, 2)


def test_quantised_flow_range():
    values = np.array([-99.0, -20.0, -10.0, 0.0, 10.0, 20.0, 99.0])
    expected = [1, 1, round(128 - 63.5), 128, round(128 + 63.5), 255, 255]
    np.testing.assert_array_equal(quantise_flow(values, 20.0), expected)
