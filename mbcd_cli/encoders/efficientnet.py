"""EfficientNet-Lite0 (Tan & Le, ICML 2019, without its attention and with ReLU6), frame by frame.

Letters: B clips, C channels, T frames, H W pixels, N = B T.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders.staged import GlobalPool, Normalise, StagedEncoder

REPEATS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks alike: how many, kernel, stride of the first, expansion, channels."""


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: what is odd of the padding goes to the right and the bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C', H / stride, W / stride], rounded up."""
        around: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            room = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            around += [room // 2, room - room // 2]
        return super().forward(F.pad(x, around))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class EachFrame(nn.Sequential):
    """Modules that see one frame at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, C', T, H', W']."""
        out = super().forward(x.transpose(1, 2).flatten(0, 1))
        return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection (Sandler et al., CVPR 2018); residual where the shape stays."""

    def __init__(self, inside: int, out: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand_conv = nn.Conv2d(inside, wide, 1, bias=False) if expansion > 1 else nn.Identity()
        self.bn0 = _norm(wide) if expansion > 1 else nn.Identity()
        self.depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn1 = _norm(wide)
        self.project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self.bn2 = _norm(out)
        self.relu = nn.ReLU6(inplace=True)
        self.expands, self.residual = expansion > 1, stride == 1 and inside == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inside, H, W] -> [N, out, H / stride, W / stride]."""
        wide = self.relu(self.bn0(self.expand_conv(x))) if self.expands else x
        out = self.bn2(self.project_conv(self.relu(self.bn1(self.depthwise_conv(wide)))))
        return x + out if self.residual else out


def efficientnet_lite0(settings: VideoModality) -> StagedEncoder:
    """EfficientNet-Lite0 on every frame of uint8 RGB [B, 3, T, H, W], averaged over frames and places -> [B, 1280].

    The stages are input, stem, block0 to block15, head, pool.
    """
    stages: dict[str, nn.Module] = {
        "input": Normalise(settings.mean, settings.std, dims=5),
        "stem": EachFrame(SameConv2d(3, 32, 3, 2, bias=False), _norm(32), nn.ReLU6(inplace=True)),
    }
    inside = 32
    for count, kernel, first, expansion, out in REPEATS:
        for stride in (first, *[1] * (count - 1)):
            block = InvertedResidual(inside, out, kernel=kernel, stride=stride, expansion=expansion)
            stages[f"block{len(stages) - 2}"] = EachFrame(block)
            inside = out
    stages["head"] = EachFrame(nn.Conv2d(inside, 1280, 1, bias=False), _norm(1280), nn.ReLU6(inplace=True))
    return StagedEncoder({**stages, "pool": GlobalPool()}, dim=1280)
