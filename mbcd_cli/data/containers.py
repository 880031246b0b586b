"""What a file's header claims, against what the file holds: mp4/mov boxes and wav chunks.

Decoders trust headers, repeat frames or stop early when those lie; reading the few bytes that matter is quicker than
decoding and names the cause.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

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
_UNIT_MATRIX = (0x10000, 0, 0, 0x10000)


@dataclass(frozen=True, slots=True)
class Movie:
    """What the index of an mp4 or mov says of its first video track.

    Attributes:
        frames: number of samples it claims, or None when unknown (fragmented files, other containers).
        rotated: frames are to be turned by 90 or 270 degrees when shown.
    """

    frames: int | None = None
    rotated: bool = False


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
    except (OSError, struct.error) as error:
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
    from io import BytesIO

    file = BytesIO(moov)
    for kind, start, stop in _boxes(file, 0, len(moov)):
        if kind != b"trak":
            continue
        frames, matrix, handler = None, _UNIT_MATRIX, b""
        todo = [(start, stop)]
        while todo:
            for inner, a, b in _boxes(file, *todo.pop()):
                if inner in (b"mdia", b"minf", b"stbl"):
                    todo.append((a, b))
                elif inner == b"tkhd":
                    offset = a + (52 if moov[a] == 1 else 40)
                    values = struct.unpack(">9i", moov[offset : offset + 36])
                    matrix = (values[0], values[1], values[3], values[4])
                elif inner == b"hdlr":
                    handler = handler or moov[a + 8 : a + 12]
                elif inner in (b"stsz", b"stz2"):
                    (frames,) = struct.unpack(">I", moov[a + 8 : a + 12])
        if handler == b"vide":
            return Movie(frames or None, rotated=matrix[0] == 0 and matrix[1] != 0)
    return Movie()


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
            if kind == b"fmt " and length >= 16:
                block = max(struct.unpack("<HHIIHH", file.read(16))[4], 1)
            if kind == b"data":
                # Recorders that write to a pipe leave a length of 0xFFFFFFFF or close to it: no claim.
                claimed, there = length // block, (size - at - 8) // block
                if length < 0xFFFF0000 and there < claimed:
                    cause = f"cut short: its header claims {claimed} samples, and {there} are there"
                    raise MediaError(path, cause, REPLACE)
                return
            at += 8 + length + length % 2
