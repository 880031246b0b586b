"""Small encoders that train on a CPU in minutes: 3-D convolutions for video and flow, 2-D ones for spectrograms.

What they look for is small and anywhere (an object in the frame, a sound in the clip), so they pool peaks where it
may be and average the rest: plain global averages learnt several times slower on short clips.

Letters: B clips, C channels, T frames, H W pixels, F frequency bins, S spectrogram steps.
"""

from __future__ import annotations

import torch
from torch import nn

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders.convolution import Conv3d
from mbcd_cli.encoders.staged import Normalise, StagedEncoder


def _block3d(inside: int, out: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> list[nn.Module]:
    padding = tuple(k // 2 for k in kernel)
    return [Conv3d(inside, out, kernel, stride, padding, bias=False), nn.BatchNorm3d(out), nn.ReLU(inplace=True)]


def _block2d(inside: int, out: int, kernel: int, stride: tuple[int, int]) -> list[nn.Module]:
    return [
        nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    ]


class SpacePeak(nn.Module):
    """Largest value over the frame, mean over time: [B, C, T, H, W] -> [B, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, C]."""
        return x.flatten(3).amax(3).mean(2)


class TimePeak(nn.Module):
    """Mean over frequency, largest value over time: [B, C, F, S] -> [B, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, F, S] -> [B, C]."""
        return x.mean(2).amax(2)


def _frames_encoder(normalise: Normalise, channels: int, width: int) -> StagedEncoder:
    w = width
    return StagedEncoder(
        {
            "input": normalise,
            "layer1": nn.Sequential(*_block3d(channels, w, (1, 5, 5), (1, 2, 2)), nn.MaxPool3d((1, 2, 2))),
            "layer2": nn.Sequential(*_block3d(w, 2 * w, (3, 3, 3), (1, 1, 1)), nn.MaxPool3d((2, 2, 2))),
            "layer3": nn.Sequential(*_block3d(2 * w, 4 * w, (3, 3, 3), (1, 1, 1)), nn.MaxPool3d((1, 2, 2))),
            "layer4": nn.Sequential(*_block3d(4 * w, 8 * w, (3, 3, 3), (1, 1, 1))),
            "pool": SpacePeak(),
        },
        dim=8 * w,
    )


def small_video(settings: VideoModality) -> StagedEncoder:
    """uint8 RGB frames [B, 3, T, H, W] -> [B, 8 width]."""
    return _frames_encoder(Normalise(settings.mean, settings.std, dims=5), 3, settings.width)


def small_flow(settings: FlowModality) -> StagedEncoder:
    """uint8 flow [B, 2, T, H, W] (128 = no motion) -> [B, 8 width]."""
    normalise = Normalise([settings.mean] * 2, [settings.std] * 2, dims=5)
    return _frames_encoder(normalise, 2, settings.width)


def small_audio(settings: AudioModality) -> StagedEncoder:
    """Standardised log-spectrograms [B, 1, F, S] -> [B, 8 width]."""
    w = settings.width
    return StagedEncoder(
        {
            "input": nn.Identity(),
            "layer1": nn.Sequential(*_block2d(1, w, 5, (2, 1)), nn.MaxPool2d(2)),
            "layer2": nn.Sequential(*_block2d(w, 2 * w, 3, (1, 1)), nn.MaxPool2d(2)),
            "layer3": nn.Sequential(*_block2d(2 * w, 4 * w, 3, (1, 1)), nn.MaxPool2d(2)),
            "layer4": nn.Sequential(*_block2d(4 * w, 8 * w, 3, (1, 1))),
            "pool": TimePeak(),
        },
        dim=8 * w,
    )
