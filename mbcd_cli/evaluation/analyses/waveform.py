"""Corruptions of sound itself, severities 1 to 5: the files are decoded again, spoilt, and made into spectrograms.

Only the test view of the clips at hand is decoded, once for all corruptions.

Letters: B clips, N samples, F frequency bins, S spectrogram steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from mbcd_cli.data.modalities.audio import AudioModality, audio_view
from mbcd_cli.data.records import Clip
from mbcd_cli.encoders.staged import Parts
from mbcd_cli.evaluation.analyses.corruptions import SEVERITIES
from mbcd_cli.evaluation.analyses.robustness import Disturbance
from mbcd_cli.settings import DatasetSettings

NOISE_SNR = (20.0, 15.0, 10.0, 5.0, 0.0)
"""Signal-to-noise ratio in dB of white noise, against the clip's own mean power."""
CLIPPED_AT = (0.5, 0.3, 0.2, 0.1, 0.05)
"""Level beyond which the waveform is cut off, as a fraction of the clip's peak."""


def add_noise(samples: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """[N] with white Gaussian noise at `NOISE_SNR`; silence stays silent."""
    level = np.sqrt(np.mean(np.square(samples, dtype=np.float64))) * 10 ** (-NOISE_SNR[severity - 1] / 20)
    return samples + (level * rng.standard_normal(len(samples))).astype(samples.dtype)


def clip_peaks(samples: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """[N] cut off at `CLIPPED_AT` of its peak, as an overdriven microphone does."""
    limit = CLIPPED_AT[severity - 1] * np.abs(samples).max(initial=0.0)
    return np.clip(samples, -limit, limit)


SOUNDS: Mapping[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "sound noise": add_noise,
    "clipping": clip_peaks,
}
"""Name -> corruption of a clip's samples."""


def corrupted_sounds(
    clip: Clip,
    name: str,
    settings: AudioModality,
    corruptions: Sequence[Callable[[np.ndarray], np.ndarray]],
    *,
    dataset: DatasetSettings,
) -> list[np.ndarray]:
    """The test view of a clip's sound after each of `corruptions`, decoded once.

    Args:
        corruptions: samples of the clip [N] float32, before their level is set -> corrupted samples [N].

    Returns:
        One [1, F, S] float32 per corruption, standardised as `prepare` would have done with the corrupted file.

    Raises:
        MediaError: the file cannot be used.
    """
    _, sounds = settings.sounds(clip.media[name], [None], dataset=dataset)
    ((samples, rate),) = sounds.values()
    return [audio_view(corrupt(samples), rate, settings, None) for corrupt in corruptions]


def sound_corruptions(
    name: str, settings: AudioModality, clips: Sequence[Clip], *, dataset: DatasetSettings, seed: int = 0
) -> list[Disturbance]:
    """Every corruption of `SOUNDS` at every severity.

    Args:
        name: the modality.
        settings: as the cache was prepared.
        clips: the whole clip table, with media.
        dataset: limits on bad media.
        seed: with the clip's index, fixes its noise, which is the same, scaled, at every severity.

    Returns:
        Disturbances whose `apply` may raise MediaError: a file is gone or damaged.
    """
    kinds = [(kind, severity) for kind in SOUNDS for severity in SEVERITIES]
    held: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def spoilt(indices: tuple[int, ...]) -> list[torch.Tensor]:
        """Per kind and severity [B, 1, F, S], of one batch; the last is remembered: 0.87 s for all ten instead of 8.6 s
        (16 clips of 10 s, one CPU thread)."""
        if indices not in held:
            rows = []
            for index in indices:
                ways = [
                    partial(SOUNDS[kind], severity=severity, rng=np.random.default_rng([seed, index]))
                    for kind, severity in kinds
                ]
                rows.append(corrupted_sounds(clips[index], name, settings, ways, dataset=dataset))
            held.clear()
            held[indices] = [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]
        return held[indices]

    def disturbance(number: int) -> Disturbance:
        def apply(parts: Parts, indices: torch.Tensor) -> Parts:
            (part,) = parts
            return (spoilt(tuple(indices.tolist()))[number].to(part),)

        return Disturbance(name, *kinds[number], apply)

    return [disturbance(number) for number in range(len(kinds))]
