"""Sound of files as one channel of samples.

soundfile reads what has its samples lie where a header says (wav, flac, aiff, w64, caf, ...), and seeks in it. All else
(sound inside video files, mp3, Ogg, aac, ...) is decoded from its beginning (`soundtrack`). The second 0 of a span is
the beginning of the file: of its picture or its sound, whichever comes first.

Letters: S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile

from mbcd_cli.data.media.checks import REPLACE, Notes, check_present, tolerate
from mbcd_cli.data.media.kept import Kept
from mbcd_cli.data.media.soundtrack import Soundtrack
from mbcd_cli.data.media.timeline import open_container
from mbcd_cli.data.media.video import frame_times
from mbcd_cli.data.media.whole import check_length, check_whole
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

_HIGHEST_RATE = 1_000_000  # a damaged header may claim billions, and resampling would take as long
_ENDLESS = 2**48  # samples: what a FLAC without a length claims
_ROUNDING = 0.1  # seconds


def read_audio(
    media: Media,
    *,
    sample_rate: int | None = None,
    limit: int | None = None,
    dataset: DatasetSettings,
    notes: Notes = None,
    silent_end: bool = False,
) -> tuple[np.ndarray, int]:
    """A clip's sound, mixed down to one channel.

    Args:
        media: the file, and the span inside it.
        sample_rate: samples per second wanted; None keeps the file's.
        limit: at most this many samples are returned (and little more are read).
        dataset: `missing_frames` also says what to do with a file shorter than the span.
        notes: collects what was mended, if given.
        silent_end: a span after the end of the sound is silence (one sample of it), as far as `missing_frames` allows;
            otherwise it is an error.

    Returns:
        ([S] float32, samples per second).

    Raises:
        MediaError: missing, empty, not sound, cut short, without samples, or with samples that are not finite.
    """
    path = media.path
    with _sound(media, check_length(path)) as sound:
        rate = sound.rate
        # One second more than needed, so that the resampling filter sees what follows.
        most = np.inf if limit is None else -(-limit * rate // (sample_rate or rate)) + rate
        span = _span(media, sound, most, dataset=dataset, notes=notes, silent=silent_end)
        if span is None:
            return np.zeros(1, np.float32), sample_rate or rate
        first, last = span
        count = int(min(last - first, most))
        mono = sound.read(first, count)
        _tell_gaps(path, sound, first, first + count, dataset=dataset, notes=notes)
    bad = int((~np.isfinite(mono)).sum())
    if bad:
        raise MediaError(path, f"{bad} of {len(mono)} samples are not finite (NaN or infinity)", REPLACE)
    if sample_rate is not None and sample_rate != rate:
        from scipy.signal import resample_poly

        ratio = Fraction(sample_rate, rate)
        mono = resample_poly(mono, ratio.numerator, ratio.denominator)
        rate = sample_rate
    return np.ascontiguousarray(mono[:limit], dtype=np.float32), rate


def stored_rate(path: Path) -> int | None:
    """Samples per second that a file's header states; None where it cannot be told."""
    try:
        check_present(path)
        with path.open("rb") as file:
            head = file.read(4)
        if not _is_compressed(head):
            with soundfile.SoundFile(str(path.absolute())) as file:
                return file.samplerate
    except (MediaError, OSError):
        return None
    except (soundfile.LibsndfileError, TypeError):  # none of soundfile's formats
        pass
    try:
        with open_container(path) as container:
            return next((stream.codec_context.sample_rate for stream in container.streams.audio), None)
    except (MediaError, AttributeError):  # AttributeError: no decoder for its codec
        return None


_PROVEN = ("WAV", "WAVEX", "RF64", "FLAC", "AIFF", "AU", "CAF")
"""Of these libsndfile gives what FFmpeg decodes, sample for sample (tests/stress/test_every_sample.py)."""


class _Plain:
    """A file of which soundfile knows where every sample lies; as a `Soundtrack`."""

    begins, pauses, faults = 0, (), ()

    def __init__(self, path: Path, file: soundfile.SoundFile) -> None:
        self._path, self._file, self.rate = path, file, file.samplerate

    def close(self) -> None:
        self._file.close()

    def reach(self, _: float) -> int:
        return self._file.frames

    def read(self, first: int, count: int) -> np.ndarray:
        try:
            self._file.seek(first)
            samples = self._file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            cause = f"its data are damaged, or cut short ({error.error_string.rstrip('.')})"
            raise MediaError(self._path, cause, REPLACE) from None
        if len(samples) < count:
            cause = f"cut short: it claims {self._file.frames} samples, and {first + len(samples)} can be read"
            raise MediaError(self._path, cause, REPLACE)
        return samples.mean(axis=1)


_recordings = Kept(Soundtrack, limit=1)


@contextmanager
def _sound(media: Media, head: bytes) -> Iterator[_Plain | Soundtrack]:
    """The clip's file, open. What was decoded of a long recording is kept for the next span of it."""
    plain = _plain(media.path, head)
    with _recordings.lent(media) if plain is None else closing(plain) as sound:
        yield sound


def _is_compressed(head: bytes) -> bool:
    """Whether a file begins as Ogg does, or as mp3 and other MPEG sound: with a tag, or with eleven bits set."""
    return head.startswith((b"ID3", b"OggS")) or (head[0] == 0xFF and head[1:2] >= b"\xe0")


def _plain(path: Path, head: bytes) -> _Plain | None:
    """None where a decoder has to tell the length, or where soundfile does not know the format."""
    if _is_compressed(head):
        return None
    try:
        file = soundfile.SoundFile(str(path.absolute()))  # "-" alone would be standard input
    except (soundfile.LibsndfileError, TypeError):  # TypeError: named .raw, and nothing says how to read it
        return None
    # ffmpeg's IMA decoder rounds as the standard says, libsndfile's does not; libsndfile takes the floats of a w64 for
    # integers; a FLAC from a pipe states no length, a wav from one may state 0.
    if file.format not in _PROVEN or file.subtype.startswith(("MPEG", "IMA")) or not 0 < file.frames < _ENDLESS:
        file.close()
        return None
    try:
        if not 0 < file.samplerate <= _HIGHEST_RATE:
            raise MediaError(path, f"its header claims {file.samplerate} samples per second", REPLACE)
        if file.format == "FLAC":
            check_whole(path, "flac")
    except BaseException:
        file.close()
        raise
    return _Plain(path, file)


def _span(
    media: Media, sound: _Plain | Soundtrack, most: float, *, dataset: DatasetSettings, notes: Notes, silent: bool
) -> tuple[int, int] | None:
    """First sample and end (exclusive) of a clip's span in its file; None where it is silent as far as it may be."""
    path, rate, begins = media.path, sound.rate, sound.begins
    start, stop = frame_times(media) if media.unit == "frame" else (media.start, media.stop)
    first = 0 if start is None else round(start * rate)
    wanted = first + most if stop is None else round(stop * rate)
    total = sound.reach(max(wanted, first + 1))
    last = total if stop is None else round(stop * rate)
    if total <= 0:
        raise MediaError(path, "it has a header but no samples", REPLACE)
    cause = ""
    if first >= total:
        cause = f"the clip begins at {start:g} s, after the end of the sound ({total / rate:.2f} s)"
    elif stop is not None and last <= begins:
        cause = f"the clip ends at {stop:g} s, before the beginning of the sound ({begins / rate:.2f} s)"
    if cause and silent:
        tolerate(path, cause, dataset, notes, used="silence")
        return None
    if cause:
        raise MediaError(path, cause, "Correct the clip's start and stop, or complete the file.")
    # A time stamp may round to a few samples past the end; a tenth of a second is no longer rounding.
    length = f"{(last - first) / rate:.2f} s"
    if start is not None and begins - first > _ROUNDING * rate:
        cause = f"{(begins - first) / rate:.2f} of {length} lie before the beginning of the sound"
        tolerate(path, cause, dataset, notes, used="silence")
    if last - total > _ROUNDING * rate:
        cause = f"{(last - total) / rate:.2f} of {length} lie after the end of the sound"
        tolerate(path, cause, dataset, notes, used="the sound that is there")
    last = min(last, total)
    if last <= first:
        raise MediaError(path, "the clip's span holds no samples", "Correct the clip's start and stop.")
    return first, last


def _tell_gaps(
    path: Path, sound: _Plain | Soundtrack, first: int, last: int, *, dataset: DatasetSettings, notes: Notes
) -> None:
    """Notes what of a span is silence because the file has nothing there."""
    inside = [(at, count) for at, count in sound.pauses if at < last and at + count > first]
    if inside and notes is not None:
        seconds = sum(min(at + count, last) - max(at, first) for at, count in inside) / sound.rate
        where = f"its sound pauses at {inside[0][0] / sound.rate:.2f} s"
        notes.append(f"{path}: {where}; {seconds:.2f} s of the clip are silence")
    lost = sum(first <= at < last for at in sound.faults)
    if lost:
        cause = f"{lost} packet{'' if lost == 1 else 's'} of its sound cannot be decoded: the data are damaged"
        tolerate(path, cause, dataset, notes, used="what can be decoded")
