"""Files that end before their segment, mirrored pictures, pipes and decimal times among frames, endless names."""

from __future__ import annotations

import os
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import numbered_frames, write_frames, write_video

from mbcd_cli.data.media.timeline import beginning
from mbcd_cli.data.media.video import _upright, read_frames, timeline_of
from mbcd_cli.data.readers.csv_table import path_fault
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()


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
