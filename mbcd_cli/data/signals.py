"""Decoding sound (soundfile) and plain tensors (numpy) into arrays.

Letters: S samples, T steps, D values.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile

from mbcd_cli.data.containers import REENCODE, REPLACE, check_present, check_wav
from mbcd_cli.data.media import Notes, frame_times, tolerate
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
        start, stop = frame_times(media, dataset)
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


def read_array(media: Media) -> np.ndarray:
    """A plain tensor, [D] or [T, D], as float32. Spans are not applied: a file holds one clip.

    Raises:
        MediaError: missing, empty, not a .npy of numbers, of another shape, or with values that are not finite.
    """
    array = load_npy(media.path)
    if array.dtype.kind not in "fiub":
        raise MediaError(media.path, f"it holds {array.dtype} where real numbers are expected", REPLACE)
    if array.ndim not in (1, 2):
        raise MediaError(media.path, f"shape {array.shape} where [D] or [T, D] is expected", "Store one clip per file.")
    if array.size == 0:
        raise MediaError(media.path, f"it holds no values (shape {array.shape})", REPLACE)
    with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite, and is reported below
        values = np.asarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise MediaError(media.path, f"{bad} of {values.size} values are not finite (NaN or infinity)", REPLACE)
    return values


def load_npy(path: Path) -> np.ndarray:
    check_present(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy's parser raise almost anything
        text = str(error)
        if "allow_pickle" in text or "Python objects" in text:
            raise MediaError(path, "it holds pickled Python objects, which are never loaded", REPLACE) from None
        raise MediaError(path, "not a readable .npy file, or cut short", REPLACE) from None
    if not isinstance(array, np.ndarray):  # an .npz archive
        raise MediaError(path, "an archive where a single array (.npy) is expected", "Store one .npy per clip.")
    return array
