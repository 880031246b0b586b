"""Sound as a log-spectrogram or as its samples. Letters: n samples, F frequency bins, S spectrogram columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from mbcd_cli.data.corruptions import Corrupt, Corruption
from mbcd_cli.data.modalities.frames import FrameSampling, frames_to_sample, sample_indices
from mbcd_cli.data.modalities.modality import Draws, Modality, ViewParts, each_file
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import Count, DatasetSettings, ForWeights, Fraction, NonNegative, Positive

RMS_LEVEL = 0.1
"""Root mean square to which `level = "rms"` scales a clip."""
_SILENCE = 1e-8
_RATES_OF = 1000  # files, spread over the dataset, whose rates are looked at
_SAME_RATE = 0.01  # 23.976 frames per second are 24


class AudioModality(Modality):
    """Sound as a log-spectrogram (scipy; docs/data.md), or as its samples."""

    words: ClassVar[tuple[str, ...]] = ("audio", "sound", "speech", "wav")
    suffixes: ClassVar[tuple[str, ...]] = (
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".oga",
        ".opus",
        ".aiff",
        ".aif",
        ".m4a",
        ".wma",
        ".aac",
        ".caf",
        ".w64",
    )
    also_in: ClassVar[tuple[str, ...]] = VideoModality.suffixes
    clocked: ClassVar[bool] = True
    encoder_settings: ClassVar[tuple[str, ...]] = ("front_end", "sample_rate", "samples")

    kind: Literal["audio"] = "audio"
    """Kind of the modality."""
    encoder: ForWeights[str] = "small-audio"
    """Encoder that reads this modality; `mbcd list encoders` shows them."""
    front_end: Literal["spectrogram", "waveform"] = "spectrogram"
    """A view: log-spectrogram, or the samples, for encoders with a front end of their own (without noise and mask)."""
    sample_rate: Count | None = None
    """Samples per second after resampling; default: as stored."""
    samples: Count = 160000
    """Samples taken from the clip's beginning."""
    short: Literal["repeat", "pad", "centre"] = "repeat"
    """A clip with fewer samples is repeated, or padded with silence behind it, or on both sides."""
    level: Literal["keep", "rms", "peak"] = "keep"
    """Loudness: as recorded, or scaled to a root mean square of 0.1, or to a peak of 1."""
    nperseg: Count = 512
    """Samples per spectrogram window."""
    noverlap: Annotated[int, Field(ge=0)] = 353
    """Samples by which two windows overlap."""
    log_floor: Positive = 1e-7
    """Added to the spectrogram before the logarithm."""
    noise: NonNegative = 0.05
    """Training views get uniform noise of up to this much added to the standardised spectrogram."""
    mask_bins: Annotated[int, Field(ge=0)] = 9
    """Training views have one band of this many frequency bins set to zero."""
    follow: str | None = None
    """Modality whose sampled frames fix the span of each view's sound (HAC), or another that is read; none: all."""
    follow_rate: Positive = 24.0
    """Frames per second by which the times of those frames are told."""
    followed: FrameSampling | None = None
    """Filled in from the followed modality's own settings, whenever they are at hand."""
    shift: Fraction = 0.0
    """Training views of padded clips begin at a random moment within this fraction of the free room."""

    @field_validator("follow", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value  # `--set modalities.audio.follow=`: a preset's value taken back

    @model_validator(mode="after")
    def _window_fits(self):
        if self.noverlap >= self.nperseg:
            raise ValueError(f"noverlap ({self.noverlap}) must be smaller than nperseg ({self.nperseg})")
        if self.samples < self.nperseg and self.front_end == "spectrogram":
            raise ValueError(f"samples ({self.samples}) must be at least nperseg ({self.nperseg})")
        return self

    @property
    def corruptions(self) -> Mapping[str, Corrupt]:
        """Six, of the samples."""
        from mbcd_cli.data.corruptions.waveform import WAVEFORM

        return WAVEFORM

    @property
    def guide(self) -> str | None:
        """Modality whose views' frames these views follow, if any."""
        return self.follow

    @property
    def random(self) -> bool:
        """Whether training views of the same sound may differ."""
        shifted = self.shift > 0 and self.short == "pad"
        return self.front_end == "spectrogram" or shifted or self.follow is not None

    def part_shapes(self, *, test: bool = False) -> list[tuple[tuple[int, ...], np.dtype]]:
        """One part: [1, F, S], or samples [1, n], float32."""
        if self.front_end == "waveform":
            return [((1, self.samples), np.dtype(np.float32))]
        columns = (self.samples - self.noverlap) // (self.nperseg - self.noverlap)
        return [((1, self.nperseg // 2 + 1, columns), np.dtype(np.float32))]

    def views(
        self,
        media: Media,
        name: str,
        draws: Draws,
        *,
        dataset: DatasetSettings,
        notes: list[str] | None,
        corruption: Corruption | None = None,
    ) -> list[ViewParts]:
        """One part per view: [1, F, S], or samples [1, n], float32."""
        from mbcd_cli.data.media.sound import read_audio

        generators = draws(name)
        guides = draws(self.follow) if self.follow is not None else generators
        follows = self.followed is not None and media.clock is not None
        spans = followed_spans(media, self, guides) if follows else [media] * len(guides)
        wanted = {"sample_rate": self.sample_rate, "limit": self.samples, "silent_end": follows}
        sounds = {span: read_audio(span, dataset=dataset, notes=notes, **wanted) for span in dict.fromkeys(spans)}
        if corruption is not None:
            others = [other for other in corruption.others if other != media]
            for span, (samples, rate) in sounds.items():
                voices = partial(_voices, others, rate, self.samples, dataset)
                sounds[span] = self.corrupted(samples, corruption, rate, voices), rate
        shared: dict[Media, dict[int, np.ndarray]] = {span: {} for span in sounds}
        return [
            (audio_view(*sounds[span], self, rng, shared[span]),) for span, rng in zip(spans, generators, strict=True)
        ]

    @classmethod
    def decoder(cls) -> str:
        """libsndfile of sounds, PyAV of what it does not read, and of the videos that sound follows."""
        import soundfile

        from mbcd_cli.data.media.timeline import DECODER

        return f"{DECODER}, libsndfile {soundfile.__libsndfile_version__}"

    def warnings(self, media: Sequence[Media], *, name: str) -> list[str]:
        """Of files of different sample rates, where none is set, and of videos that this follows at another rate."""
        return [*self._of_different_rates(media, name), *self._of_followed(media, name)]

    def _of_different_rates(self, media: Sequence[Media], name: str) -> Iterator[str]:
        if self.sample_rate is not None:
            return
        from mbcd_cli.data.media.sound import stored_rate

        rates = _rates(stored_rate, [item.path for item in media])
        if len(rates) < 2:
            return
        counts = ", ".join(f"{count} at {rate} Hz" for rate, count in rates.most_common())
        yield (
            f"{name}: files of different sample rates ({counts}), so that one place of a spectrogram means different "
            f"frequencies and times; --set modalities.{name}.sample_rate={rates.most_common(1)[0][0]} makes them equal"
        )

    def _of_followed(self, media: Sequence[Media], name: str) -> Iterator[str]:
        if self.follow is None:
            return
        from mbcd_cli.data.media.video import stated_rate

        rates = _rates(stated_rate, [item.clock for item in media if item.clock is not None])
        other = Counter({rate: n for rate, n in rates.items() if abs(rate / self.follow_rate - 1) > _SAME_RATE})
        if other:
            rate = other.most_common(1)[0][0]
            yield (
                f"{name}: {other.total()} of {rates.total()} videos show other than {self.follow_rate:g} frames per "
                f"second (most often {rate:g}), and the sound of a view is cut as if they did; where all are alike, "
                f"--set modalities.{name}.follow_rate={rate:g} cuts it at the frames' own times"
            )


def _rates(told: Callable[[Path], float | None], paths: Sequence[Path]) -> Counter[float]:
    """How many of these files, or of a thousand spread over them, tell which rate; some tell none."""
    paths = list(dict.fromkeys(paths))
    return Counter(rate for rate in each_file(told, paths[:: -(-len(paths) // _RATES_OF) or 1]) if rate is not None)


def _voices(clips: Sequence[Media], rate: int, limit: int, dataset: DatasetSettings) -> list[np.ndarray]:
    """Sounds [n] of other clips; those that cannot be read are silent."""
    return [voice for media in clips if len(voice := _voice(media, rate, limit, dataset))]


@lru_cache(maxsize=64)
def _voice(media: Media, rate: int, limit: int, dataset: DatasetSettings) -> np.ndarray:
    from mbcd_cli.data.media.sound import read_audio

    with suppress(MediaError):
        return read_audio(media, sample_rate=rate, limit=limit, dataset=dataset)[0]
    return np.empty(0, np.float32)


def followed_spans(media: Media, settings: AudioModality, guides: Sequence[np.random.Generator | None]) -> list[Media]:
    """Per view, the sound between the first and the last frame that the view of the video `media.clock` samples.

    Args:
        media: sound with its video as `clock`.
        settings: `followed`, as the video samples, and the rate that gives frames times.
        guides: the video views' own random numbers, of which sampling draws the first; None for the test view.

    Raises:
        MediaError: the frames cannot be told, or are a folder's whose rate nothing tells.
    """
    from mbcd_cli.data.media.checks import is_folder
    from mbcd_cli.data.media.folders import count_frames
    from mbcd_cli.data.media.video import timeline_of

    rate = settings.follow_rate
    if is_folder(media.clock):
        count, rate = count_frames(media.clock), media.rate
        if rate is None:
            cause = f"it follows the frames of {media.clock.name}/, a folder, and nothing tells their times"
            raise MediaError(media.path, cause, "Give the frames per second in a column `fps`.")
    else:
        count = len(timeline_of(media.clock))
    count -= media.computed  # flow lies between frames
    count = frames_to_sample(count, settings.followed, Media(media.clock))
    spans = []
    for rng in guides:
        pick = sample_indices(count, settings.followed, rng)
        start, stop = float(pick[0]) / rate, float(pick[-1]) / rate
        # In a clip shorter than what is sampled the last frame may come before the first: then all is heard.
        ends = {"start": start, "stop": stop} if stop > start else {"start": None, "stop": None}
        spans.append(replace(media, unit="s", clock=None, computed=0, **ends))
    return spans


def silence_before(count: int, settings: AudioModality, rng: np.random.Generator | None) -> int:
    """Samples of silence that a view puts before a clip of `count` samples."""
    room = settings.samples - count
    if settings.short == "centre":
        return max(room, 0) // 2
    if rng is None or room <= 0 or settings.short == "repeat" or settings.shift == 0:
        return 0
    return min(int(rng.random() * settings.shift * (room + 1)), room)


def fit_samples(samples: np.ndarray, settings: AudioModality, before: int = 0) -> np.ndarray:
    """Level, length and range of a clip's sound: [n] -> [`samples`] float64 within [-1, 1]; `before`: silence first."""
    taken = samples[: settings.samples].astype(np.float64)
    if settings.level != "keep":
        loudness = np.sqrt(np.mean(taken**2)) if settings.level == "rms" else np.abs(taken).max()
        if loudness > _SILENCE:
            taken = taken * ((RMS_LEVEL if settings.level == "rms" else 1.0) / loudness)
    room = settings.samples - len(taken)
    if settings.short == "repeat":
        taken = np.resize(taken, settings.samples)
    elif room:
        taken = np.pad(taken, (before, room - before))
    return np.clip(taken, -1.0, 1.0)


def audio_view(
    samples: np.ndarray,
    rate: int,
    settings: AudioModality,
    rng: np.random.Generator | None,
    shared: dict[int, np.ndarray] | None = None,
) -> np.ndarray:
    """Standardised log-spectrogram of a clip, or its samples: [n] at `rate` per second -> [1, F, S] or [1, n] float32.

    F = nperseg / 2 + 1, S = (samples - noverlap) // (nperseg - noverlap). A training view (`rng` given) then has
    uniform noise added, and one band of `mask_bins` frequency bins set to zero, the mean.
    `shared` keeps what the views of the same samples have in common, if given.
    """
    shared = {} if shared is None else shared
    before = silence_before(len(samples), settings, rng)
    if before not in shared:
        fitted = fit_samples(samples, settings, before)
        spectral = settings.front_end == "spectrogram"
        shared[before] = _spectrogram(fitted, rate, settings) if spectral else fitted
    if settings.front_end == "waveform":
        return shared[before][None].astype(np.float32)
    return _noisy_spectrogram(shared[before], settings, rng)[None].astype(np.float32)


def _spectrogram(fitted: np.ndarray, rate: int, settings: AudioModality) -> np.ndarray:
    """[samples] -> [F, S], logarithmic, of mean 0 and standard deviation 1."""
    from scipy.signal import spectrogram

    _, _, power = spectrogram(fitted, rate, nperseg=settings.nperseg, noverlap=settings.noverlap)
    log = np.log(power + settings.log_floor)
    spread = log.std()
    # Silence has the floor everywhere: it becomes zeros, not rounding noise blown up to unit variance.
    return (log - log.mean()) / spread if spread > 1e-6 else np.zeros_like(log)


def _noisy_spectrogram(view: np.ndarray, settings: AudioModality, rng: np.random.Generator | None) -> np.ndarray:
    if rng is None:
        return view
    noise = rng.uniform(-settings.noise, settings.noise, view.shape) if settings.noise else 0.0
    view = view + noise
    if settings.mask_bins:
        bins = min(settings.mask_bins, len(view))
        low = int(rng.integers(len(view) - bins + 1))
        view[low : low + bins] = 0.0
    return view
