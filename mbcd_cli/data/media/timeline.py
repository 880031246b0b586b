"""Which frames a video file presents, and when, told by its packets and, where they do not tell, by decoding it.

PyAV (FFmpeg's own demuxers and decoders) reads the file. A frame is known by its presentation time, never by its place
in an index: containers hide frames (edit lists), codecs reorder them, key frames of an open group have pictures before
them that cannot be decoded from there, and AVI has no presentation times at all.

Letters: N frames presented, K key frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from mbcd_cli.data.media.checks import REENCODE, REPLACE, allowed_seconds, check_present
from mbcd_cli.data.media.damage import check_undamaged
from mbcd_cli.data.media.whole import check_seconds, check_whole, stated_bytes, why_not_opened
from mbcd_cli.errors import MediaError

DECODER = "PyAV " + av.__version__ + ", libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))
"""Enters the fingerprint of every cache that is decoded with it."""
HALF_MILLISECOND = 5e-4  # mkv rounds its time stamps to milliseconds

# Demuxers that may be tried: those that open other files or addresses (hls, concat, dash, image2, ...) are not.
_FORMATS = (
    "mov,matroska,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,m4v,h264,hevc,obu,ivf,mjpeg,gif,apng,nut,mxf,dv,rm,wtv,nsv,"
    "vc1,h263,cavsvideo,yuv4mpegpipe,wav,w64,flac,mp3,aac,ac3,eac3,dts,aiff,au,caf,amr,ape,wv,tta,mpc8"
)
# Containers that state the presentation time of every packet, and codecs of which every packet is one frame.
_TIMED = ("mov,mp4", "matroska")
_ONE_FRAME_A_PACKET = (
    *("h264", "hevc", "vp8", "vp9", "av1", "vvc", "mpeg4", "mpeg2video", "mpeg1video", "h263", "svq3", "cinepak"),
    *("mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "png", "qtrle", "jpeg2000"),
)
_UNTIMED = ("avi", "asf")  # packets have one time only, that of decoding, and frames follow each other in that rhythm
_RATELESS = ("h264", "hevc", "m4v", "mjpeg", "mpegvideo", "obu", "vc1", "h263", "cavsvideo")  # bare streams
_ODD_TIMES = 0.02  # share of the frames that may have the time of the one before
_PIXELS_PER_SECOND = 1e7  # a slow core on a busy machine decodes more
_RUN_IN = 1.0  # seconds
_MOST_FRAMES = 50_000_000  # nine days at 60 frames per second; a damaged index may claim billions
_HELD_BYTES = 64 * 2**20
_HIDDEN_VP8 = 0x10  # cleared in the first byte of a frame that only others are predicted from
_OGG_HEADERS = (b"\x80theora", b"\x81theora", b"\x82theora", b"OVP80")  # where files are joined, they come again
_IDR = 5
_NOTHING = 16  # bytes
AnyStream = TypeVar("AnyStream", bound=Stream)


class _Row(NamedTuple):
    """Of one packet: times of presentation and of decoding, for how long, a key frame, shown, its bytes, torn."""

    pts: int | None
    dts: int | None
    lasts: int
    key: bool
    shown: bool
    size: int
    torn: bool


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames that one picture stream presents.

    Attributes:
        stamps: [N] int64, ascending: what a decoded frame is known by. Presentation times in the stream's unit, or,
            where `in_order`, places in the order of a sequential read.
        starts: [N] float64, ascending: seconds at which each frame is first shown, on the file's own timeline, which
            begins with the earliest of its picture and sound streams.
        step: seconds from one frame to the next, as a rule (the median).
        zero: seconds, by the file's time stamps, at which its own timeline begins.
        until: seconds to which the last frame is shown, where that is told; it is shown for a `step` at least.
        in_order: nothing but a sequential read tells the frames.
        lost: those of `stamps` that are there and cannot be decoded.
        faults: packets that could not be decoded; told by decoding only.
        rateless: a bare stream, whose times are made up by its demuxer.
    """

    stamps: np.ndarray
    starts: np.ndarray
    step: float
    zero: float = 0.0
    until: float = 0.0
    in_order: bool = False
    lost: tuple[int, ...] = ()
    faults: int = 0
    rateless: bool = False

    def __len__(self) -> int:
        return len(self.stamps)

    @property
    def end(self) -> float:
        """Seconds at which the last frame ends."""
        return max(float(self.starts[-1]) + self.step, self.until)

    @property
    def _slack(self) -> float:
        return min(HALF_MILLISECOND, self.step / 4)

    def within(self, start: float | None, stop: float | None) -> tuple[int, int]:
        """First frame and end (exclusive) of those whose middle lies in [start, stop) seconds.

        A frame that is shown for longer than usual has its middle where a usual one would; a span between two middles
        has the frame that is shown at its start.
        """
        shown = np.minimum(np.diff(self.starts, append=np.inf), self.step)
        middles = self.starts + shown / 2 + self._slack
        first = 0 if start is None else int(np.searchsorted(middles, start))
        last = len(self) if stop is None else int(np.searchsorted(middles, stop))
        there = start is not None and self.starts[0] <= start + self._slack and start < self.end - self.step / 2
        if last <= first and there:
            first = int(np.searchsorted(self.starts, start + self._slack, side="right")) - 1
            last = first + 1
        return first, last

    def at(self, moments: np.ndarray) -> np.ndarray:
        """The frame that is shown at each of these moments, [n] seconds -> [n] frames."""
        return np.clip(np.searchsorted(self.starts, moments + self._slack, side="right") - 1, 0, len(self) - 1)


class Deadline:
    """Ends the reading of one file that stalls: after what its bytes, and the `pixels` to be decoded, may take.

    Attributes:
        told: is given the seconds, where pixels are to be decoded, so that nobody who waits gives up before.
    """

    told: ClassVar[Callable[[float], None]] = lambda seconds: None

    def __init__(self, path: Path, *, pixels: int = 0) -> None:
        self._path, self._seconds = path, allowed_seconds(path) + pixels / _PIXELS_PER_SECOND
        if pixels:
            Deadline.told(self._seconds)
        self._at = time.monotonic() + self._seconds

    def check(self) -> None:
        """Raises:
        MediaError: the time that the file's size allows is over.
        """
        if time.monotonic() > self._at:
            raise MediaError(self._path, f"the decoder did not finish within {self._seconds:.0f} s", REENCODE)


def open_container(path: Path) -> InputContainer:
    """A local media file, in a format that names no other file.

    Raises:
        MediaError: missing, empty, a list of other files, nothing that can be opened, or not whole.
    """
    check_present(path)
    try:
        container = av.open(
            f"file:{path.absolute()}",
            options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
            metadata_errors="replace",
        )
    except (av.FFmpegError, ValueError, OSError) as error:
        other = f"not a video or sound file that can be opened ({getattr(error, 'strerror', None) or error})"
        raise MediaError(path, why_not_opened(path) or other, REPLACE) from None
    try:
        check_whole(path, container.format.name)
    except BaseException:
        container.close()
        raise
    return container


def beginning(container: InputContainer) -> float:
    """Seconds at which a file's own timeline begins: with the earliest of its picture and sound streams.

    What lies less than a second before 0 is an encoder's run-in, which is not played; more is a clock that wrapped.
    """
    starts = [
        float(stream.start_time * stream.time_base)
        for stream in (*container.streams.video, *container.streams.audio)
        if stream.start_time is not None and stream.time_base is not None
    ]
    earliest = min(starts, default=0.0)
    return 0.0 if -_RUN_IN < earliest < 0 else earliest


def packet_end(packet: av.Packet) -> float:
    """Seconds at which a packet ends by the file's time stamps; 0 where it has none."""
    moment = packet.pts if packet.pts is not None else packet.dts
    if moment is None or packet.time_base is None:
        return 0.0
    return float((moment + (packet.duration or 0)) * packet.time_base)


def only_stream(
    path: Path, streams: Sequence[AnyStream], *, what: str, about: Callable[[AnyStream], str], maps: str
) -> AnyStream:
    """The only one of a file's streams, or the only one that it marks as its default.

    Args:
        what: they are. about: words on one of them.
        maps: ffmpeg's options that keep one, its number being {}.

    Raises:
        MediaError: there are several of equal standing.
    """
    preferred = [stream for stream in streams if stream.disposition & Disposition.default]
    if len(streams) == 1 or len(preferred) == 1:
        return (preferred or streams)[0]
    named = " and ".join(f"stream {stream.index} ({about(stream)})" for stream in streams[:2])
    raise MediaError(
        path,
        f"it holds {len(streams)} {what} of equal standing: {named}",
        f"Keep one of them: ffmpeg -i IN {maps.format(streams[0].index)} -c copy OUT.",
    )


class Packets:
    """What the packets of a file say of its picture, read once from the beginning to the end, without decoding.

    Attributes:
        stream: the picture.
        count: packets of the picture.
        held: the picture's packets in the order of decoding, while they are few enough to keep; else None.
        keys: [K] of (stamp, whether what follows needs nothing from before it), ascending.

    Raises:
        MediaError: no picture, two of equal standing, cut short.
    """

    def __init__(self, path: Path, container: InputContainer) -> None:
        self.path, self._format = path, container.format.name
        pictures = {s.index: s for s in container.streams.video if s.codec_context is not None}
        if not container.streams.video:
            raise MediaError(path, "it has no video stream", "Name a file with a picture, or leave the clip out.")
        if not pictures:
            raise MediaError(path, "its picture is of a codec that cannot be decoded", REENCODE)
        self._zero = beginning(container)
        self._end, size = 0.0, 0
        closed: dict[int, set[int | None]] = {index: set() for index in pictures}
        rows: dict[int, list[_Row]] = {index: [] for index in pictures}
        held: dict[int, list[av.Packet]] | None = {index: [] for index in pictures}
        deadline = Deadline(path)
        try:
            for packet in container.demux():  # subtitles as well: the file may be as long as they are
                deadline.check()
                self._end = max(self._end, packet_end(packet))
                index = packet.stream_index
                if not packet.size or index not in pictures:
                    continue
                shown = not packet.is_discard
                if pictures[index].codec_context.name == "vp8":
                    shown = shown and bool(memoryview(packet)[0] & _HIDDEN_VP8)
                row = _Row(
                    *(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe),
                    *(shown, packet.size, packet.is_corrupt),
                )
                rows[index].append(row)
                if packet.is_keyframe and _is_closed(packet, pictures[index]):
                    closed[index].add(packet.pts)
                if len(rows[index]) > _MOST_FRAMES:
                    raise MediaError(path, "it claims more frames than a file can hold", REPLACE)
                size += packet.size
                if held is not None:
                    held[index].append(packet)
                    held = held if size <= _HELD_BYTES else None
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(path, f"its data cannot be read ({error})", REPLACE) from None
        self.stream = self._pick(pictures, rows)
        self.count = len(rows[self.stream.index])
        # Kept by value: the file may be opened anew, and what belongs to a closed one must not be touched.
        self._codec, self._unit = self.stream.codec_context.name, float(self.stream.time_base)
        length, begins = self.stream.duration, self.stream.start_time
        self._ends = begins + length if length and begins is not None else None
        self._rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self._rows, promised = rows[self.stream.index], closed[self.stream.index]
        self.keys = sorted((row.pts, row.pts in promised) for row in self._rows if row.key and row.pts is not None)
        self.held = held[self.stream.index] if held is not None else None
        self._alone = len(container.streams) == 1
        self._stated = (container.duration or 0) / 1e6
        self._check_whole()

    def _pick(self, pictures: dict[int, VideoStream], rows: dict[int, list]) -> VideoStream:
        """The one picture of the file: covers, and single images beside a moving picture, do not count."""
        streams = [s for s in pictures.values() if not s.disposition & Disposition.attached_pic] or [*pictures.values()]
        candidates = [s for s in streams if len(rows[s.index]) > 1] or streams

        def about(stream: VideoStream) -> str:
            codec = stream.codec_context
            return f"{codec.name}, {codec.width}x{codec.height}, {len(rows[stream.index])} frames"

        return only_stream(self.path, candidates, what="pictures", about=about, maps="-map 0:{} -map 0:a?")

    def _check_whole(self) -> None:
        """Nothing is damaged, or lacking of what the file claims to hold: frames of an index, or seconds."""
        check_undamaged(self.path, self._format)
        there, torn = len(self._rows), self._torn
        # The index of an mp4, cut to what is shown, has a packet for each of its entries.
        claimed = len(self.stream.index_entries) if self._format.startswith("mov") else 0
        if self._format == "mpegts":
            torn = 0  # where two recordings meet a packet looks torn as well: told by decoding
        if there - torn < max(claimed, there):
            whole = f"{there - torn} are there whole"
            claim = f"it claims {claimed} frames, and {whole}" if claimed else f"of {there} frames {whole}"
            raise MediaError(self.path, f"cut short: {claim}", REPLACE)
        if not there:
            raise MediaError(self.path, "it holds no frames that can be decoded", REENCODE)
        check_seconds(self.path, self._format, self._stated, self._end)

    @property
    def _torn(self) -> int:
        """Packets that are not whole. Where recordings are joined time goes back, and what is before looks torn too."""
        torn = [number for number, row in enumerate(self._rows) if row.torn]
        return sum(not self._is_joined_behind(number) for number in torn)

    def _is_joined_behind(self, number: int) -> bool:
        near = pairwise(self._rows[number : number + 3])
        return any(row.key and None not in (row.dts, before.dts) and row.dts <= before.dts for before, row in near)

    @property
    def tell(self) -> bool:
        """Whether the packets alone say which frames are presented: the proof, for all frames but damaged ones."""
        shown = [row.pts for row in self._rows if row.shown]
        if not self._format.startswith(_TIMED) or self._codec not in _ONE_FRAME_A_PACKET or not shown or None in shown:
            return False
        first, key = self._rows[0].pts, self._rows[0].key
        # Pictures shown before the first key frame may lean on a frame that is not in the file.
        return len(set(shown)) == len(shown) and key and first is not None and first <= min(shown)

    def timeline(self, *, without: Collection[int] = (), **told: object) -> Timeline:
        """As the packets have it."""
        shown = {row.pts for row in self._rows if row.shown} - set(without)
        stamps = np.array(sorted(shown), dtype=np.int64)
        return self._build(stamps, self._seconds(stamps), **told)

    def _seconds(self, stamps: np.ndarray) -> np.ndarray:
        return stamps.astype(np.float64) * self._unit - self._zero

    def _build(self, stamps: np.ndarray, starts: np.ndarray, **told: object) -> Timeline:
        step = float(np.median(np.diff(starts))) if len(starts) > 1 else 1 / self._rate
        until = self._last_until() if len(starts) else 0.0
        return Timeline(stamps, starts, step, self._zero, until, rateless=self._format in _RATELESS, **told)

    def _last_until(self) -> float:
        """Seconds to which the last frame is shown, as far as its packet or the header of a whole file says."""
        if self._alone and ((self._format == "flv" and stated_bytes(self.path, "flv")) or "matroska" in self._format):
            return self._stated - self._zero
        if not self._format.startswith(_TIMED):
            return 0.0
        shown = [row for row in self._rows if row.shown and row.pts is not None]
        last = max(shown, key=lambda row: row.pts, default=None)
        until = last.pts + last.lasts if last else 0
        if self._ends is not None:  # an edit list may end within the frame
            until = min(until, self._ends)
        return until * self._unit - self._zero

    def decode(self, frames: Iterable[av.VideoFrame | None]) -> Timeline:
        """As a sequential read of the whole file has it.

        Args:
            frames: every frame in the order in which it comes, None for a packet that cannot be decoded.

        Raises:
            MediaError: nothing can be decoded.
        """
        seen: list[int | None] = []
        faults, begun = 0, self._rows[0].key
        for frame in frames:
            clean = frame is not None and not frame.is_corrupt
            faults += not clean and begun  # what comes before, of a file that begins within a group, is no damage
            begun = begun or clean
            if frame is not None:
                seen.append(frame.pts)
        faults = max(faults, self._torn)
        if not seen:
            cause = f"none of its frames can be decoded (it claims {len(self._rows)}): the data are damaged"
            raise MediaError(self.path, cause, REENCODE)
        if self.tell and None not in seen and seen == sorted(set(seen) & set(self.timeline().stamps.tolist())):
            missing = set(self.timeline().stamps.tolist()) - set(seen)
            # What comes before the first frame leans on one that is not in the file; a packet of a few bytes says
            # that the frame before it stays. Neither is shown, and neither is damage.
            first = min(seen)
            hidden = {row.pts for row in self._rows if row.size <= _NOTHING or row.pts < first} & missing
            return self.timeline(without=hidden, lost=tuple(sorted(missing - hidden)), faults=faults)
        if self._format in _UNTIMED:
            times = sorted(row.dts for row in self._rows if row.shown and row.dts is not None)[: len(seen)]
        else:
            times = [moment for moment in seen if moment is not None]
        starts = self._seconds(np.array(times, dtype=np.int64))
        back = int((np.diff(starts) <= 0).sum())
        if len(starts) == len(seen) and back <= _ODD_TIMES * len(seen):
            # A time said twice belongs to two frames that follow each other at once.
            starts = np.maximum.accumulate(starts) + 1e-6 * np.arange(len(starts)) * bool(back)
        else:  # times that are missing or go back: frames follow each other at the file's rate
            starts = (starts[0] if len(starts) else 0.0) + np.arange(len(seen)) / self._rate
        return self._build(np.arange(len(seen), dtype=np.int64), starts, in_order=True, faults=faults)


def _is_closed(packet: av.Packet, stream: VideoStream) -> bool:
    """Whether frames shown after a key frame need nothing from before it: of H.264 only an IDR picture promises that.

    Units stand behind their lengths (mp4, mkv) or behind start codes (ITU-T H.264, 7.3.1 and Annex B).
    """
    if stream.codec_context.name != "h264":
        return True
    data, extradata = bytes(packet), stream.codec_context.extradata
    if not extradata or extradata[0] != 1:
        return any(data[at + 3 : at + 4] and data[at + 3] & 31 == _IDR for at in _start_codes(data))
    size, at = (extradata[4] & 3) + 1, 0
    while at + size < len(data):
        if data[at + size] & 31 == _IDR:
            return True
        at += size + int.from_bytes(data[at : at + size], "big")
    return False


def _start_codes(data: bytes) -> Iterator[int]:
    at = data.find(b"\0\0\1")
    while at >= 0:
        yield at
        at = data.find(b"\0\0\1", at + 3)


def decoded_frames(
    path: Path, stream: VideoStream, packets: Iterator[av.Packet], count: int
) -> Iterator[av.VideoFrame | None]:
    """Every frame of these packets in the order of presentation; None for a packet that cannot be decoded.

    One thread decodes: clips are the parallelism, and every error belongs to its packet. `count` packets, at most.

    Raises:
        MediaError: the decoder stalls.
    """
    decoder = stream.codec_context
    deadline = Deadline(path, pixels=count * decoder.width * decoder.height)
    ended = False
    while not ended:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, ValueError):
            packet = None
            yield None
        ended = packet is None
        if packet is not None and not packet.size:
            continue
        try:
            yield from decoder.decode(packet)
        except av.EOFError:
            return
        except (av.FFmpegError, ValueError):
            if packet is None or not bytes(packet).startswith(_OGG_HEADERS):
                yield None
        deadline.check()
