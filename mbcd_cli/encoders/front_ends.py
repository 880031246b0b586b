"""What becomes of samples before the first layer, as the owners' extractors compute it: in float64, on any device.

A device without float64 (MPS) has the processor do it: in float32 a quiet mel band would drown in the rounding of a
loud one.

Letters: B clips, n samples, T frames of sound, F mel bands.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

_WINDOW, _HOP, FBANK_FFT = 400, 160, 512
_PREEMPHASIS = 0.97
_FLOOR = 2.0**-23


class _InDouble(nn.Module):
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _InDouble:
        """Moves the constants with the module, but to MPS."""
        return self if fn(torch.empty(0)).device.type == "mps" else super()._apply(fn, recurse)


def _in_double(x: torch.Tensor) -> torch.Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


class KaldiFbank(_InDouble):
    """Kaldi's logarithmic mel filter bank, padded or cut to T frames and normalised, as AST's extractor does it.

    Args:
        filters: [257, F], from frequencies to mel bands. frames: T. mean, std: (x - mean) / (2 std); None leaves x.
    """

    def __init__(self, filters: np.ndarray, *, frames: int, mean: float | None, std: float | None) -> None:
        super().__init__()
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float64), persistent=False)
        window = torch.tensor(np.hanning(_WINDOW), dtype=torch.float64)
        self.register_buffer("window", window, persistent=False)
        self.frames, self.mean, self.std = frames, mean, std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, n] -> [B, 1, T, F]."""
        pieces = _in_double(x).unfold(2, _WINDOW, _HOP)[:, :, : self.frames]
        pieces = pieces - pieces.mean(-1, keepdim=True)
        before = torch.cat([pieces[..., :1], pieces[..., :-1]], -1)  # the first sample comes before itself
        power = torch.fft.rfft((pieces - _PREEMPHASIS * before) * self.window, FBANK_FFT).abs() ** 2
        log = (power @ self.filters).clamp_min(_FLOOR).log()
        log = nn.functional.pad(log, (0, 0, 0, self.frames - log.shape[2]))
        return (log if self.mean is None else (log - self.mean) / (2 * self.std)).to(x)


class LogMel(_InDouble):
    """Mel spectrogram in decibels, as CLAP's extractor computes it.

    Args:
        filters: [w / 2 + 1, F] for frames of w samples. hop: samples from one to the next.
    """

    def __init__(self, filters: np.ndarray, *, hop: int) -> None:
        super().__init__()
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float64), persistent=False)
        hann = torch.tensor(np.hanning(2 * len(filters) - 1)[:-1], dtype=torch.float64)
        self.register_buffer("window", hann, persistent=False)
        self.hop = hop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, n] -> [B, 1, T, F], with T = n / hop + 1."""
        half = len(self.window) // 2
        pieces = nn.functional.pad(_in_double(x), (half, half), mode="reflect").unfold(2, 2 * half, self.hop)
        power = torch.fft.rfft(pieces * self.window).abs() ** 2
        return (10 * (power @ self.filters).clamp_min(1e-10).log10()).to(x)


class Standardise(nn.Module):
    """Samples of mean 0 and variance 1, clip by clip, as wav2vec 2's extractor has them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, n] -> the same."""
        return (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-7).sqrt()
