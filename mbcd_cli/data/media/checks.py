"""What every decoder asks of a file before and after it reads: presence, enough of it, and what may be mended.

Letters: N frames chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

Choose = Callable[[int], np.ndarray]
"""(frames of a clip) -> zero-based indices wanted."""
Notes = list[str] | None

REPLACE = "Copy or download the file again, or leave its clip out."
COMPLETE = "Complete the download, or correct the clip's span."
REENCODE = "Re-encode or replace the file, or leave its clip out."
MOST_MISSING = 0.5
"""Share of a clip's frames that may be missing and replaced by others under `dataset.missing_frames=nearest`."""
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<MPD", b"<?xml", b"[playlist]")
_ALLOWED_SECONDS, _BYTES_PER_SECOND = 30.0, 1e6


def check_present(path: Path) -> None:
    """A regular file that exists, is not empty, and is no list of other files or addresses.

    Raises:
        MediaError: it is not.
    """
    try:
        stat = path.stat()
        if path.is_dir():
            raise MediaError(path, "a folder where a file is expected", "Name the file itself.")
        if not path.is_file():
            raise MediaError(path, "neither a file nor a folder", "Name a file.")
        if stat.st_size == 0:
            raise MediaError(path, "the file is empty (0 bytes)", REPLACE)
        with path.open("rb") as file:
            head = file.read(16).lstrip(b"\xef\xbb\xbf \r\n\t")
    except OSError as error:
        raise unreadable(path, error) from None
    if head.startswith(_PLAYLISTS):
        raise MediaError(path, "a list of other files, not a media file", "Name the media themselves.")


def file_version(path: Path) -> tuple[Path, int, int, int]:
    """What changes when a file is replaced.

    Raises:
        MediaError: it is missing or empty.
    """
    check_present(path)
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size, stat.st_ino


def unreadable(path: Path | str, error: OSError) -> MediaError:
    """What the system says against reading a file or folder, with a remedy."""
    cause = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    remedy = "Give yourself the right to read it." if isinstance(error, PermissionError) else ""
    return MediaError(path, cause, remedy or "Correct the path, or download the file.")


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that name.

    Raises:
        MediaError: nobody lets us look.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from None


def allowed_seconds(*paths: Path | None) -> float:
    """Seconds after which decoding has stalled: half a minute, and one second for every megabyte of the files."""
    size = 0
    for path in paths:
        with suppress(OSError):  # said when it is decoded
            size += path.stat().st_size if path is not None and path.is_file() else 0
    return _ALLOWED_SECONDS + size / _BYTES_PER_SECOND


def chosen_indices(choose: Choose, count: int) -> np.ndarray:
    """What a `choose` function wants of `count` frames: [N] ascending, each once; or pairs [N, 2] as they are."""
    indices = np.asarray(choose(count), dtype=np.int64)
    return indices if indices.ndim == 2 else np.unique(indices)


def check_enough(media: Media, count: int, dataset: DatasetSettings) -> None:
    """At least `dataset.min_frames` frames.

    Raises:
        MediaError: there are fewer.
    """
    if count < dataset.min_frames:
        raise MediaError(
            media.path,
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


def tolerate_missing(
    path: Path, missing: int, count: int, cause: str, dataset: DatasetSettings, notes: Notes, **used: str
) -> None:
    """`tolerate`, where `missing` of the `count` frames of a clip are not there.

    Raises:
        MediaError: they are more than others may replace.
    """
    if too_few(count - missing, count):
        raise MediaError(path, cause, COMPLETE)
    tolerate(path, cause, dataset, notes, **used)


def too_few(present: int, count: int) -> bool:
    """Whether more of a clip's `count` frames are missing than others may replace."""
    return count - present > MOST_MISSING * count


def span_in_frames(media: Media, total: int, *, dataset: DatasetSettings, notes: Notes, slack: int) -> tuple[int, int]:
    """First frame and end (exclusive) of a clip whose span is in frames, in media of `total` frames.

    Args:
        media: the clip's media.
        total: frames that there are.
        dataset: `min_frames` and `missing_frames`.
        notes: collects what was mended, if given.
        slack: frames that the span may reach past the end without a word (flow has one fewer than its video).
    """
    first = int(media.start or 0)
    last = total if media.stop is None else int(media.stop)
    if first >= total:
        raise MediaError(
            media.path,
            f"the clip begins at frame {first}, after the end of the video ({total} frames)",
            "Correct the clip's start, or use a video of the annotated frame rate.",
        )
    if last > total + slack:
        cause = f"{last - total} of the clip's {last - first} frames lie after the video's end ({total} frames)"
        tolerate_missing(media.path, last - total, last - first, cause, dataset, notes)
    last = min(last, total)
    check_enough(media, last - first, dataset)
    return first, last
