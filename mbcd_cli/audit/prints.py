"""What a clip looks or sounds like, in few numbers that its copies share: re-encoded, cut, mirrored, louder, noisy.

A clip is decoded once, in the decoding processes of `prepare`. Frames become small grey pictures, of which the low
frequencies of a cosine transform, scaled to length 1, are a mark: brightness and contrast play no part in it. Sound is
kept as it is, at 8 kHz and for 5 seconds; its marks are spectra around its loudest moments. Of an array the mark is its
mean over steps.

Letters: T frames, D values of a mark, K marks, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mbcd_cli import checksums
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.frames import FrameModality
from mbcd_cli.data.modalities.modality import Draws, Modality, ViewParts
from mbcd_cli.data.records import Media
from mbcd_cli.settings import DatasetSettings

FRAMES, SIDE, WAVES = 32, 32, 8
"""Frames looked at of a clip, pixels of their side, and frequencies kept in each direction."""
RATE, SECONDS = 8000, 5
"""Samples per second that are kept of sound, and for how long from its beginning."""
WINDOW, HOP, BANDS, MOMENTS = 512, 128, 16, 8
"""Of the spectra of sound: samples of a window and between two, bands, and the moments that have a mark."""
_LEVEL, _SILENCE = 1.0, 1e-4
"""Grey levels, and parts of full scale, within which frames and sound are constant."""
MIRROR = np.where(np.arange(WAVES * WAVES) % WAVES % 2, -1, 1)[1:].astype(np.float32)
"""[D] signs that make the mark of a frame that of its mirror image."""


@dataclass(frozen=True, slots=True)
class Print:
    """One modality of one clip.

    Attributes:
        file: checksum of the file's bytes; empty where the clip is not a whole file.
        content: checksum of what was decoded.
        constant: what does not change in it, in words; empty where all does.
        marks: [K, D] float32; of frames and sound of length 1, none where nothing is to be seen or heard.
        wave: [S] int8, the sound; [0] of anything else.
    """

    file: str
    content: str
    constant: str
    marks: np.ndarray
    wave: np.ndarray

    @classmethod
    def of(cls, parts: ViewParts) -> Print:
        """What `Glance.views` has put into arrays."""
        return cls(*bytes(parts[0]).decode().split("|"), *parts[1:])


@dataclass(frozen=True, slots=True)
class Glance:
    """Stands for a modality where clips are decoded (`data.media.decoding`): their one view is their print."""

    of: Modality
    random: ClassVar[bool] = False

    def views(
        self, media: Media, name: str, draws: Draws, *, dataset: DatasetSettings, notes: list[str] | None
    ) -> list[ViewParts]:
        """One view: the texts of a `Print`, its marks and its wave.

        Raises:
            MediaError: the file cannot be used.
        """
        wave = np.empty(0, np.int8)
        if isinstance(self.of, FrameModality):
            content, marks, constant = _frames(self.of, media, dataset, notes)
        elif isinstance(self.of, AudioModality):
            content, marks, constant, wave = _sound(media, dataset, notes)
        else:
            content, marks, constant = _array(media, notes)
        whole = media.start is None and media.stop is None and media.path.is_file()
        files = [checksums.of_file(path) for path in (media.path, media.path_v) if path is not None] if whole else []
        texts = "|".join(["".join(files), checksums.of_bytes(content), constant])
        return [(np.frombuffer(texts.encode(), np.uint8), marks.astype(np.float32), wave)]


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, FRAMES)).round().astype(np.int64))


def _frames(
    modality: FrameModality, media: Media, dataset: DatasetSettings, notes: list[str] | None
) -> tuple[np.ndarray, np.ndarray, str]:
    import cv2

    frames = modality.read(media, _spread, dataset=dataset, notes=notes)
    grey = [frame.mean(axis=-1, dtype=np.float32) for frame in frames]
    small = np.stack([cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in grey])
    flat = small.std(axis=(1, 2)) < _LEVEL
    constant = "frames of one colour" if flat.all() else ""
    if not constant and len(small) > 1 and np.abs(small - small[0]).max() < _LEVEL:
        constant = "frames that do not change"
    return frames, marks_of(small[~flat]), constant


def marks_of(pictures: np.ndarray) -> np.ndarray:
    """Grey pictures [T, side, side] -> [T, D], the low frequencies of each but for its mean, of length 1."""
    from scipy.fft import dctn

    waves = dctn(pictures, axes=(1, 2), norm="ortho")[:, :WAVES, :WAVES].reshape(len(pictures), WAVES**2)[:, 1:]
    return unit(waves)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [*, D] scaled to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def _sound(
    media: Media, dataset: DatasetSettings, notes: list[str] | None
) -> tuple[np.ndarray, np.ndarray, str, np.ndarray]:
    from mbcd_cli.data.media.sound import read_audio

    samples, _ = read_audio(media, sample_rate=RATE, limit=RATE * SECONDS, dataset=dataset, notes=notes)
    if np.ptp(samples) < _SILENCE:
        return samples, np.empty((0, 3 * BANDS)), "sound that does not change", np.empty(0, np.int8)
    wave = samples - samples.mean()
    wave = np.rint(wave * (127 / np.abs(wave).max())).astype(np.int8)
    return samples, sound_marks(wave), "", wave


def sound_marks(wave: np.ndarray) -> np.ndarray:
    """[S] -> [K, D]: the spectra at and beside the loudest moments, each with those 4 hops before and after it."""
    from scipy.signal import find_peaks, stft

    padded = np.pad(wave.astype(np.float32), max(0, (WINDOW - len(wave)) // 2 + 1))
    _, _, spectrum = stft(padded, nperseg=WINDOW, noverlap=WINDOW - HOP, boundary="zeros")
    power = np.abs(spectrum[3:-1]) ** 2  # below 50 Hz there is hum
    edges = np.unique(np.geomspace(1, len(power), BANDS + 1).round().astype(int) - 1)
    bands = np.sqrt(np.add.reduceat(power, edges[:-1], axis=0)).T  # [moments, bands]
    loud = np.convolve(bands.sum(axis=1), np.ones(3), "same")
    peaks, _ = find_peaks(np.pad(loud, 1), distance=3)
    peaks = peaks[np.argsort(-np.pad(loud, 1)[peaks])][:MOMENTS] - 1
    # A copy may be loudest a hop earlier or later.
    peaks = np.clip((peaks[:, None] + [-1, 0, 1]).ravel(), 0, len(bands) - 1)
    beside = np.pad(bands, ((4, 4), (0, 0)))
    return unit(np.concatenate([beside[peaks + shift] for shift in (0, 4, 8)], axis=1))


def _array(media: Media, notes: list[str] | None) -> tuple[np.ndarray, np.ndarray, str]:
    from mbcd_cli.data.media.arrays import read_array

    values = read_array(media, notes)
    mean = np.atleast_2d(values).mean(axis=0, keepdims=True)
    if values.size > 1 and np.ptp(values) == 0:
        return values, mean[:0], "values that are all the same"
    return values, mean, ""


def unit_columns(marks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Marks of arrays ([1, D] each) with every column standardised over all clips, of length 1: what cosines are of."""
    values = np.concatenate(marks)
    spread = values.std(axis=0)
    rows = unit((values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)
    return list(rows[:, None])
