"""Damage that a container tells of by itself: parts that are not what their checksums or their sizes say.

FFmpeg's readers go on behind such a part as if nothing had been there. Only Ogg and Matroska say so much.
"""

from __future__ import annotations

import mmap
import zlib
from functools import lru_cache
from pathlib import Path

from mbcd_cli.data.media.checks import REPLACE, file_version
from mbcd_cli.errors import MediaError

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_TAGS = (b"TAG", b"ID3", b"APETAGEX")

_EBML, _SEGMENT, _CLUSTER, _CRC = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\xbf"
_VOID = b"\xec"
_HEAD = 4096  # bytes in which a file begins
# RFC 9559, 5: what may stand in a segment, and in a cluster.
_IN_SEGMENT = {
    *(b"\x11\x4d\x9b\x74", b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b", b"\x1c\x53\xbb\x6b", b"\x19\x41\xa4\x69"),
    *(b"\x10\x43\xa7\x70", b"\x12\x54\xc3\x67", _CLUSTER, _CRC, _VOID),
}
_IN_CLUSTER = {b"\xe7", b"\xa3", b"\xa0", b"\xab", b"\xa7", b"\xaf", b"\x58\x54", _CRC, _VOID}


def check_undamaged(path: Path, kind: str) -> None:
    """A file, of FFmpeg's format `kind`, whose parts are as their own checksums and sizes say.

    Raises:
        MediaError: one is not.
    """
    at = _damaged_at(file_version(path), kind)
    if at is not None:
        cause = f"its data are damaged: what begins at byte {at} of {path.stat().st_size} is not as it was written"
        raise MediaError(path, cause, REPLACE)


@lru_cache(maxsize=256)
def _damaged_at(version: tuple[Path, int, int, int], kind: str) -> int | None:
    find = {"ogg": _damaged_page, "matroska,webm": _damaged_element}.get(kind)
    if find is None:
        return None
    with version[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return find(data)


# --- Ogg (RFC 3533, 6) -----------------------------------------------------------------------------------------------


def _damaged_page(data: mmap.mmap) -> int | None:
    """Where the first page of an Ogg begins whose checksum is another, or something that is no page."""
    at = data.find(b"OggS")
    while 0 <= at < len(data):
        head = data[at : at + 27]
        if not head.startswith(b"OggS"):
            rest = data[at : at + 16]
            return None if rest.startswith(_TAGS) or not any(data[at:]) else at
        if len(head) < 27:
            return at
        end = at + 27 + head[26] + sum(data[at + 27 : at + 27 + head[26]])
        page = head[:22] + bytes(4) + data[at + 26 : end]
        if end > len(data) or ogg_checksum(page) != int.from_bytes(head[22:26], "little"):
            return at
        at = end
    return None


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of polynomial 0x04c11db7, the highest bit first, from 0: zlib's, whose lowest bit is first, mirrored."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED), "big")


# --- Matroska (RFC 8794, 9559) ---------------------------------------------------------------------------------------


def _damaged_element(data: mmap.mmap) -> int | None:
    """Where the first part of a Matroska file begins that no such file has, that has another checksum than it says, or
    that ends behind what it is a part of."""
    at = data.find(_EBML, 0, _HEAD)
    live = False
    while 0 <= at < len(data):
        name, inside, end = _element(data, at)
        if name == _SEGMENT:
            live = end is None
            fault, at = _damaged_in(data, inside, end, _IN_SEGMENT)
            if fault is not None:
                return fault
        elif name in (_EBML, _VOID) and end is not None:  # a further file is read as well
            at = end
        else:  # behind a segment of a told size nobody looks
            return at if live else None
    return None


def _damaged_in(data: mmap.mmap, begins: int, end: int | None, known: set[bytes]) -> tuple[int | None, int]:
    """(the first damaged part between the two, where the parts end).

    An `end` of None is that of a live recording: it goes on to what is no such part, and may break off.
    """
    at, stop = begins, min(end or len(data), len(data))  # a file that is cut short is told by `whole`
    while at < stop:
        name, inside, behind = _element(data, at)
        if name not in known:
            return (None if end is None else at), at
        if behind is not None and behind > stop:
            return (None if end is None else at), stop
        after = behind
        if name == _CLUSTER:
            fault, after = _damaged_in(data, inside, behind, _IN_CLUSTER)
            if fault is not None:
                return fault, at
        if after is None or (
            known is _IN_SEGMENT and behind is not None and _has_other_sum(data, name, inside, behind)
        ):
            return at, at
        at = after
    return None, at


def _has_other_sum(data: mmap.mmap, name: bytes, inside: int, behind: int) -> bool:
    """Whether a part of a segment begins with a checksum (RFC 8794, 11.3.1) that is not that of what follows in it."""
    if name in (_VOID, _CRC) or data[inside : inside + 1] != _CRC:
        return False
    _, told, rest = _element(data, inside)
    return rest is None or zlib.crc32(data[rest:behind]) != int.from_bytes(data[told:rest], "little")


def _element(data: mmap.mmap, at: int) -> tuple[bytes, int, int | None]:
    """(name, where its contents begin, where they end): None where that is not told, behind the file where cut."""
    name = data[at : at + 9 - data[at].bit_length()] if data[at] > 0xF else data[at : at + 1]
    at += len(name)
    length = data[at : at + 9 - data[at].bit_length()] if at < len(data) and data[at] else b""
    inside = at + len(length)
    if not length or inside > len(data):
        return name, inside, len(data) + 1
    size, unknown = int.from_bytes(length, "big"), (1 << 7 * len(length)) - 1
    return name, inside, None if size & unknown == unknown else inside + (size & unknown)
