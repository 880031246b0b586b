"""The sound of a file as a decoder gives it, from its beginning on: for files whose headers cannot be trusted with its
length, and for sound inside video files.

PyAV reads it. Nothing is sought: lossy codecs carry state from one packet to the next, so that only a sequential read
gives every span the samples that the whole has. What was decoded is kept, so each second of a file is decoded once.

Letters: S samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from mbcd_cli.data.media.checks import REENCODE, REPLACE
from mbcd_cli.data.media.damage import check_undamaged
from mbcd_cli.data.media.timeline import Deadline, beginning, only_stream, open_container, packet_end
from mbcd_cli.data.media.whole import check_seconds, mp3_frames
from mbcd_cli.errors import MediaError

# Containers whose time stamps are a recorder's, not a count of what was read.
_CLOCKED = ("mov", "matroska", "mpegts", "mpeg", "flv", "asf", "nut", "mxf", "ogg")
_JITTER = 0.1  # seconds that time stamps may run ahead of the samples; more is a pause, as in ffmpeg's aresample
_LONGEST_PAUSE = 600.0  # seconds; a longer jump of the time stamps is taken for damage
_TOLERATED = 0.1  # share of the packets that may be damaged
_IN_MEMORY = 32 * 2**20  # bytes of decoded sound; more goes to a temporary file


class Soundtrack:
    """The one sound stream of a file, mixed down to one channel, on the file's own timeline.

    Args:
        path: the file.

    Attributes:
        rate: samples per second.
        begins: samples of silence before the stream's first: the picture begins earlier.
        pauses: (first sample, samples) of silence where the time stamps jump, as far as decoded.
        faults: the sample at which a packet could not be decoded, as far as decoded.

    Raises:
        MediaError: no sound, two sounds of equal standing, or none that can be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begins = 0
        self.pauses: list[tuple[int, int]] = []
        self.faults: list[int] = []
        self._container = open_container(path)
        self._kept = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (as long as `self`)
        self._there, self._packets, self._end = 0, 0, 0.0
        try:
            check_undamaged(path, self._container.format.name)
            self._stream = _pick(path, self._container)
            self._deadline = Deadline(path)
            self._blocks = self._decode()
            self._hold(next(self._blocks, None))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file and drops what was decoded."""
        self._container.close()
        self._kept.close()

    def reach(self, count: float) -> int:
        """Samples that are there, once `count` of them, or all that the file has, are decoded.

        Raises:
            MediaError: the file is cut short before them, or too much of it is damaged.
        """
        self._deadline = Deadline(self.path)
        while self._there < count and (block := next(self._blocks, None)) is not None:
            self._hold(block)
        return self._there

    def read(self, first: int, count: int) -> np.ndarray:
        """[S] float32: samples from `first` on, of those that are there."""
        self._kept.seek(4 * first)
        return np.frombuffer(self._kept.read(4 * count), np.float32)

    def _hold(self, block: np.ndarray | None) -> None:
        if block is None:
            return
        try:
            self._kept.seek(4 * self._there)
            self._kept.write(block.astype(np.float32, copy=False).data)
        except OSError as error:
            cause = f"its decoded sound does not fit into {tempfile.gettempdir()} ({error.strerror})"
            remedy = "Free some space there, name another folder with TMPDIR, or store the sound as wav."
            raise MediaError(self.path, cause, remedy) from None
        self._there += len(block)

    def _decode(self) -> Iterator[np.ndarray]:
        """[S] float32 each: the stream from its beginning to its end, with the silences that its time stamps tell."""
        zero, clocked = beginning(self._container), self._container.format.name.startswith(_CLOCKED)
        place: int | None = None  # of the next sample
        moved, lost = 0, False
        for frame in self._frames():
            if frame is None:
                lost = True
                self.faults.append(place or 0)
                continue
            if place is None:
                self.rate = frame.sample_rate
            elif frame.sample_rate != self.rate:
                cause = f"its sample rate changes from {self.rate} to {frame.sample_rate}"
                raise MediaError(self.path, cause, "Give it one rate: ffmpeg -i IN OUT.wav.")
            block = _mono(frame)
            stamp = place or 0
            if clocked and frame.pts is not None:
                stamp = round((float(frame.pts * frame.time_base) - zero) * self.rate) + moved
            if place is None:
                block, place = block[max(-stamp, 0) if -stamp > _JITTER * self.rate else 0 :], 0
                pause = self.begins = self._silence(stamp, 0)
            else:
                ahead = stamp - place
                if ahead < -_JITTER * self.rate:  # another file's beginning, joined to this one's end
                    moved -= ahead
                pause = self._silence(ahead, place) if lost or ahead > _JITTER * self.rate else 0
                if pause and not lost:
                    self.pauses.append((place, pause))
            if pause:
                yield np.zeros(pause, np.float32)
            lost = False
            place += pause + len(block)
            yield block
        if place is None:
            none = "none of its sound can be decoded" if self._packets else "it has a header but no samples"
            raise MediaError(self.path, none, REENCODE)
        self._check_whole(place)

    def _silence(self, samples: int, place: int) -> int:
        if samples > _LONGEST_PAUSE * self.rate:
            cause = f"its time stamps jump by {samples / self.rate:.0f} s at {place / self.rate:.2f} s"
            raise MediaError(self.path, cause, "Give it new ones: ffmpeg -i IN OUT.wav.")
        return max(samples, 0)

    def _frames(self) -> Iterator[AudioFrame | None]:
        """Every frame in the order of the file; None for a packet that cannot be decoded."""
        decoder = self._stream.codec_context
        began = False
        try:
            for packet in self._container.demux([self._stream, *self._container.streams.video]):
                self._deadline.check()
                self._end = max(self._end, packet_end(packet))
                if packet.stream is not self._stream:  # the empty packet that ends a stream has no other mark
                    continue
                self._packets += bool(packet.size) and not packet.is_corrupt
                try:
                    for frame in decoder.decode(packet):
                        began = True
                        yield frame
                except av.EOFError:
                    return
                except (av.FFmpegError, ValueError):
                    # Before the first frame: the file begins within what the codec needs. Tags between joined mp3
                    # files come as packets too; those of sound begin with eleven bits set.
                    if began and (not decoder.name.startswith("mp3") or memoryview(packet)[0] == 0xFF):
                        yield None
        except (av.FFmpegError, ValueError) as error:
            cause = f"its data cannot be read after {self._there / self.rate if began else 0:.2f} s ({error.strerror})"
            if self._container.format.name == "ogg":
                cause += "; streams that differ may be joined in it"
            raise MediaError(self.path, cause, "Decode it into a wav with another tool, or replace it.") from None

    def _check_whole(self, there: int) -> None:
        """All that the container promised was there; asked at the end.

        Raises:
            MediaError: it was not.
        """
        if len(self.faults) > _TOLERATED * self._packets:
            cause = f"{len(self.faults)} of its {self._packets} packets cannot be decoded: the data are damaged"
            raise MediaError(self.path, cause, REENCODE)
        kind, claimed = self._container.format.name, 0
        if kind.startswith("mov"):
            claimed = len(self._stream.index_entries)
        elif kind == "mp3":  # encoders count the packet that says so, or one that flushes them
            claimed = (mp3_frames(self.path) or 0) - 2
        if self._packets < claimed:
            cause = f"cut short: it claims {claimed} packets of sound, and {self._packets} are there whole"
            raise MediaError(self.path, cause, REPLACE)
        end = max(self._end, there / self.rate)  # packets need not say how long they are
        check_seconds(self.path, kind, (self._container.duration or 0) / 1e6, end)


def _pick(path: Path, container: InputContainer) -> AudioStream:
    """The one sound of a file, or the one that it marks as its default."""
    if not container.streams.audio:
        raise MediaError(path, "it has no sound stream", "Name a file with sound, or leave the clip out.")
    sounds = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not sounds:
        raise MediaError(path, "its sound is of a codec that cannot be decoded", REENCODE)

    def about(stream: AudioStream) -> str:
        codec = stream.codec_context
        return f"{codec.name}, {codec.channels} channels, language {stream.language or '?'}"

    return only_stream(path, sounds, what="sounds", about=about, maps="-map 0:v? -map 0:{}")


def _mono(frame: AudioFrame) -> np.ndarray:
    """One frame's samples, [S] float32 from -1 to 1, the mean of its channels."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    kind = values.dtype
    values = values.astype(np.float32 if kind.itemsize < 4 or kind == np.float32 else np.float64)
    if kind == np.uint8:
        values = (values - 128) / 128
    elif kind.kind == "i":
        values /= 2.0 ** (8 * kind.itemsize - 1)
    return values.mean(axis=0).astype(np.float32, copy=False)
