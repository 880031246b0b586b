"""Noise on feature statistics (DSU): channel means and deviations move as far as they vary in the batch.

Letters: B clips of the global batch, b of them in this process (all, unless torchrun started several), C channels.
"""

from __future__ import annotations

import torch
from torch import nn

from mbcd_cli.encoders.staged import Parts
from mbcd_cli.methods.parts import full_precision
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.randomness import Randomness
from mbcd_cli.settings import Fraction, Slice

EPS = 1e-6


class FeatureNoiseSettings(Slice):
    """Feature augmentation by noise on feature statistics (DSU), in the first student pass only."""

    enabled: bool = True
    """Apply DSU."""
    probability: Fraction = 0.5
    """Probability that one call applies the noise."""


class FeatureNoise(nn.Module):
    """DSU as the `noise` callable of a tail (Li et al., ICLR 2022).

    For x [B, C, ...] with mean mu and deviation sigma over the positions, per clip and channel:
    x -> (x - mu) / sigma * (sigma + e1 S(sigma)) + mu + e2 S(mu), e1 and e2 standard normal, S the unbiased
    standard deviation over the batch, applied with a probability. All parts of a call share the draw that
    decides whether it is applied. A batch of one clip is left alone (S is undefined); where there is one
    position per channel (vectors), there is only a mean.
    """

    def __init__(self, *, settings: FeatureNoiseSettings, randomness: Randomness, group: Group = ALONE) -> None:
        super().__init__()
        self._probability = settings.probability
        self._randomness = randomness
        self._group = group

    def forward(self, parts: Parts) -> Parts:
        """Parts, each [b, C, ...] floating -> the same shapes and types."""
        if parts[0].shape[0] * self._group.world == 1:
            return parts
        # A factor of 0 or 1 rather than a branch, so that nothing waits for the device.
        coin = self._randomness.uniform(1) < self._probability
        return tuple(self._perturb(part, coin) for part in parts)

    def _perturb(self, part: torch.Tensor, coin: torch.Tensor) -> torch.Tensor:
        x = full_precision(part)
        shape = tuple(x.shape[:2])
        coin = coin.to(x.dtype)
        positions = tuple(range(2, x.dim()))
        if x[0, 0].numel() == 1:
            shift = coin * self._normal(shape, x.dtype) * self._deviation(x.reshape(shape))
            return (x + shift.reshape(x.shape)).to(part.dtype)
        variance, mean = _var_mean(x, positions)
        std = (variance + EPS).sqrt()
        noise_mean = self._normal(shape, x.dtype)
        noise_std = self._normal(shape, x.dtype)
        # The class's formula as one multiply and one add per position: x (1 + a) + (e2 S(mu) - mu a).
        a = coin * noise_std * self._deviation(std) / std
        shift = coin * noise_mean * self._deviation(mean) - mean * a
        spread = (*shape, *([1] * len(positions)))
        return torch.addcmul(shift.reshape(spread), x, (1 + a).reshape(spread)).to(part.dtype)

    def _normal(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Draws for this process' rows: [b, C], cut from the global batch's."""
        clips, channels = shape
        return self._group.own(self._randomness.normal(clips * self._group.world, channels, dtype=dtype))

    def _deviation(self, statistic: torch.Tensor) -> torch.Tensor:
        """Unbiased standard deviation over the global batch: [b, C] -> [1, C]."""
        everyones = self._group.gather(statistic)
        centred = everyones - everyones.mean(dim=0, keepdim=True)
        return (centred.square().sum(dim=0, keepdim=True) / (len(everyones) - 1) + EPS).sqrt()


def _var_mean(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unbiased variance and mean over `dims`."""
    if x.device.type != "cpu":
        return torch.var_mean(x, dim=dims)
    # torch's own takes one value after the other on a CPU; two passes were 3 to 15 times quicker, 0.015 s
    # instead of 0.07 s of a step (docs/performance.md).
    mean = x.mean(dims, keepdim=True)
    count = x[0, 0].numel()
    return (x - mean).square().mean(dims) * (count / (count - 1)), mean.flatten(1)
