"""SlowOnly-R50 and SlowFast-R101 (Feichtenhofer et al., ICCV 2019), as OpenMMLab publishes them.

Letters: B clips, C channels, T frames, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders.convolution import Conv3d
from mbcd_cli.encoders.staged import GlobalPool, Normalise, StagedEncoder

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Whether a layer's blocks look along time (3x1x1 in their first convolution).
SLOW_TEMPORAL = (False, False, True, True)
FAST_TEMPORAL = (True, True, True, True)
EXPANSION = 4
SPEED = 4
"""Frames of the fast path per frame of the slow path: 8x8 takes 8 of 32 frames."""
FAST_FRACTION = 8
"""The fast path has this fraction of the slow path's channels."""

_Paths = tuple[torch.Tensor, torch.Tensor]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm and, where asked for, ReLU: [B, C, T, H, W] -> [B, out, ...]."""

    def __init__(
        self,
        inside: int,
        out: int,
        kernel: Sequence[int],
        *,
        stride: Sequence[int] = (1, 1, 1),
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.conv = Conv3d(inside, out, tuple(kernel), tuple(stride), padding, bias=False)
        self.bn = nn.BatchNorm3d(out)
        self.relu = nn.ReLU(inplace=True) if relu else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, out, T, H / stride, W / stride]."""
        x = self.bn(self.conv(x))
        return x if self.relu is None else self.relu(x)


class Bottleneck(nn.Module):
    """Residual block (3x1x1 or 1x1x1) - 1x3x3 - 1x1x1; the 1x3x3 convolution carries the spatial stride."""

    def __init__(self, inside: int, width: int, *, stride: int, temporal: bool) -> None:
        super().__init__()
        out, strides = width * EXPANSION, (1, stride, stride)
        self.conv1 = ConvNorm(inside, width, (3, 1, 1) if temporal else (1, 1, 1))
        self.conv2 = ConvNorm(width, width, (1, 3, 3), stride=strides)
        self.conv3 = ConvNorm(width, out, (1, 1, 1), relu=False)
        reshaped = stride != 1 or inside != out
        self.downsample = ConvNorm(inside, out, (1, 1, 1), stride=strides, relu=False) if reshaped else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inside, T, H, W] -> [B, 4 width, T, H / stride, W / stride]."""
        out = self.conv3(self.conv2(self.conv1(x)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def _layer(inside: int, width: int, blocks: int, *, stride: int, temporal: bool) -> nn.Sequential:
    first = Bottleneck(inside, width, stride=stride, temporal=temporal)
    others = [Bottleneck(width * EXPANSION, width, stride=1, temporal=temporal) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


class VideoStem(nn.Module):
    """conv1 and the spatial max pooling: [B, C, T, H, W] -> [B, width, T, H / 4, W / 4]."""

    def __init__(self, inside: int, width: int, *, frames: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inside, width, (frames, 7, 7), stride=(1, 2, 2))
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, width, T, H / 4, W / 4]."""
        return self.pool(self.conv1(x))


class SplitPaths(nn.Module):
    """Normalise, then hand every `SPEED`-th frame to the slow path and all frames to the fast path."""

    def __init__(self, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, x: torch.Tensor) -> _Paths:
        """uint8 RGB [B, 3, T, H, W] -> (slow [B, 3, T / 4, H, W], fast [B, 3, T, H, W])."""
        x = self.normalise(x)
        return x[:, :, : x.shape[2] - x.shape[2] % SPEED : SPEED], x


class TwoPaths(nn.Module):
    """One stage of SlowFast: the two paths side by side."""

    def __init__(self, slow: nn.Module, fast: nn.Module) -> None:
        super().__init__()
        self.slow = slow
        self.fast = fast

    def forward(self, parts: _Paths) -> _Paths:
        """(slow, fast) -> (slow, fast)."""
        return self.slow(parts[0]), self.fast(parts[1])


class Lateral(nn.Module):
    """Lateral connection: a convolution along time brings the fast path to the slow path's rate."""

    def __init__(self, fast_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(fast_channels, 2 * fast_channels, (7, 1, 1), (SPEED, 1, 1), (3, 0, 0), bias=False)

    def forward(self, parts: _Paths) -> _Paths:
        """(slow [B, C, T / 4, H, W], fast [B, c, T, H, W]) -> (slow with 2 c more channels, fast)."""
        slow, fast = parts
        return torch.cat((slow, self.conv(fast)), dim=1), fast


class PathsPool(nn.Module):
    """Mean over positions of both paths, the fast path's features first (the published head's order)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = GlobalPool()

    def forward(self, parts: _Paths) -> torch.Tensor:
        """(slow [B, 2048, ...], fast [B, 256, ...]) -> [B, 2304]."""
        slow, fast = parts
        return torch.cat((self.pool(fast), self.pool(slow)), dim=1)


def slowonly_r50(settings: FlowModality) -> StagedEncoder:
    """SlowOnly-R50 on uint8 flow [B, 2, T, H, W] -> [B, 2048]; stages input, stem, layer1 to layer4, pool."""
    stages: dict[str, nn.Module] = {
        "input": Normalise([settings.mean] * 2, [settings.std] * 2, dims=5),
        "stem": VideoStem(2, 64, frames=1),
    }
    inside = 64
    for i, blocks in enumerate(BLOCKS[50]):
        width = 64 * 2**i
        stages[f"layer{i + 1}"] = _layer(inside, width, blocks, stride=1 if i == 0 else 2, temporal=SLOW_TEMPORAL[i])
        inside = width * EXPANSION
    return StagedEncoder({**stages, "pool": GlobalPool()}, dim=inside)


def slowfast_r101(settings: VideoModality) -> StagedEncoder:
    """SlowFast-R101 8x8 on uint8 RGB [B, 3, T, H, W] (T a multiple of 4; 32 as published) -> [B, 2304].

    Between `input` and `pool` a stage takes and returns (slow, fast). Before each of layer1 to layer4 stands
    its lateral connection, lateral1 to lateral4: `cut("layer4")` caches what comes before lateral4 and
    recomputes that connection, frozen, in the tail (256 channels fewer to store, for 0.7 GFLOP).
    """
    blocks = BLOCKS[101]
    stages: dict[str, nn.Module] = {
        "input": SplitPaths(Normalise(settings.mean, settings.std, dims=5)),
        "stem": TwoPaths(VideoStem(3, 64, frames=1), VideoStem(3, 64 // FAST_FRACTION, frames=5)),
    }
    slow, fast = 64, 64 // FAST_FRACTION
    for i in range(4):
        stride, width = (1 if i == 0 else 2), 64 * 2**i
        stages[f"lateral{i + 1}"] = Lateral(fast)
        stages[f"layer{i + 1}"] = TwoPaths(
            _layer(slow + 2 * fast, width, blocks[i], stride=stride, temporal=SLOW_TEMPORAL[i]),
            _layer(fast, width // FAST_FRACTION, blocks[i], stride=stride, temporal=FAST_TEMPORAL[i]),
        )
        slow, fast = width * EXPANSION, width * EXPANSION // FAST_FRACTION
    stages["pool"] = PathsPool()
    return StagedEncoder(stages, dim=slow + fast, recomputed=[f"lateral{i + 1}" for i in range(4)])
