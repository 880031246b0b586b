"""Frames of video files: those that the file presents, each found by its presentation time.

Letters: N frames chosen, H W pixels. A `choose` function is given the number of frames of the clip and returns the
zero-based indices wanted; only those are converted, but the whole span is decoded, so that damage is found out.
"""

from __future__ import annotations

import itertools
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from mbcd_cli.data.media.checks import (
    REENCODE,
    Choose,
    Notes,
    check_enough,
    chosen_indices,
    file_version,
    is_folder,
    span_in_frames,
    tolerate,
    tolerate_missing,
)
from mbcd_cli.data.media.folders import read_folder
from mbcd_cli.data.media.kept import Kept
from mbcd_cli.data.media.timeline import Packets, Timeline, decoded_frames, open_container
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

# Share of a video's frames that may be replaced by a neighbour under `dataset.missing_frames=nearest`.
_TOLERATED = 0.1
_FEWER = 3  # frames by which cutting a clip out of a recording may miss the annotation
Pick = Callable[[Timeline], tuple[np.ndarray, int]]
"""A file's timeline -> (numbers of the frames wanted, number of the last frame that has to be there)."""


class _UnprovenError(Exception):
    """The packets promised other frames than the decoder gives."""


class Video:
    """One video file, open: its timeline, and frames by number.

    Args:
        path: the file.

    Attributes:
        timeline: the frames that the file presents; told by decoding all of it where its packets cannot be trusted.

    Raises:
        MediaError: missing, empty, not a video, cut short, or with two pictures of equal standing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._frames: Iterator[av.VideoFrame | None] | None = None
        self._next = 0
        self._fresh = True  # its decoder has seen nothing yet
        self._open()
        try:
            self._packets = Packets(path, self._container)
            self._stream = self._packets.stream
            self._index = self._stream.index
            self.timeline = self._packets.timeline() if self._packets.tell else self._packets.decode(self._all())
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._container = open_container(self.path)
        for stream in self._container.streams.video:
            if stream.codec_context is not None:
                stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"

    def close(self) -> None:
        """Closes the file."""
        self._frames = None
        self._container.close()

    def read(self, pick: Pick, *, dataset: DatasetSettings, notes: Notes = None) -> np.ndarray:
        """The frames that `pick` chooses, [..., H, W, 3] uint8, RGB, turned upright.

        Args:
            pick: asked again where the packets turn out to have promised too much.
            dataset: `missing_frames`.
            notes: collects what was mended, if given.

        Raises:
            MediaError: frames are damaged, more than may be replaced by others.
        """
        if not (self.timeline.in_order or self.timeline.faults or self.timeline.lost):
            numbers, last = pick(self.timeline)
            try:
                return self._collect(numbers, self._from_key(int(numbers.min()), last), proven=False)
            except _UnprovenError:
                self.timeline = self._packets.decode(self._all())
        self._tolerate_faults(dataset, notes)
        numbers, last = pick(self.timeline)
        if self.timeline.in_order:
            return self._collect(numbers, self._forward(int(numbers.min())))
        whole = np.flatnonzero(~np.isin(self.timeline.stamps, self.timeline.lost))
        nearest = whole[np.abs(whole - numbers[..., None]).argmin(axis=-1)]
        return self._collect(nearest, self._told_by_time())

    def _tolerate_faults(self, dataset: DatasetSettings, notes: Notes) -> None:
        bad = max(self.timeline.faults, len(self.timeline.lost))
        if not bad:
            return
        total = len(self.timeline) + (0 if self.timeline.lost else bad)
        cause = f"{bad} of its {total} frames cannot be decoded: the data are damaged"
        if bad > _TOLERATED * total:
            raise MediaError(self.path, cause, REENCODE)
        tolerate(self.path, cause, dataset, notes)

    def _collect(
        self, numbers: np.ndarray, frames: Iterator[tuple[int, av.VideoFrame]], *, proven: bool = True
    ) -> np.ndarray:
        """(number, frame) of what is decoded -> the frames wanted; decodes to the end of `frames`."""
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers.ravel().tolist()):
            places.setdefault(number, []).append(place)
        reformatter, matrix = VideoReformatter(), None
        out: np.ndarray | None = None
        for number, frame in frames:
            if number not in places:
                continue
            if not proven and frame.is_corrupt:
                raise _UnprovenError
            size = {} if out is None else {"width": out.shape[2], "height": out.shape[1]}
            image = reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1, **size)
            if out is None:
                out, matrix = np.empty((numbers.size, image.height, image.width, 3), np.uint8), _matrix(frame)
            plane = image.planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: image.height, : 3 * image.width]
            for place in places.pop(number):
                out[place] = rows.reshape(out.shape[1:])
            if proven and not places:
                break
        if places or out is None:
            raise MediaError(self.path, "some of its frames cannot be decoded", REENCODE)
        out = out if matrix is None else _upright(out, *matrix)
        return out.reshape(*numbers.shape, *out.shape[1:])

    # --- decoding, from one place or another ---------------------------------------------------------------------

    def _all(self) -> Iterator[av.VideoFrame | None]:
        """Every frame, from the file's beginning."""
        self._frames = None
        if self._fresh and self._packets.held is not None:
            self._fresh = False
            return decoded_frames(self.path, self._stream, iter(self._packets.held), self._packets.count)
        # Opened anew: not every format can be sought back to its first packet, and a decoder that was flushed still
        # knows how far pictures are reordered, and may give one more or less than it did at first.
        self._container.close()
        self._packets.held = None
        self._open()
        self._stream = next(s for s in self._container.streams.video if s.index == self._index)
        return decoded_frames(self.path, self._stream, self._container.demux(self._stream), self._packets.count)

    def _told_by_time(self) -> Iterator[tuple[int, av.VideoFrame]]:
        number = {stamp: index for index, stamp in enumerate(self.timeline.stamps.tolist())}
        for frame in self._all():
            if frame is not None and frame.pts in number:
                yield number[frame.pts], frame

    def _forward(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames in the order of a sequential read, from where the last one ended if that is before `first`."""
        if self._frames is None or self._next > first:
            self._frames, self._next = self._all(), 0
        for frame in self._frames:
            if frame is not None:
                self._next += 1
                yield self._next - 1, frame
        self._frames = None

    def _from_key(self, first: int, last: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames `first` to `last`, each of them, decoded from a key frame before them.

        Raises:
            _UnprovenError: others come, or not all.
        """
        expected = self.timeline.stamps[first : last + 1].tolist()
        number = first
        for frame in decoded_frames(self.path, self._stream, self._packets_from(expected[0]), self._packets.count):
            if frame is None or frame.pts is None:
                raise _UnprovenError
            if frame.pts < expected[0]:
                continue
            if frame.pts != expected[number - first]:
                raise _UnprovenError
            yield number, frame
            number += 1
            if number > last:
                return
        raise _UnprovenError

    def _packets_from(self, stamp: int) -> Iterator[av.Packet]:
        """Packets from the last key frame on that is shown at `stamp` or before, and promises what follows it."""
        keys = self._packets.keys
        place = bisect_right([key for key, _ in keys], stamp) - 1
        if place > 0 and not keys[place][1]:
            place -= 1  # a picture that pictures before it may still lean on: one group more has them all
        key = keys[max(place, 0)][0]
        self._fresh = False
        self._stream.codec_context.flush_buffers()
        held = self._packets.held
        if held is not None:
            return itertools.islice(held, next(i for i, p in enumerate(held) if p.pts == key), None)
        self._container.seek(key, stream=self._stream, backward=True)
        packets = self._container.demux(self._stream)
        head = next(packets)
        if head.pts is None or head.pts > key or not head.is_keyframe:
            raise _UnprovenError
        return itertools.chain([head], packets)


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """a, b, c, d of the display matrix: (x, y) of the frame is shown at (a x + c y, b x + d y); None without one."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    return a, b, c, d


def _upright(frames: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Frames [N, H, W, 3] turned by quarters and mirrored as their display matrix says, [N, H or W, W or H, 3]."""
    if abs(b) > abs(a):
        frames, down, right = frames.swapaxes(1, 2), b, c
    else:
        down, right = d, a
    return frames[:, :: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


# --- clips of files --------------------------------------------------------------------------------------------------

_recordings = Kept(Video, limit=2)  # both directions of a flow


def read_frames(
    media: Media,
    choose: Choose,
    *,
    dataset: DatasetSettings,
    notes: Notes = None,
    slack: int = 0,
    told: Callable[[Timeline], object] | None = None,
) -> np.ndarray:
    """Chosen frames of a video file or of a folder of frames, turned upright.

    Args:
        media: file or folder, and the span inside it.
        choose: (frames in the span) -> indices wanted, [N], or [N, 2] where each is wanted with a later one.
        dataset: `min_frames` and `missing_frames`.
        notes: collects what was mended (missing frames), if given.
        slack: frames that the span may reach past the end without a word (flow has one fewer than its video).
        told: is given the file's timeline.

    Returns:
        [N, H, W, 3] or [N, 2, H, W, 3] uint8, RGB. The indices of [N] are taken ascending, each once.

    Raises:
        MediaError: missing, empty, not a video, cut short, damaged, too few frames.
    """
    if is_folder(media.path):
        return read_folder(media, choose, dataset=dataset, notes=notes)
    mended: list[str] = []

    def pick(timeline: Timeline) -> tuple[np.ndarray, int]:
        mended.clear()
        if told is not None:
            told(timeline)
        first, last = _span(media, timeline, dataset=dataset, notes=mended, slack=slack)
        if _has_own_rate(media, timeline):
            numbers = _at_rate(media, media.rate, choose, timeline)
        else:
            numbers = first + chosen_indices(choose, last - first)
        if numbers.ndim == 2:  # at another rate a frame and the one after it may be the same frame of the file
            numbers[:, 1] = np.minimum(np.maximum(numbers[:, 1], numbers[:, 0] + 1), len(timeline) - 1)
        return numbers, max(int(numbers.max()), last - 1)

    with _recordings.lent(media) as video:
        frames = video.read(pick, dataset=dataset, notes=notes)
    if notes is not None:
        notes += mended
    return frames


def _has_own_rate(media: Media, timeline: Timeline) -> bool:
    """Whether a clip's frames are those at `media.rate`, whatever the file's own rate is.

    Of a file that holds one clip, where it is as long as its annotation says and has not as many frames.
    """
    if media.rate is None or media.unit != "s" or media.frames is None:
        return media.rate is not None and media.unit == "s"
    apart = abs(timeline.end - float(timeline.starts[0]) - media.frames / media.rate)
    return abs(len(timeline) - media.frames) > _FEWER and apart <= _FEWER * max(timeline.step, 1 / media.rate)


def _at_rate(media: Media, rate: float, choose: Choose, timeline: Timeline) -> np.ndarray:
    """Native frames shown at the chosen moments of a clip whose frames are counted at `rate` per second."""
    begin = media.start or 0.0
    end = min(media.stop if media.stop is not None else np.inf, timeline.end)
    return timeline.at(begin + chosen_indices(choose, max(round((end - begin) * rate), 1)) / rate)


def _span(media: Media, timeline: Timeline, *, dataset: DatasetSettings, notes: Notes, slack: int) -> tuple[int, int]:
    """First frame and end (exclusive) of a clip's span in its file."""
    total, start, stop = len(timeline), media.start, media.stop
    if media.frames is not None and total < media.frames - _FEWER and not _has_own_rate(media, timeline):
        cause = f"{total} frames where the annotation gives {media.frames}"
        missing = media.frames - total
        used = "the frames that are there"
        tolerate_missing(media.path, missing, media.frames, cause, dataset, notes, used=used)
    if media.unit == "frame" or (start is None and stop is None):
        return span_in_frames(media, total, dataset=dataset, notes=notes, slack=slack)
    if timeline.rateless:
        raise MediaError(
            media.path,
            "a bare stream has no times, and the clip's span is in seconds",
            "Give the span in frames, or put the stream into a container: ffmpeg -r RATE -i IN -c copy OUT.mp4.",
        )
    step, begins = timeline.step, float(timeline.starts[0])
    first, last = timeline.within(start, stop)
    if first >= total:
        raise MediaError(
            media.path,
            f"the clip begins at {start:g} s, after the end of the video ({total} frames)",
            "Correct the clip's start, or use a video of the annotated frame rate.",
        )
    if last <= 0:
        cause = f"the clip ends at {stop:g} s, before the first frame of the video ({begins:.2f} s)"
        raise MediaError(media.path, cause, "Correct the clip's start and stop.")
    # A time stamp may round to a tenth of a frame before or after what is there.
    early = 0 if start is None else max(int((begins - start) / step + 0.1), 0)
    late = 0 if stop is None else max(int((stop - timeline.end) / step + 0.1) - slack, 0)
    length = last - first + early + late
    if early:
        cause = f"{early} of the clip's {length} frames lie before the video's first frame ({begins:.2f} s)"
        tolerate_missing(media.path, early + late, length, cause, dataset, notes)
    if late:
        cause = f"{late} of the clip's {length} frames lie after the video's end ({total} frames)"
        tolerate_missing(media.path, early + late, length, cause, dataset, notes)
    check_enough(media, last - first, dataset)
    return first, last


@lru_cache(maxsize=256)
def _timeline(version: tuple) -> Timeline:
    video = Video(version[0])
    video.close()
    return video.timeline


def timeline_of(path: Path) -> Timeline:
    """The frames that a video file presents, and when.

    Raises:
        MediaError: missing, not a video, cut short, damaged.
    """
    return _timeline(file_version(path))


def stated_rate(path: Path) -> float | None:
    """Frames per second that a video file's header states; None where it cannot be told."""
    try:
        with open_container(path) as container:
            return next((float(stream.average_rate) for stream in container.streams.video if stream.average_rate), None)
    except (MediaError, OSError):
        return None


def frame_times(media: Media) -> tuple[float | None, float | None]:
    """A clip's span in seconds, told by the frame times of the video `media.clock`."""
    if media.clock is not None and media.rate is not None and is_folder(media.clock):
        start, stop = (None if frame is None else frame / media.rate for frame in (media.start, media.stop))
        return start, stop
    if media.clock is None or is_folder(media.clock):
        raise MediaError(
            media.path,
            "its span is in frames, and no video tells their times",
            "Give start and stop in seconds, a video file beside the sound, or the rate of its frames (column `fps`).",
        )
    timeline = timeline_of(media.clock)

    def at(frame: float | None) -> float | None:
        if frame is None:
            return None
        beyond = int(frame) - len(timeline)
        return float(timeline.starts[int(frame)]) if beyond < 0 else timeline.end + beyond * timeline.step

    return at(media.start), at(media.stop)


def resize_short_side(frames: np.ndarray, short_side: int, how: Literal["linear", "cubic"] = "linear") -> np.ndarray:
    """[N, H, W, C] -> the same with a short side of `short_side` pixels (OpenCV), aspect kept."""
    height, width = frames.shape[1:3]
    scale = short_side / min(height, width)
    size = (max(int(width * scale + 0.5), short_side), max(int(height * scale + 0.5), short_side))
    if size == (width, height):
        return frames
    interpolation = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}[how]
    return np.stack([cv2.resize(frame, size, interpolation=interpolation) for frame in frames])
