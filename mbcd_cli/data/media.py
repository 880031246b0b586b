"""Decoding video files (decord) and folders of frames (OpenCV) into arrays.

Letters: N frames chosen, H W pixels. A `choose` function is given the number of frames of the clip and returns the
zero-based indices wanted, ascending; only those are converted, but the whole span is decoded, so that a file that
ends early is found out.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path

os.environ.setdefault("DECORD_EOF_RETRY_MAX", "128")  # the default of 10240 looks like a hang

import cv2
import decord
import numpy as np

from mbcd_cli.data.containers import REENCODE, REPLACE, Movie, inspect_movie
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

decord.logging.set_level(decord.logging.QUIET)

Choose = Callable[[int], np.ndarray]
Notes = list[str] | None

_DECORD_ERRORS = (decord.DECORDError, decord.DECORDLimitReachedError)
# Share of a video's frames that decord may replace by a neighbour under `dataset.missing_frames=nearest`.
_TOLERATED = 0.1
_NO_DECODER = "-1128613112"  # FFmpeg's AVERROR_DECODER_NOT_FOUND in decord's message
_HALF_MILLISECOND = 5e-4  # mkv rounds its time stamps to milliseconds


def read_frames(
    media: Media, choose: Choose, *, dataset: DatasetSettings, notes: Notes = None, slack: int = 0
) -> np.ndarray:
    """Chosen frames of a video file or of a folder of frames, turned upright.

    Args:
        media: file or folder, and the span inside it.
        choose: (frames in the span) -> ascending indices wanted.
        dataset: `min_frames` and `missing_frames`.
        notes: collects what was mended (missing frames), if given.
        slack: frames that the span may reach past the end without a word (flow has one fewer than its video).

    Returns:
        [N, H, W, 3] uint8, RGB.

    Raises:
        MediaError: missing, empty, not a video, cut short, damaged, too few frames.
    """
    if media.path.is_dir():
        return read_folder(media, choose, dataset=dataset, notes=notes)
    movie = inspect_movie(media.path)
    # decord 0.6 mixes up the rows of frames turned by 90 degrees, and repeats frames where an edit list hides some.
    if not (movie.rotated or movie.trimmed):
        try:
            return _read_with_decord(media, choose, movie, dataset=dataset, notes=notes, slack=slack)
        except _DECORD_ERRORS as error:
            # Rows padded in memory (very narrow frames), and codecs newer than decord's own FFmpeg.
            if not any(sign in str(error) for sign in ("from_size == to_size", _NO_DECODER)):
                raise _damaged(media.path, str(error), movie) from None
    return _read_with_opencv(media, choose, movie, dataset=dataset, notes=notes, slack=slack)


def _damaged(path: Path, text: str, movie: Movie) -> MediaError:
    if "cannot find video stream" in text:
        return MediaError(path, "it has no video stream", "Name a file with a picture, or leave the clip out.")
    if "received more than" in text:
        return MediaError(path, "some of its frames cannot be decoded", REENCODE)
    claims = f" (it claims {movie.frames})" if movie.frames else ""
    return MediaError(path, f"not all of its frames can be decoded{claims}: the data are damaged", REENCODE)


def _open_decord(path: Path, dataset: DatasetSettings) -> decord.VideoReader:
    # decord reports frames that it replaced by their neighbours only when a tolerance above 0 is passed.
    tolerance = _TOLERATED if dataset.missing_frames == "nearest" else 1e-9
    try:
        return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=tolerance)
    except _DECORD_ERRORS:
        raise
    except (RuntimeError, AssertionError):
        raise MediaError(path, "not a video file that can be opened", REENCODE) from None


def _read_with_decord(
    media: Media, choose: Choose, movie: Movie, *, dataset: DatasetSettings, notes: Notes, slack: int
) -> np.ndarray:
    opened = _opened(media, dataset)
    try:
        total = len(opened.reader)
        if movie.frames and total < movie.frames:
            cause = f"cut short: it claims {movie.frames} frames, and {total} are there"
            raise MediaError(media.path, cause, REPLACE)
        first, last = frame_span(media, total, lambda: opened.starts, dataset=dataset, notes=notes, slack=slack)
        if media.rate is not None and media.unit == "s":
            indices = _at_rate(media, media.rate, choose, opened.starts[:last])
        else:
            indices = first + chosen_indices(choose, last - first)
        # The last frame of the span is always decoded: a file that ends early must not pass.
        return opened.reader.get_batch([*indices.tolist(), last - 1]).asnumpy()[:-1]
    except BaseException:
        _kept.last = None  # what a reader that failed gives next is nobody's promise
        raise


class _Opened:
    """A decord reader, what it was opened for, and the start times of its frames, told once."""

    def __init__(self, key: tuple, reader: decord.VideoReader) -> None:
        self.key, self.reader = key, reader

    @cached_property
    def starts(self) -> np.ndarray:
        return _start_times(self.reader)


_kept = threading.local()
"""`last`: the one reader that a thread keeps open, of the recording its latest clip was cut from."""


def _opened(media: Media, dataset: DatasetSettings) -> _Opened:
    """A reader of the clip's file: indexing an hour of video takes seconds, so its clips share one.

    A file that is one clip is closed when its frames are read.
    """
    if media.start is None and media.stop is None:
        return _Opened((), _open_decord(media.path, dataset))
    stat = media.path.stat()
    key = (media.path, stat.st_mtime_ns, stat.st_size, stat.st_ino, dataset.missing_frames)
    last = getattr(_kept, "last", None)
    if last is None or last.key != key:
        _kept.last = None  # closed before the next is opened
        last = _kept.last = _Opened(key, _open_decord(media.path, dataset))
    return last


def _at_rate(media: Media, rate: float, choose: Choose, starts: np.ndarray) -> np.ndarray:
    """Native frames shown at the chosen moments of a clip whose frames are counted at `rate` per second."""
    begin = media.start or 0.0
    step = float(np.median(np.diff(starts))) if len(starts) > 1 else 1.0 / rate
    end = min(media.stop if media.stop is not None else np.inf, float(starts[-1]) + step)
    moments = begin + chosen_indices(choose, max(round((end - begin) * rate), 1)) / rate
    return np.clip(np.searchsorted(starts, moments + _HALF_MILLISECOND, side="right") - 1, 0, len(starts) - 1)


def count_frames(path: Path, *, dataset: DatasetSettings) -> int:
    """Frames of a video file, as `read_frames` counts them.

    Raises:
        MediaError: missing, not a video, damaged.
    """
    movie = inspect_movie(path)
    if movie.rotated and movie.frames:
        return movie.frames
    try:
        return len(_open_decord(path, dataset))
    except _DECORD_ERRORS as error:
        raise _damaged(path, str(error), movie) from None


def _start_times(reader: decord.VideoReader) -> np.ndarray:
    times = np.sort(reader.get_frame_timestamp(range(len(reader)))[:, 0])
    return times - times[0]


def _read_with_opencv(
    media: Media, choose: Choose, movie: Movie, *, dataset: DatasetSettings, notes: Notes, slack: int
) -> np.ndarray:
    total = movie.frames or _count_with_opencv(media.path)
    with _capture(media.path) as capture:
        rate = capture.get(cv2.CAP_PROP_FPS) or 1.0
        times = movie.times if movie.times is not None else np.arange(total) / rate
        first, last = frame_span(media, total, lambda: times, dataset=dataset, notes=notes, slack=slack)
        if media.rate is not None and media.unit == "s":
            indices = _at_rate(media, media.rate, choose, times[:last])
        else:
            indices = first + chosen_indices(choose, last - first)
        wanted = set(indices.tolist())
        kept: dict[int, np.ndarray] = {}
        for index in range(last):
            if not capture.grab():
                cause = f"cut short: it claims {total} frames, and {index} can be decoded"
                raise MediaError(media.path, cause, REPLACE)
            if index in wanted:
                _, frame = capture.retrieve()
                kept[index] = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    return np.stack([kept[index] for index in indices.tolist()])  # a slow recording shows a frame more than once


@contextmanager
def _capture(path: Path) -> Iterator[cv2.VideoCapture]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise MediaError(path, "not a video file that can be opened", REENCODE)
        yield capture
    finally:
        capture.release()


def _count_with_opencv(path: Path) -> int:
    with _capture(path) as capture:
        count = 0
        while capture.grab():
            count += 1
    return count


def chosen_indices(choose: Choose, count: int) -> np.ndarray:
    return np.unique(np.asarray(choose(count), dtype=np.int64))


def frame_span(
    media: Media,
    total: int,
    times: Callable[[], np.ndarray],
    *,
    dataset: DatasetSettings,
    notes: Notes,
    slack: int = 0,
) -> tuple[int, int]:
    """First frame and end (exclusive) of a clip's span in a video of `total` frames with these `times` in seconds."""
    if total <= 0:
        raise MediaError(media.path, "it holds no frames that can be decoded", REENCODE)
    first, last = 0, total
    if media.unit == "frame":
        first = int(media.start or 0)
        last = total if media.stop is None else int(media.stop)
    elif media.start is not None or media.stop is not None:
        starts = times()
        step = float(np.median(np.diff(starts))) if total > 1 else 0.0
        if media.start is not None:
            first = int(np.searchsorted(starts, media.start - _HALF_MILLISECOND))
        if media.stop is not None:
            last = int(np.searchsorted(starts, media.stop - _HALF_MILLISECOND))
            if step and last == total:
                last += max(int((media.stop - starts[-1]) / step - 1 + 0.1), 0)
    if first >= total:
        at = f"{media.start:g} s" if media.unit == "s" else f"frame {first}"
        raise MediaError(
            media.path,
            f"the clip begins at {at}, after the end of the video ({total} frames)",
            "Correct the clip's start, or use a video of the annotated frame rate.",
        )
    if last > total + slack:
        cause = f"{last - total} of the clip's {last - first} frames lie after the video's end ({total} frames)"
        tolerate(media.path, cause, dataset, notes)
    last = min(last, total)
    _enough(media.path, last - first, dataset)
    return first, last


def _enough(path: Path, count: int, dataset: DatasetSettings) -> None:
    if count < dataset.min_frames:
        raise MediaError(
            path,
            f"{count} frame{'' if count == 1 else 's'}, fewer than the {dataset.min_frames} needed",
            "Leave the clip out, or lower dataset.min_frames.",
        )


def tolerate(
    path: Path, cause: str, dataset: DatasetSettings, notes: Notes, *, used: str = "the nearest present frames"
) -> None:
    """Reject what is not whole, or note what is `used` instead, as `dataset.missing_frames` says."""
    if dataset.missing_frames == "reject":
        raise MediaError(path, cause, f"Complete the download, or use {used} (--missing-frames nearest).")
    if notes is not None:
        notes.append(f"{path}: {cause}; mended with {used}")


def frame_times(media: Media, dataset: DatasetSettings) -> tuple[float | None, float | None]:
    """The clip's span in seconds, told by the frame times of its video."""
    if media.clock is None or media.clock.is_dir():
        raise MediaError(
            media.path,
            "its span is in frames, and no video tells their times",
            "Give start and stop in seconds, or a video file beside the sound.",
        )
    inspect_movie(media.clock)
    try:
        reader = _open_decord(media.clock, dataset)
    except _DECORD_ERRORS as error:
        raise _damaged(media.clock, str(error), Movie()) from None
    starts = _start_times(reader)
    step = float(np.median(np.diff(starts))) if len(starts) > 1 else 1.0 / max(reader.get_avg_fps(), 1e-9)

    def at(frame: float | None) -> float | None:
        if frame is None:
            return None
        index = int(frame)
        return float(starts[index]) if index < len(starts) else float(starts[-1] + (index - len(starts) + 1) * step)

    return at(media.start), at(media.stop)


def resize_short_side(frames: np.ndarray, short_side: int) -> np.ndarray:
    """[N, H, W, C] -> the same with a short side of `short_side` pixels (OpenCV bilinear), aspect kept."""
    height, width = frames.shape[1:3]
    scale = short_side / min(height, width)
    size = (max(int(width * scale + 0.5), short_side), max(int(height * scale + 0.5), short_side))
    if size == (width, height):
        return frames
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR) for frame in frames])


def numbered(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Numbers and names of a folder's frames, ascending by number."""
    return _list_frames(folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=8)  # the clips of one recording share its folder, which may hold 100,000 files
def _list_frames(folder: Path, _mtime: int) -> tuple[np.ndarray, list[str]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match = re.search(r"(\d+)\.(?:jpe?g|png)$", entry.name, re.IGNORECASE)
            if match:
                found.append((int(match[1]), entry.name))
    found.sort()
    return np.array([number for number, _ in found], dtype=np.int64), [name for _, name in found]


def folder_span(media: Media, folder: Path) -> tuple[int, int]:
    """First number and end (exclusive) of a clip's frames in a folder."""
    numbers, _ = numbered(folder)
    if not len(numbers):
        raise MediaError(folder, "the folder holds no numbered jpg or png frames", "Correct the path.")
    if media.unit == "s" and not (media.start is None and media.stop is None):
        raise MediaError(
            folder,
            "a folder of frames has no times, and the clip's span is in seconds",
            "Give the span in frames.",
        )
    if media.start is None and media.stop is None:
        return int(numbers[0]), int(numbers[-1]) + 1
    base = 0 if numbers[0] == 0 else 1  # frames are counted from 0 in spans, and usually from 1 in file names
    first = base + int(media.start or 0)
    return first, int(numbers[-1]) + 1 if media.stop is None else base + int(media.stop)


def read_folder(
    media: Media,
    choose: Choose,
    *,
    dataset: DatasetSettings,
    notes: Notes,
    grey: bool = False,
    second: Path | None = None,
) -> np.ndarray:
    """Chosen frames [N, H, W, 3] (or [N, H, W] when grey); with `second`, only frames that both folders hold."""
    folder = media.path
    first, last = folder_span(media, folder)
    numbers, names = numbered(folder)
    lo, hi = np.searchsorted(numbers, [first, last])
    present = numbers[lo:hi]
    if second is not None:
        present = np.intersect1d(present, numbered(second)[0])
    count = last - first
    if not len(present):
        cause = f"all {count} frames are missing, the first is {_frame_name(names[0], first)}"
        raise MediaError(folder, cause, "Complete the download, or correct the clip's span.")
    _enough(folder, min(count, len(present)), dataset)
    if len(present) < count:
        gap = int(np.setdiff1d(np.arange(first, last), present)[0])
        missing = count - len(present)
        cause = f"{missing} of {count} frames are missing, the first is {_frame_name(names[0], gap)}"
        tolerate(folder, cause, dataset, notes)
    file = dict(zip(numbers[lo:hi].tolist(), names[lo:hi], strict=True))
    read: dict[int, np.ndarray] = {}
    chosen: list[np.ndarray] = []
    for number in (first + chosen_indices(choose, count)).tolist():
        while True:
            nearest = int(present[np.abs(present - number).argmin()])
            image = read[nearest] if nearest in read else _read_image(folder / file[nearest], grey)
            if image is not None:
                break
            tolerate(folder, f"{file[nearest]} is damaged or cut short", dataset, notes)
            present = present[present != nearest]
            if not len(present):
                raise MediaError(folder, "none of its frames can be decoded", REPLACE)
        read[nearest] = image
        chosen.append(image)
    if len({image.shape for image in chosen}) > 1:
        raise MediaError(folder, "its frames differ in size", "Extract the frames again.")
    return np.stack(chosen)


def _frame_name(like: str, number: int) -> str:
    return re.sub(r"\d+(?=\.\w+$)", lambda match: str(number).zfill(len(match[0])), like)


def _read_image(path: Path, grey: bool) -> np.ndarray | None:
    """One image, or None when it is damaged; OpenCV itself fills the rest of a jpg that is cut short with grey."""
    data = path.read_bytes()
    if not data or (data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")):
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    return image if image is None or grey else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
