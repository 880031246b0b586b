"""Folders of frames: one image a frame, its number in its name.

A frame is a jpg or png whose name ends in a number. Names that begin with a dot, `thumb...` beside other images, and a
single image of another name beside a sequence (`cover_0.jpg`) are nothing that a camera wrote. What is left must be one
sequence: one beginning of the name, every number once.

Letters: N frames chosen or in a folder, H W pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from mbcd_cli.data.media.checks import (
    COMPLETE,
    REPLACE,
    Choose,
    Notes,
    check_enough,
    chosen_indices,
    tolerate,
    tolerate_missing,
    too_few,
    unreadable,
)
from mbcd_cli.data.media.timeline import HALF_MILLISECOND
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

_SUFFIXES = ("jpg", "jpeg", "png")
_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a part of a jpg: no stuffed byte, no restart
_END = 0xD9
_TIME = re.compile(r"(?:.*[^A-Za-z0-9.])?\d+\.")  # before the last digits of a name that is a decimal number


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of one folder.

    Attributes:
        folder: that holds them.
        numbers: [N] int64, ascending; at least one.
        names: their file names.
    """

    folder: Path
    numbers: np.ndarray
    names: list[str]

    @property
    def base(self) -> int:
        """The number of the recording's first frame, which spans count as 0: 0 where there is one, else 1."""
        return min(int(self.numbers[0]), 1)

    def name(self, number: int) -> str:
        """What the frame `number` is called, there or not."""
        like = self.names[min(1, len(self.names) - 1)]  # some write frame 0 with fewer digits than the others
        return re.sub(r"\d+(?=\.\w+$)", lambda match: str(number).zfill(len(match[0])), like)

    def present(self, first: int, last: int) -> np.ndarray:
        """Numbers in first, ..., last - 1 that are there, ascending: [n] int64."""
        lo, hi = np.searchsorted(self.numbers, [first, last])
        return self.numbers[lo:hi]

    def within(self, first: int, last: int) -> list[str]:
        """Names of those frames whose numbers lie in [first, last)."""
        lo, hi = np.searchsorted(self.numbers, [first, last])
        return self.names[lo:hi]


def frames_of(folder: Path) -> Frames:
    """The frames of a folder.

    Raises:
        MediaError: missing, not to be read, without frames, or with more than one sequence of names.
    """
    return _frames(folder, _changed(folder))


def count_frames(folder: Path) -> int:
    """Frames of a folder that holds one clip, with those that are missing between its first and its last.

    Raises:
        MediaError: as `frames_of`.
    """
    numbers = frames_of(folder).numbers
    return int(numbers[-1] - numbers[0]) + 1


def counting_differs(media: Sequence[Media]) -> str:
    """What to know of folders of frames, some of which count from 0 and others from 1, where spans are counted."""
    folders = dict.fromkeys(
        item.path for item in media if (item.start, item.stop) != (None, None) and _is_dir(item.path)
    )
    begins: dict[int, list[Path]] = {}
    for folder in folders:
        begins.setdefault(counts_from(folder), []).append(folder)
    if len(begins) < 2:
        return ""
    return (
        f"{len(begins[0])} folders of frames have a frame 0, from which spans count, and {len(begins[1])} have none "
        f"and count from 1, the first {begins[1][0]}: where it lost its frame 0, its clips are one frame late"
    )


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def counts_from(*folders: Path | None) -> int:
    """The least `Frames.base` of folders; 1 where their frames cannot be told, which is said when they are decoded."""
    bases = [1]
    for folder in folders:
        with contextlib.suppress(MediaError):
            bases += [_summary(folder, _changed(folder))[0]] if folder is not None else []
    return min(bases)


def names_digest(folder: Path) -> str:
    """Digest of the names of a folder's frames (of all images, where those cannot be told); "" where it is closed."""
    try:
        return _summary(folder, _changed(folder))[1]
    except MediaError:
        return ""


def beginnings(folder: Path) -> set[str]:
    """What the names of a folder's images begin with, before their numbers; none where it cannot be read."""
    try:
        return set(_images(folder))
    except MediaError:
        return set()


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError as error:
        raise unreadable(folder, error) from None


def _images(folder: Path) -> dict[str, dict[str, str]]:
    """Beginning of a name -> {name: digits after it}, for all images that a camera may have written."""
    images: dict[str, dict[str, str]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, _, suffix = entry.name.rpartition(".")
                begin = stem.rstrip("0123456789")
                if suffix.lower() in _SUFFIXES and begin != stem and not stem.startswith("."):
                    images.setdefault(begin, {})[entry.name] = stem[len(begin) :]
    except OSError as error:
        raise unreadable(folder, error) from None
    return images


@lru_cache(maxsize=4096)  # a few words for every folder of a dataset
def _summary(folder: Path, changed: int) -> tuple[int, str]:
    try:
        frames = _frames(folder, changed)
        base, names = frames.base, frames.names
    except MediaError:
        base, names = 1, sorted(name for alike in _images(folder).values() for name in alike)
    return base, hashlib.sha256("/".join(names).encode(errors="surrogateescape")).hexdigest()


@lru_cache(maxsize=8)  # the clips of one recording share its folder, which may hold 100,000 files
def _frames(folder: Path, _changed: int) -> Frames:
    images = _images(folder)
    if len(images) > 1:
        images = {begin: names for begin, names in images.items() if not begin.lower().startswith("thumb")} or images
    if any(len(names) > 1 for names in images.values()):
        images = {begin: names for begin, names in images.items() if len(names) > 1}
    if not images:
        raise MediaError(folder, "the folder holds no numbered jpg or png frames", "Correct the path.")
    if times := sorted(min(names) for begin, names in images.items() if _TIME.fullmatch(begin)):
        raise MediaError(
            folder,
            f"its frames are named after times ({times[0]}), which do not number them",
            "Number the frames in their order, from 1.",
        )
    if len(images) > 1:
        first, second, *_ = (f"{min(names)}, ... ({len(names)})" for _, names in sorted(images.items()))
        raise MediaError(
            folder,
            f"it holds {len(images)} sequences of frames: {first} and {second}",
            "Keep one, or give each a folder of its own (flow: u/ and v/).",
        )
    (names,) = images.values()
    ordered = sorted((int(digits), name) for name, digits in names.items())
    for (number, name), (after, other) in pairwise(ordered):
        if number == after:
            raise MediaError(folder, f"frame {number} is there twice: {name} and {other}", "Keep one of them.")
    return Frames(folder, np.array([n for n, _ in ordered], dtype=np.int64), [name for _, name in ordered])


def folder_span(media: Media, frames: Frames) -> tuple[int, int]:
    """First number and end (exclusive) of a clip's frames in a folder.

    Raises:
        MediaError: the span is in seconds, and nothing says how many frames there are in one.
    """
    start, stop = media.start, media.stop
    # Of a pair that counts from 0 one folder may lack its first frame.
    base = counts_from(media.path, media.path_v)
    if start is None and stop is None:
        return int(frames.numbers[0]), int(frames.numbers[-1]) + 1
    if media.unit == "s":
        if media.rate is None:
            raise MediaError(
                media.path,
                "a folder of frames has no times, and the clip's span is in seconds",
                "Give the frames per second in a column `fps`, or the span in frames.",
            )
        start, stop = _in_frames(start, stop, media.rate)
    end = int(frames.numbers[-1]) + 1 if stop is None else base + int(stop)
    return base + int(start or 0), end


def _in_frames(start: float | None, stop: float | None, rate: float) -> tuple[int | None, int | None]:
    """A span in seconds as frames, of which the k-th is shown from k / rate on: as `Timeline.within` has it."""
    first, last = (
        None if at is None else max(math.ceil((at - HALF_MILLISECOND) * rate - 0.5), 0) for at in (start, stop)
    )
    if first is not None and last is not None and last <= first:
        first = int((start + HALF_MILLISECOND) * rate)
        last = first + 1
    return first, last


def read_folder(
    media: Media,
    choose: Choose,
    *,
    dataset: DatasetSettings,
    notes: Notes,
    grey: bool = False,
    second: Path | None = None,
) -> np.ndarray:
    """Chosen frames [N, H, W, 3] (or [N, H, W] when grey); with `second`, only frames that both folders hold.

    Raises:
        MediaError: no frames, two sequences of them, more missing or damaged than may be, or frames of several sizes.
    """
    frames, twin = frames_of(media.path), None if second is None else frames_of(second)
    first, last = folder_span(media, frames)
    count = last - first
    own = present = frames.present(first, last)
    lacking = frames
    if twin is not None:
        present = np.intersect1d(own, twin.present(first, last))
        lacking = frames if len(own) < count else twin
    if not len(present):
        cause = f"all {count} frames are missing, the first is {lacking.name(first)}"
        raise MediaError(lacking.folder, cause, COMPLETE)
    check_enough(media, min(count, len(present)), dataset)
    if len(present) < count:
        gap = int(np.setdiff1d(np.arange(first, last), present)[0])
        cause = f"{count - len(present)} of {count} frames are missing, the first is {lacking.name(gap)}"
        tolerate_missing(lacking.folder, count - len(present), count, cause, dataset, notes)
    names = dict(zip(own.tolist(), frames.within(first, last), strict=True))
    read: dict[int, np.ndarray] = {}
    chosen: list[np.ndarray] = []
    indices = chosen_indices(choose, count)
    for number in (first + indices.ravel()).tolist():
        while True:
            nearest = int(present[np.abs(present - number).argmin()])
            if nearest in read:
                break
            image = _read_image(frames.folder / names[nearest], grey)
            if not isinstance(image, str):
                read[nearest] = image
                break
            cause = f"{names[nearest]} {image}"
            present = present[present != nearest]
            if too_few(len(present), count):
                lost = count - len(present)
                raise MediaError(frames.folder, f"{lost} of {count} frames are missing or damaged: {cause}", REPLACE)
            tolerate(frames.folder, cause, dataset, notes)
        chosen.append(read[nearest])
    if len({image.shape for image in chosen}) > 1:
        raise MediaError(frames.folder, "its frames differ in size", "Extract the frames again.")
    return np.stack(chosen).reshape(*indices.shape, *chosen[0].shape)


def _read_image(path: Path, grey: bool) -> np.ndarray | str:
    """One image, or what is wrong with it; OpenCV itself fills the rest of a jpg that is cut short with grey."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            return "is no file"
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    image = None
    if data and not (data[:2] == b"\xff\xd8" and _is_cut(data)):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    if image is None:
        return "is damaged or cut short"
    return image if grey else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_cut(jpg: bytes) -> bool:
    """Whether a jpg ends before the mark of its end (ITU-T T.81, B.1); what lies behind that, cameras' trailers and
    further images, is none of it."""
    at = 2
    while mark := _MARK.search(jpg, at):
        at = mark.start()
        if jpg[at + 1] == _END:
            return False
        at += 2 + int.from_bytes(jpg[at + 2 : at + 4], "big")
    return True
