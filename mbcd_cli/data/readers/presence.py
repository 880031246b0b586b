"""What of a dataset's media is on disk, told from directory listings and file sizes: `mbcd prepare --check`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.places import Disk
from mbcd_cli.data.records import Media

_NUMBERED = re.compile(r"(.*?)(\d+)(\.(?:jpe?g|png))$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Gap:
    """A clip of which something is missing: its id, how many of how many files, and the first of them."""

    clip: str
    missing: int
    expected: int
    first: str


@dataclass(slots=True)
class Presence:
    """One modality on disk.

    Attributes:
        clips: clips that should be there.
        complete: clips of which nothing is missing.
        absent: clips of which nothing is there.
        files, files_missing: files that should be there (every frame, in folders of frames), and those that are not,
            or are empty (frames are not looked at); a file that several clips share counts for each.
        gaps: the clips of which something is missing.
    """

    clips: int = 0
    complete: int = 0
    absent: int = 0
    files: int = 0
    files_missing: int = 0
    gaps: list[Gap] = field(default_factory=list)


def check_media(listing: Listing) -> dict[str, Presence]:
    """What of every modality of a listing is on disk; no file is opened, and every folder is listed once.

    Returns:
        Modality -> `Presence`.
    """
    disk, result = Disk(), {}
    for name in listing.modalities:
        presence = result[name] = Presence()
        # Clips of one folder follow each other, so that few listings (a recording may have 100,000 frames) are held.
        for clip in sorted((c for c in listing.clips if name in c.media), key=lambda c: str(c.media[name].path)):
            expected, missing, first = _missing(clip.media[name], disk)
            presence.clips += 1
            presence.files += expected
            presence.files_missing += missing
            presence.complete += not missing
            presence.absent += missing == expected
            if missing:
                presence.gaps.append(Gap(clip.id, missing, expected, first))
    return result


def _missing(media: Media, disk: Disk) -> tuple[int, int, str]:
    """(files expected, files missing, the first missing one)."""
    total, absent, first = 0, 0, ""
    for path in (media.path, media.path_v):
        if path is None:
            continue
        if disk.has(str(path)) and not path.suffix and path.is_dir():
            expected, missing, name = _frames(path, media)
        else:
            # In a folder that is not there all frames are missing.
            inside = int(media.stop) - int(media.start or 0) if media.unit == "frame" and media.stop is not None else 1
            there = disk.has(str(path)) and _size(path) > 0
            expected, missing, name = (1, 0, "") if there else (inside, inside, "")
        total += expected
        absent += missing
        if missing and not first:
            first = str(path / name)
    return total, absent, first


def _size(path: Path) -> int:
    """Bytes of a file (a download that was cut off at once leaves none); a folder counts as one."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size or int(path.is_dir())


@lru_cache(maxsize=4)
def _listing(folder: Path) -> tuple[frozenset[str], str, int, str]:
    """Names in a folder of frames, and their prefix, number of digits and suffix."""
    with os.scandir(folder) as entries:
        names = frozenset(entry.name for entry in entries)
    match = next((m for m in map(_NUMBERED.match, names) if m), None)
    return (names, match[1], len(match[2]), match[3]) if match else (names, "frame_", 10, ".jpg")


def _frames(folder: Path, media: Media) -> tuple[int, int, str]:
    """(frames expected, frames missing, name of the first missing one)."""
    names, prefix, digits, suffix = _listing(folder)
    if media.unit != "frame" or media.stop is None:
        return 1, int(not names), ""
    base = 0 if f"{prefix}{0:0{digits}d}{suffix}" in names else 1  # as the decoder counts (data.media.folder_span)
    span = range(base + int(media.start or 0), base + int(media.stop))
    missing = [name for n in span if (name := f"{prefix}{n:0{digits}d}{suffix}") not in names]
    return len(span), len(missing), missing[0] if missing else ""
