"""Folders of frames: one image a frame, its number in its name.

Letters: N frames chosen, H W pixels.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from mbcd_cli.data.media.checks import REPLACE, Choose, Notes, check_enough, chosen_indices, tolerate
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings


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
    check_enough(media, min(count, len(present)), dataset)
    if len(present) < count:
        gap = int(np.setdiff1d(np.arange(first, last), present)[0])
        missing = count - len(present)
        cause = f"{missing} of {count} frames are missing, the first is {_frame_name(names[0], gap)}"
        tolerate(folder, cause, dataset, notes)
    file = dict(zip(numbers[lo:hi].tolist(), names[lo:hi], strict=True))
    read: dict[int, np.ndarray] = {}
    chosen: list[np.ndarray] = []
    indices = chosen_indices(choose, count)
    for number in (first + indices.ravel()).tolist():
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
    return np.stack(chosen).reshape(*indices.shape, *chosen[0].shape)


def _frame_name(like: str, number: int) -> str:
    return re.sub(r"\d+(?=\.\w+$)", lambda match: str(number).zfill(len(match[0])), like)


def _read_image(path: Path, grey: bool) -> np.ndarray | None:
    """One image, or None when it is damaged; OpenCV itself fills the rest of a jpg that is cut short with grey."""
    data = path.read_bytes()
    if not data or (data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")):
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    return image if image is None or grey else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
