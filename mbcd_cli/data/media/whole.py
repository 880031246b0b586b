"""What a file says of its own length, compared with what is there: cut short, or with another file joined to its end.

Only headers are read, and of formats whose readers stop at their first file's end, the beginnings of others in them.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mbcd_cli.data.media.checks import REPLACE, check_present, file_version
from mbcd_cli.errors import MediaError

SPLIT = "Split it into the files that it was joined from, or join them with a tool that writes one header."
_APART = 0.04  # share of the stated length by which streams may end at different times
_HEAD = 65_536  # bytes in which headers lie
_RIFF_HEAD = 8  # bytes; some writers count them in, and some leave out the one that makes a length even
_PAGE = 65_307  # bytes of the longest Ogg page
_TAIL = 1024  # bytes behind the samples that may be anything: tags
_PADDING = 2**20  # bytes of zeros behind them, as recorders fill blocks up
_STREAMED = 0x7FFF0000  # recorders that write to a pipe leave a length of nearly 2 or 4 GB
# How files begin that FFmpeg's readers, and libsndfile, read to the end of the first of them only.
_BEGINNINGS = {
    "flac": rb"fLaC\0\0\0\x22",
    "flv": rb"FLV\x01[\x01\x04\x05]\0\0\0\x09\0\0\0\0",
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    "tta": rb"TTA1[\x01\x02]\0",
    "nut": rb"nut/multimedia container\0",
}
_FILE_PROPERTIES = b"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4\x00\xc0\x0c\x20\x53\x65"


def check_whole(path: Path, kind: str) -> None:
    """A file, of FFmpeg's format `kind`, that is as long as it says, and no longer.

    Raises:
        MediaError: it is cut short, or other files are joined to its end that would not be seen.
    """
    stated, size = stated_bytes(path, kind), path.stat().st_size
    if stated is not None and size < stated - (_RIFF_HEAD if kind == "avi" else 0):
        raise MediaError(path, f"cut short: it claims {stated} bytes, and {size} are there", REPLACE)
    if kind == "ogg" and _ogg_is_torn(path):
        raise MediaError(path, "cut short: it ends within a page", REPLACE)
    at = _joined_at(file_version(path), kind)
    if at is not None:
        cause = f"another file begins {size - at} bytes before its end: files are joined in it, and only the first "
        raise MediaError(path, cause + "would be seen", SPLIT)


def check_seconds(path: Path, kind: str, stated: float, there: float) -> None:
    """As many seconds as are stated, where nothing but seconds is: an flv whose header tells no bytes.

    Raises:
        MediaError: more than streams may end apart are lacking.
    """
    if kind == "flv" and stated_bytes(path, kind) is None and stated - there > max(_APART * stated, 0.5):
        raise MediaError(path, f"cut short: it claims {stated:.2f} s, and {there:.2f} s are there", REPLACE)


def stated_bytes(path: Path, kind: str) -> int | None:
    """Where a file ends by its own header; None where it does not say."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if kind.startswith("matroska"):
        return _segment_end(head)
    if kind == "flv" and (at := head.find(b"\0\x08filesize\0") + 11) > 10 and len(head) >= at + 8:
        size = struct.unpack_from(">d", head, at)[0]
        return int(size) if 0 < size < 2**63 else None
    if kind == "asf" and (at := head.find(_FILE_PROPERTIES)) >= 0 and len(head) >= at + 92:
        live = head[at + 88] & 1
        return None if live else struct.unpack_from("<Q", head, at + 40)[0]
    if kind == "avi":
        return _riffs_end(path)
    if kind.startswith("mov"):
        boxes = list(_boxes(path))
        return boxes[-1][1] if boxes and any(name == b"moof" for name, _ in boxes) else None
    return None


def mp3_frames(path: Path) -> int | None:
    """Frames that an mp3 says it has (in a Xing, Info or VBRI header); None where it does not."""
    with path.open("rb") as file:
        head = file.read(10)
        if head.startswith(b"ID3"):
            size = 0
            for byte in head[6:10]:
                size = size << 7 | byte & 127
            file.seek(10 + size)
            head = b""
        head += file.read(256)
    for name, place in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        at = head.find(name)
        if at >= 0 and len(head) >= at + place + 4 and (name == b"VBRI" or head[at + 7] & 1):
            return struct.unpack_from(">I", head, at + place)[0]
    return None


def why_not_opened(path: Path) -> str | None:
    """What is wrong with an mp4 (mov, m4a, ...) that cannot be opened; None of other files."""
    boxes = list(_boxes(path))
    if not boxes or boxes[0][0] not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return None
    names, size = [name for name, _ in boxes], path.stat().st_size
    if boxes[-1][1] > size:
        name = names[-1].decode("ascii", "replace")
        lost = f"cut short: its last part ({name}) lacks {boxes[-1][1] - size} bytes"
        return lost if b"moov" in names else f"{lost}, and the index (moov) behind it"
    return "its index (moov) is damaged" if b"moov" in names else "cut short before its index (moov)"


@lru_cache(maxsize=256)
def _joined_at(version: tuple[Path, int, int, int], kind: str) -> int | None:
    """Where a second file begins in a file of `kind`; None where there is none, or it is read as well."""
    if kind.startswith("mov"):
        begins = {}
        at = 0
        for name, end in _boxes(version[0]):
            begins.setdefault(name, []).append(at)
            at = end
        indices, files = begins.get(b"moov", []), begins.get(b"ftyp", [])
        return (files if len(files) > 1 else indices)[1] if len(indices) > 1 else None
    if kind not in _BEGINNINGS:
        return None
    with version[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        joint = re.compile(_BEGINNINGS[kind]).search(data, 4)
        return joint and joint.start()


def _boxes(path: Path) -> Iterator[tuple[bytes, int]]:
    """(name, end) of an mp4's outermost boxes (ISO/IEC 14496-12, 4.2); the last may end behind the file."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            length, name = struct.unpack(">I4s", file.read(8))
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            if length == 0:
                length = size - at
            if length < 8:
                return
            at += length
            yield name, at


def _riffs_end(path: Path) -> int | None:
    """End of the last RIFF of an AVI; a live one says nothing, and a long one has several, one behind the other."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            name, length = struct.unpack("<4sI", file.read(8))
            if name != b"RIFF":
                break
            if length in (0, 2**32 - 1):
                return None
            at += _RIFF_HEAD + length + length % 2
    return at


def _segment_end(head: bytes) -> int | None:
    """End of a Matroska file's segment; a live one states no size (RFC 9559, 5.1; RFC 8794, 4)."""
    at = head.find(b"\x18\x53\x80\x67", 0, 4096) + 4
    if at < 4 or not head[at : at + 1] or not head[at]:
        return None
    length = 9 - head[at].bit_length()
    size = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
    return at + length + size if size != (1 << 7 * length) - 1 else None


def _ogg_is_torn(path: Path) -> bool:
    """Whether the last page of an Ogg lacks its end (RFC 3533, 6); recordings of a live stream often lack its mark."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _PAGE, 0))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


# --- files of samples ------------------------------------------------------------------------------------------------

# The first bytes, those at 8, where the first chunk begins; the bytes of a chunk's name, how its length is packed,
# whether that counts the chunk's head, to what chunks are padded.
_CHUNKED = {
    b"RIFF": (b"WAVE", 12, 4, "<I", False, 2),
    b"RF64": (b"WAVE", 12, 4, "<I", False, 2),
    b"FORM": (b"AIF", 12, 4, ">I", False, 2),
    b"riff": (b"", 40, 16, "<Q", True, 8),  # Sony Wave64
    b"caff": (b"", 8, 4, ">Q", False, 1),
}
_SAMPLES = (b"data", b"SSND")


def check_length(path: Path) -> bytes:
    """A file of samples (wav, RF64, aiff, w64, caf, au) that is as long as its header claims; others pass unseen.

    Returns:
        The file's first bytes.

    Raises:
        MediaError: missing, empty, shorter or longer than claimed, or so long that the header cannot say it.
    """
    check_present(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head.startswith(b".snd"):
            at, claimed = struct.unpack(">II", head[4:])
            if _compare(path, claimed, size - at, 1, head[:4]) and claimed:
                _check_end(path, at + claimed)
        form, at, name, packed, counts_head, padding = _CHUNKED.get(head[:4], (b"-", 0, 0, "", False, 1))
        if not head[8:].startswith(form):
            return head
        ahead, block, stated, begins, claimed = name + struct.calcsize(packed), 1, None, None, 0
        while at + ahead <= size:
            file.seek(at)
            kind, (length,) = file.read(name)[:4], struct.unpack(packed, file.read(ahead - name))
            length -= ahead if counts_head else 0
            is_chunk = kind.isascii() and kind.decode().isprintable() and at + ahead + length <= size
            if begins is not None and (kind in _CHUNKED or not is_chunk):
                break
            if kind == b"ds64" and at + ahead + 16 <= size:
                _, stated = struct.unpack("<QQ", file.read(16))
            if kind == b"fmt " and length >= 16 and at + ahead + 16 <= size:
                block = max(struct.unpack("<HHIIHH", file.read(16))[4], 1)
            if kind in _SAMPLES:
                length = length if stated is None else stated
                if not _compare(path, length, size - at - ahead, block, head[:4]):
                    return head
                begins, claimed = at + ahead, length
            at += ahead + max(length, 0)
            at += -at % padding
    if begins is not None and begins < at:  # else it claims no sound and has some: its header was never completed
        if not claimed:
            raise MediaError(path, "it has a header but no samples", REPLACE)
        _check_end(path, at)
    return head


def _check_end(path: Path, at: int) -> None:
    """Nothing behind the sound, which ends at byte `at`, is sound that would not be heard."""
    rest = path.stat().st_size - at
    with path.open("rb") as file:
        file.seek(at)
        tail = file.read(_PADDING + 1)
    padding = len(tail) == rest and not tail.strip(b"\0")
    if (rest > _TAIL and not padding) or tail[:4] in (*_CHUNKED, b".snd"):
        cause = f"{rest} bytes after the end of the sound: files are joined in it, or its header is wrong"
        raise MediaError(path, cause, "Decode it into a wav with a tool that reads all of it, or replace it.")


def _compare(path: Path, claimed: int, there: int, block: int, kind: bytes) -> bool:
    """Bytes of samples that a header claims, and those that there are after it; `block` bytes a sample.

    Returns:
        Whether it claims anything: otherwise the sound goes on to the file's end.
    """
    unit = "samples" if block > 1 else "bytes of sound"
    if kind in (b"RIFF", b"FORM", b".snd"):
        if there >= 2**32:  # lengths of 32 bits: wrapped, or none
            cause = f"its header claims {claimed / 1e9:.1f} GB of sound, and {there / 1e9:.1f} GB are there: a length "
            cause += "over 4 GB does not fit into it"
            raise MediaError(path, cause, "Rewrite it: ffmpeg -ignore_length 1 -i IN -c copy -rf64 auto OUT.wav.")
        if claimed & _STREAMED == _STREAMED:
            return False
    elif claimed >= 2**63:  # -1: unknown
        return False
    if there // block < claimed // block:
        cause = f"cut short: its header claims {claimed // block} {unit}, and {there // block} are there"
        raise MediaError(path, cause, REPLACE)
    return True
