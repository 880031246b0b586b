"""What a file's header claims, against what the file holds: mp4/mov boxes and wav chunks.

Decoders trust headers, repeat frames or stop early when those lie; reading the few bytes that matter is quicker than
decoding and names the cause.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mbcd_cli.errors import MediaError

REPLACE = "Copy or download the file again, or leave its clip out."
REENCODE = "Re-encode or replace the file, or leave its clip out."
_BOX_SUFFIXES = (".mp4", ".mov", ".m4v")
_TOP_BOXES = (
    b"ftyp",
    b"moov",
    b"mdat",
    b"free",
    b"skip",
    b"wide",
    b"pnot",
    b"styp",
    b"sidx",
    b"moof",
    b"uuid",
)
_MOST_FRAMES = 50_000_000  # nine days at 60 frames per second; a damaged index may claim billions


@dataclass(frozen=True, slots=True)
class Movie:
    """What the index of an mp4 or mov says of its first video track.

    Attributes:
        frames: number of frames shown, or None when unknown (fragmented files, other containers).
        times: their times in seconds from the first, ascending; None when unknown.
        rotated: frames are to be turned by 90 or 270 degrees when shown.
        trimmed: an edit list hides some of the frames that the file holds.
    """

    frames: int | None = None
    times: np.ndarray | None = None
    rotated: bool = False
    trimmed: bool = False


def check_present(path: Path) -> None:
    """A file that exists and is not empty.

    Raises:
        MediaError: it does not, or it is.
    """
    try:
        stat = path.stat()
    except OSError as error:
        cause = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise MediaError(path, cause, "Correct the path, or download the file.") from None
    if path.is_dir():
        raise MediaError(path, "a folder where a file is expected", "Name the file itself.")
    if stat.st_size == 0:
        raise MediaError(path, "the file is empty (0 bytes)", REPLACE)


def inspect_movie(path: Path) -> Movie:
    """Check the box structure of an mp4 or mov; other containers pass unseen.

    Raises:
        MediaError: missing, empty, not a video, or cut short.
    """
    check_present(path)
    stat = path.stat()
    try:
        return _inspect(path, stat.st_size, stat.st_mtime_ns)
    except (OSError, struct.error, IndexError, ValueError) as error:
        raise MediaError(path, f"its index cannot be read ({error})", REPLACE) from None


@lru_cache(maxsize=256)  # many clips of one long recording ask for the same index
def _inspect(path: Path, size: int, _mtime: int) -> Movie:
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8 or head[4:8] not in _TOP_BOXES:
            if path.suffix.lower() in _BOX_SUFFIXES and not _other_container(head):
                raise MediaError(path, "not a video file (it has no mp4 structure)", REPLACE)
            return Movie()
        movie, cut = None, None
        for kind, start, stop in _boxes(file, 0, size):
            if stop > size:
                cut = (kind, start, stop)
                break
            if kind == b"moov":
                file.seek(start)
                movie = _movie(file.read(stop - start))
    if movie is None:
        cause = "cut short before its index (moov)" if cut else "its index (moov) is missing"
        raise MediaError(path, cause, REPLACE)
    if cut:
        claims = f"its index claims {movie.frames} frames, but " if movie.frames else ""
        raise MediaError(path, f"cut short: {claims}only {size} of {cut[2]} bytes are there", REPLACE)
    return movie


def _other_container(head: bytes) -> bool:
    magic = (
        b"\x1aE\xdf\xa3",
        b"RIFF",
        b"FLV",
        b"OggS",
        b"\x00\x00\x01\xba",
        b"\x00\x00\x01\xb3",
        b"0&\xb2u",
        b"G",
    )
    return head.startswith(magic)


def _boxes(file: BinaryIO, at: int, end: int):
    """(kind, first byte of the content, end) of each box in [at, end); an end beyond `end` means a cut file."""
    while at + 8 <= end:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        content = at + 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            content += 8
        elif length == 0:  # to the end of the file
            length = end - at
        if length < content - at:
            return
        yield kind, content, at + length
        at += length


def _movie(moov: bytes) -> Movie:
    file = BytesIO(moov)
    scale = 0
    for kind, start, stop in _boxes(file, 0, len(moov)):
        if kind == b"mvhd":
            (scale,) = struct.unpack_from(">I", moov, start + (20 if moov[start] == 1 else 12))
        if kind == b"trak":
            boxes: dict[bytes, bytes] = {}
            todo = [(start, stop)]
            while todo:
                for inner, a, b in _boxes(file, *todo.pop()):
                    if inner in (b"mdia", b"minf", b"stbl", b"edts"):
                        todo.append((a, b))
                    else:
                        boxes.setdefault(inner, moov[a:b])
            if boxes.get(b"hdlr", b"")[8:12] == b"vide":
                return _track(boxes, scale)
    return Movie()


def _track(boxes: dict[bytes, bytes], movie_scale: int) -> Movie:
    """Frames, times and edits of one video track, from the contents of its boxes (ISO/IEC 14496-12)."""
    header = boxes.get(b"tkhd", b"")
    matrix = struct.unpack_from(">9i", header, 52 if header[:1] == b"\x01" else 40) if header else ()
    rotated = bool(matrix) and matrix[0] == 0 and matrix[1] != 0
    sizes, media = boxes.get(b"stsz") or boxes.get(b"stz2"), boxes.get(b"mdhd", b"")
    count = struct.unpack_from(">I", sizes, 8)[0] if sizes else 0
    if count > _MOST_FRAMES:
        raise ValueError(f"it claims {count} frames")
    if not count or not media or b"stts" not in boxes:
        return Movie(rotated=rotated)
    (scale,) = struct.unpack_from(">I", media, 20 if media[0] == 1 else 12)
    durations = _runs(boxes[b"stts"], count)
    times = np.concatenate([[0], np.cumsum(durations)[:-1]]) + (_runs(boxes[b"ctts"], count) if b"ctts" in boxes else 0)
    times = np.sort(times)
    edits = [edit for edit in _edits(boxes.get(b"elst")) if edit[1] >= 0]
    if len(edits) > 1:
        return Movie(rotated=rotated, trimmed=True)
    shown = np.ones(count, bool)
    if edits:
        length, begin = edits[0]
        slack = float(np.median(durations)) / 2  # edits are rounded to the movie's own, coarser time scale
        shown = times >= begin - slack
        if length and movie_scale:
            shown &= times < begin + length * scale / movie_scale - slack
    times = times[shown] if shown.any() else times
    return Movie(
        frames=len(times),
        times=(times - times[0]) / max(scale, 1),
        rotated=rotated,
        trimmed=not shown.all(),
    )


def _runs(box: bytes, count: int) -> np.ndarray:
    """A run-length coded table (stts, ctts) as one int64 value per frame."""
    (entries,) = struct.unpack_from(">I", box, 4)
    table = np.frombuffer(box, dtype=np.dtype([("count", ">u4"), ("value", ">i4")]), count=entries, offset=8)
    # A damaged table may claim billions of frames; no more than there are is ever expanded.
    lengths = np.minimum(table["count"].astype(np.int64), count)
    values = np.repeat(table["value"].astype(np.int64), lengths)[:count]
    return np.pad(values, (0, count - len(values)), mode="edge") if len(values) else np.zeros(count, np.int64)


def _edits(box: bytes | None) -> list[tuple[int, int]]:
    """(length in the movie's time scale, beginning in the track's; -1 for a pause) of each edit."""
    if not box:
        return []
    (entries,) = struct.unpack_from(">I", box, 4)
    form, step = (">Qq", 20) if box[0] == 1 else (">Ii", 12)
    return [struct.unpack_from(form, box, 8 + step * index) for index in range(entries)]


def check_wav(path: Path) -> None:
    """A wav whose data chunk is as long as its header claims; other formats pass unseen.

    Raises:
        MediaError: missing, empty, or shorter than claimed.
    """
    check_present(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or file.seek(8) != 8 or file.read(4) != b"WAVE":
            return
        at, block = 12, 1
        while at + 8 <= size:
            file.seek(at)
            kind, length = struct.unpack("<4sI", file.read(8))
            if kind == b"fmt " and length >= 16 and at + 24 <= size:
                block = max(struct.unpack("<HHIIHH", file.read(16))[4], 1)
            if kind == b"data":
                # Recorders that write to a pipe leave a length of 0xFFFFFFFF or close to it: no claim.
                claimed, there = length // block, (size - at - 8) // block
                if length < 0xFFFF0000 and there < claimed:
                    cause = f"cut short: its header claims {claimed} samples, and {there} are there"
                    raise MediaError(path, cause, REPLACE)
                return
            at += 8 + length + length % 2
