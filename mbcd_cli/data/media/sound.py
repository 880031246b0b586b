"""Sound of files (soundfile) as one channel of samples.

Letters: S samples.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile

from mbcd_cli.data.media.checks import REENCODE, REPLACE, Notes, check_present, tolerate
from mbcd_cli.data.media.video import frame_times
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

_HIGHEST_RATE = 1_000_000  # a damaged header may claim billions, and resampling would take as long


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
    check_wav(path)
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate, total = file.samplerate, file.frames
            if not 0 < rate <= _HIGHEST_RATE:
                raise MediaError(path, f"its header claims {rate} samples per second", REPLACE)
            if silent_end and media.start is not None and 0 < total <= round(media.start * rate):
                tolerate(path, _late(media.start, total, rate), dataset, notes, used="silence")
                return np.zeros(1, np.float32), sample_rate or rate
            first, last = _sound_span(media, total, rate, dataset=dataset, notes=notes)
            count = last - first
            if limit is not None:
                # One second more than needed, so that the resampling filter sees what follows.
                count = min(count, -(-limit * rate // (sample_rate or rate)) + rate)
            file.seek(first)
            samples = file.read(count, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise MediaError(
            path, f"not a sound file that can be read ({error.error_string.rstrip('.')})", REENCODE
        ) from None
    if len(samples) < count:
        cause = f"cut short: it claims {total} samples, and {first + len(samples)} can be read"
        raise MediaError(path, cause, REPLACE)
    bad = int((~np.isfinite(samples)).any(axis=1).sum())
    if bad:
        raise MediaError(path, f"{bad} of {len(samples)} samples are not finite (NaN or infinity)", REPLACE)
    mono = samples.mean(axis=1)
    if sample_rate is not None and sample_rate != rate:
        from scipy.signal import resample_poly

        ratio = Fraction(sample_rate, rate)
        mono = resample_poly(mono, ratio.numerator, ratio.denominator)
        rate = sample_rate
    return np.ascontiguousarray(mono[:limit], dtype=np.float32), rate


def _sound_span(media: Media, total: int, rate: int, *, dataset: DatasetSettings, notes: Notes) -> tuple[int, int]:
    if total <= 0:
        raise MediaError(media.path, "it has a header but no samples", REPLACE)
    start, stop = media.start, media.stop
    if media.unit == "frame":
        start, stop = frame_times(media)
    first = 0 if start is None else round(start * rate)
    last = total if stop is None else round(stop * rate)
    if first >= total:
        raise MediaError(media.path, _late(start, total, rate), "Correct the clip's start, or complete the file.")
    if last > total:
        # A time stamp may round to a few samples past the end; a tenth of a second is no longer rounding.
        if last - total > 0.1 * rate:
            cause = f"{(last - total) / rate:.2f} of {(last - first) / rate:.2f} s lie after the end of the sound"
            tolerate(media.path, cause, dataset, notes, used="the sound that is there")
        last = total
    if last <= first:
        raise MediaError(media.path, "the clip's span holds no samples", "Correct the clip's start and stop.")
    return first, last


def _late(start: float, total: int, rate: int) -> str:
    return f"the clip begins at {start:g} s, after the end of the sound ({total / rate:.2f} s)"


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
