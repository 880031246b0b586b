"""Common corruptions of decoded input, severities 1 to 5, for modalities whose cache is cut at the input.

Frames are corrupted as pixels (uint8, clipped to 0..255 again), after ImageNet-C's kinds: the cache holds the decoded
frames themselves. Sound is corrupted as a waveform (`waveform.py`) where its files are at hand; of the standardised
log-spectrograms that the cache holds the level is lost, so that noise on them is relative to their own spread.

Letters: B clips, C channels, T frames, H W pixels, F frequency bins, S spectrogram steps, D values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders.staged import Parts
from mbcd_cli.evaluation.analyses.robustness import Disturbance, Disturbed, clip_noise
from mbcd_cli.json_values import OPTIONAL

Corruption = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
"""(part [B, ...], clips [B], severity 1..5, seed) -> corrupted part, of the same shape and type."""
SEVERITIES = (1, 2, 3, 4, 5)
SPECTROGRAM_NOISE = "spectrogram noise"

NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation of pixel noise, in units of the full range 255 (ImageNet-C)."""
BLUR = (0.01, 0.015, 0.02, 0.03, 0.045)
"""Standard deviation of the blur, as a fraction of the frame's short side."""
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Added to every pixel, in units of 255 (ImageNet-C)."""
CONTRAST = (0.6, 0.45, 0.3, 0.2, 0.12)
"""Factor on the distance of every pixel from the frame's mean."""
DROPPED = (0.1, 0.25, 0.5, 0.7, 0.9)
"""Fraction of frames lost (the frame before stands still), or of spectrogram steps or values set to zero."""
BANDS = (0.1, 0.2, 0.3, 0.45, 0.6)
"""Fraction of the frequency bins, in one band, set to zero (the standardised mean)."""
SNR = (10.0, 5.0, 0.0, -5.0, -10.0)
"""Signal-to-noise ratio in dB of noise on spectrograms and vectors, against their own spread."""


@dataclass(frozen=True, slots=True)
class Soundless:
    """Modalities whose sound was corrupted as its spectrogram only, and why."""

    modalities: list[str]
    why: str


@dataclass(frozen=True, slots=True)
class Corrupted(Disturbed):
    """A set of clips under corruptions; `left_out` names the modalities whose cache holds no decoded media."""

    without_sound: Soundless | None = field(default=None, metadata=OPTIONAL)
    left_out: list[str] | None = field(default=None, metadata=OPTIONAL)


def _pixels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(0, 255).to(like.dtype)


def pixel_noise(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Gaussian noise on every pixel of frames [B, C, T, H, W]."""
    noise = clip_noise(part, clips, seed=seed)
    return _pixels(part.float() + 255 * NOISE[severity - 1] * noise, part)


def blur(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Gaussian blur of every frame of [B, C, T, H, W]; borders are mirrored."""
    *_, height, width = part.shape
    sigma = BLUR[severity - 1] * min(height, width)
    radius = min(max(1, round(3 * sigma)), min(height, width) - 1)
    at = torch.arange(-radius, radius + 1, dtype=torch.float32, device=part.device)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    frames = part.float().transpose(1, 2).reshape(-1, 1, height, width)
    frames = functional.pad(frames, (radius, radius, radius, radius), mode="reflect")
    frames = functional.conv2d(frames, kernel.reshape(1, 1, 1, -1))
    frames = functional.conv2d(frames, kernel.reshape(1, 1, -1, 1))
    b, c, t = part.shape[:3]
    return _pixels(frames.reshape(b, t, c, height, width).transpose(1, 2), part)


def brightness(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Frames [B, C, T, H, W] made brighter."""
    return _pixels(part.float() + 255 * BRIGHTNESS[severity - 1], part)


def contrast(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Frames [B, C, T, H, W] drawn towards each frame's mean."""
    values = part.float()
    mean = values.mean(dim=(1, 3, 4), keepdim=True)
    return _pixels(mean + CONTRAST[severity - 1] * (values - mean), part)


def frame_drop(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Frames of [B, C, T, H, W] lost at random moments: the last frame received stands still. Frame 0 arrives."""
    frames = part.shape[2]
    at = torch.arange(frames, device=part.device)
    lost = _uniform(clips, frames, seed, part.device) < DROPPED[severity - 1]
    # A lost frame 0 counts as received: there is nothing before it to stand still.
    shown = torch.where(lost, 0, at).cummax(dim=1).values
    return torch.stack([clip[:, index] for clip, index in zip(part, shown, strict=True)])


def spread_noise(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Gaussian noise at a given ratio to the standard deviation of the clip's own values; any [B, ...]."""
    values = part.float()
    spread = values.flatten(1).std(1, unbiased=False).reshape(-1, *[1] * (part.ndim - 1))
    sigma = 10 ** (-SNR[severity - 1] / 20)
    return (values + sigma * spread * clip_noise(values, clips, seed=seed)).to(part.dtype)


def step_drop(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """One run of spectrogram steps of [B, 1, F, S] set to zero at a random place."""
    return _run_drop(part, clips, DROPPED[severity - 1], seed)


def band_drop(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """One band of frequency bins of [B, 1, F, S] set to zero at a random place."""
    return _run_drop(part.transpose(-1, -2), clips, BANDS[severity - 1], seed).transpose(-1, -2)


def value_drop(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Single values of vectors or sequences [B, ...] set to zero at random."""
    chance = _uniform(clips, part[0].numel(), seed, part.device).reshape(part.shape)
    return torch.where(chance < DROPPED[severity - 1], torch.zeros_like(part), part)


def _uniform(clips: torch.Tensor, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """[B, count] uniform in 0..1; a clip's row depends on (seed, clip) alone."""
    rows = [np.random.default_rng([seed, clip]).random(count, dtype=np.float32) for clip in clips.tolist()]
    return torch.from_numpy(np.stack(rows)).to(device)


def _run_drop(part: torch.Tensor, clips: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    length = part.shape[-1]
    width = round(fraction * length)
    start = (_uniform(clips, 1, seed, part.device) * (length - width + 1)).floor()
    at = torch.arange(length, device=part.device)[None]
    gone = (at >= start) & (at < start + width)
    return part.masked_fill(gone.reshape(len(part), *[1] * (part.ndim - 2), length), 0)


def noise(part: torch.Tensor, clips: torch.Tensor, severity: int, seed: int) -> torch.Tensor:
    """Noise on pixels [B, C, T, H, W] uint8, or on values of any [B, ...]."""
    return (pixel_noise if part.dtype == torch.uint8 else spread_noise)(part, clips, severity, seed)


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "frame drop": frame_drop,
    "brightness": brightness,
    "contrast": contrast,
    SPECTROGRAM_NOISE: spread_noise,
    "step drop": step_drop,
    "band drop": band_drop,
    "value drop": value_drop,
}
"""Name -> corruption; `Modality.corruptions` names those of a kind."""


def corruptions(name: str, modality: Modality, *, seed: int = 0) -> list[Disturbance]:
    """Every corruption of a modality at every severity; none where its cache is not cut at the input."""
    if modality.cut != "input":
        return []

    def disturbance(kind: str, severity: int) -> Disturbance:
        def apply(parts: Parts, clips: torch.Tensor) -> Parts:
            return tuple(CORRUPTIONS[kind](part, clips, severity, seed * 16 + i) for i, part in enumerate(parts))

        return Disturbance(name, kind, severity, apply)

    return [disturbance(kind, severity) for kind in modality.corruptions for severity in SEVERITIES]
