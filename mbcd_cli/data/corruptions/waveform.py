"""Corruptions of sound: samples before their level is set and their spectrogram taken.

White noise and babble at a signal-to-noise ratio (babble as x-vectors are trained with it, of five voices, which are
other clips of the dataset), reverberation, clipping, a band limit, lost packets.

Letters: n samples, K voices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mbcd_cli.data.corruptions import Corrupt

RATIO = (20.0, 15.0, 10.0, 5.0, 0.0)
"""Signal-to-noise ratio in dB of noise and babble, against the clip's own mean power."""
BABBLE = "babble"
VOICES, POOL = 5, 16
"""Clips that babble at once, and of how many, spread over the dataset, they are taken."""
Voices = Callable[[], Sequence[np.ndarray]]
"""The sounds [n] of other clips, at the clip's rate."""


def _power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0


def _added(samples: np.ndarray, noise: np.ndarray, ratio: float) -> np.ndarray:
    """Samples with `noise` at a ratio in dB; silence stays silent."""
    power = _power(noise)
    gain = np.sqrt(_power(samples) / power) * 10 ** (-ratio / 20) if power else 0.0
    return samples + (gain * noise).astype(samples.dtype)


def _white_noise(samples: np.ndarray, severity: int, rng: np.random.Generator, rate: int, voices: Voices) -> np.ndarray:
    """Noise of all frequencies alike."""
    return _added(samples, rng.standard_normal(len(samples)), RATIO[severity - 1])


def _babble(samples: np.ndarray, severity: int, rng: np.random.Generator, rate: int, voices: Voices) -> np.ndarray:
    """Other clips at once, equally loud, each repeated from a random moment of it on."""
    heard = [voice / np.sqrt(power) for voice in voices() if (power := _power(voice))]
    chosen = [heard[k] for k in rng.permutation(len(heard))[:VOICES]]
    told = [np.resize(np.roll(voice, rng.integers(len(voice))), len(samples)) for voice in chosen]
    return _added(samples, np.sum(told, axis=0) if told else np.zeros(len(samples)), RATIO[severity - 1])


def _reverberation(
    samples: np.ndarray, severity: int, rng: np.random.Generator, rate: int, voices: Voices
) -> np.ndarray:
    """A room's tail of noise that has fallen by 60 dB after so many seconds, at a ratio of direct to late sound."""
    seconds = (0.2, 0.4, 0.7, 1.0, 1.5)[severity - 1]
    at = np.arange(1, max(round(seconds * rate), 1) + 1)
    tail = np.append(0, rng.standard_normal(len(at)) * 10 ** (-3 * at / (seconds * rate)))
    room = len(samples) + len(tail)
    late = np.fft.irfft(np.fft.rfft(samples, room) * np.fft.rfft(tail, room), room)[: len(samples)]
    return _added(samples, late, (10.0, 5.0, 0.0, -5.0, -10.0)[severity - 1])


def _clipping(samples: np.ndarray, severity: int, rng: np.random.Generator, rate: int, voices: Voices) -> np.ndarray:
    """Cut off at a fraction of the clip's peak, as an overdriven microphone does."""
    limit = (0.5, 0.3, 0.2, 0.1, 0.05)[severity - 1] * np.abs(samples).max(initial=0.0)
    return np.clip(samples, -limit, limit)


def _band_limit(samples: np.ndarray, severity: int, rng: np.random.Generator, rate: int, voices: Voices) -> np.ndarray:
    """Without the frequencies above a share of those that the rate allows."""
    waves = np.fft.rfft(samples)
    waves[int((0.5, 0.35, 0.25, 0.15, 0.1)[severity - 1] * len(waves)) :] = 0
    return np.fft.irfft(waves, len(samples)).astype(samples.dtype)


def _dropouts(samples: np.ndarray, severity: int, rng: np.random.Generator, rate: int, voices: Voices) -> np.ndarray:
    """A share of the packets of 20 ms, at random, is silence."""
    packet = np.arange(len(samples)) // max(round(0.02 * rate), 1)
    count = int(packet[-1]) + 1
    lost = rng.permutation(count) < np.ceil((0.05, 0.1, 0.2, 0.35, 0.5)[severity - 1] * count)
    return np.where(lost[packet], 0, samples).astype(samples.dtype)


WAVEFORM: Mapping[str, Corrupt] = {
    "white-noise": _white_noise,
    BABBLE: _babble,
    "reverberation": _reverberation,
    "clipping": _clipping,
    "band-limit": _band_limit,
    "dropouts": _dropouts,
}
"""Name -> corruption of a clip's samples [n] float32; `rate` is in samples per second."""
