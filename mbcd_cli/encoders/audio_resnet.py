"""ResNet-18 (He et al., CVPR 2016) on log-spectrograms, as VGGSound publishes it (Chen et al., ICASSP 2020).

Letters: B clips, C channels, F frequency bins, S spectrogram steps.
"""

from __future__ import annotations

import torch
from torch import nn

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.encoders.staged import GlobalPool, StagedEncoder


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the first carries the stride."""

    def __init__(self, inside: int, out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inside, F, S] -> [B, out, F / stride, S / stride]."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class AudioStem(nn.Module):
    """A 7x7 convolution and max pooling, a stride of 2 each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, F, S] -> [B, 64, F / 4, S / 4]."""
        return self.pool(self.relu(self.bn1(self.conv1(x))))


def audio_resnet18(settings: AudioModality) -> StagedEncoder:
    """ResNet-18 on standardised log-spectrograms [B, 1, F, S] -> [B, 512].

    The stages are input, stem, layer1 to layer4, pool. `settings` holds nothing this network needs: its
    shape is that of the published weights.
    """
    stages: dict[str, nn.Module] = {"input": nn.Identity(), "stem": AudioStem()}
    inside = 64
    for i in range(4):
        out = 64 * 2**i
        stages[f"layer{i + 1}"] = nn.Sequential(
            BasicBlock(inside, out, stride=1 if i == 0 else 2), BasicBlock(out, out, stride=1)
        )
        inside = out
    return StagedEncoder({**stages, "pool": GlobalPool()}, dim=inside)
