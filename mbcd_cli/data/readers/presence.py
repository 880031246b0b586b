"""What of a dataset's media is on disk, told from directory listings and file sizes: `mbcd prepare --check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR

import numpy as np

from mbcd_cli.data.media.checks import unreadable
from mbcd_cli.data.media.folders import folder_span, frames_of
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError


@dataclass(frozen=True, slots=True)
class Gap:
    """A clip of which something is missing.

    Attributes:
        clip: its id.
        missing, expected: how many of how many files.
        first: path of the first of them.
        cause: why that cannot be used, where it is there.
        share: the largest share of one of its folders (or files) that is missing.
    """

    clip: str
    missing: int
    expected: int
    first: str
    cause: str = ""
    share: float = 1.0


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
    result = {}
    for name in listing.modalities:
        presence = result[name] = Presence()
        column = listing.clips.media[name]
        # Clips of one folder follow each other, so that few listings (a recording may have 100,000 frames) are held.
        order = sorted((i for i in range(len(column)) if column.has(i)), key=lambda i: str(column[i].path))
        for index in order:
            gap = _gap(listing.clips.ids[index], column[index])
            presence.clips += 1
            presence.files += gap.expected
            presence.files_missing += gap.missing
            presence.complete += not gap.missing
            presence.absent += gap.missing == gap.expected
            if gap.missing:
                presence.gaps.append(gap)
    return result


def _gap(clip: str, media: Media) -> Gap:
    """What of one clip is missing; nothing where `missing` is 0."""
    expected, missing, first, why, share = 0, 0, "", "", 0.0
    for path in (media.path, media.path_v):
        if path is None:
            continue
        wanted, lacking, name, cause = _files(path, media)
        expected += wanted
        missing += lacking
        share = max(share, lacking / wanted)
        if lacking and not first:
            first, why = name, cause
    return Gap(clip, missing, expected, first, why, share)


def _files(path: Path, media: Media) -> tuple[int, int, str, str]:
    """(files expected, files missing, the first missing one, why it cannot be used where it is not merely missing)."""
    # In a folder that is not there, or of which the frames cannot be told, all frames are missing.
    inside = int(media.stop) - int(media.start or 0) if media.unit == "frame" and media.stop is not None else 1
    try:
        status = path.stat()
        if not S_ISDIR(status.st_mode):
            there = status.st_size > 0  # a download that was cut off at once leaves none
            return (1, 0, "", "") if there else (inside, inside, str(path), "")
        frames = frames_of(path)
        first, last = folder_span(media, frames)
    except (FileNotFoundError, NotADirectoryError):
        return inside, inside, str(path), ""
    except OSError as error:
        return inside, inside, str(path), unreadable(path, error).cause
    except MediaError as error:
        return inside, inside, error.file, error.cause
    count, present = last - first, frames.present(first, last)
    if len(present) == count:
        return count, 0, "", ""
    gap = int(np.setdiff1d(np.arange(first, last), present)[0])
    return count, count - len(present), str(path / frames.name(gap)), ""
