"""3-D convolution that takes the quick kernels on a CPU.

Letters: B clips, I and O channels, K taps along time, T H W positions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, with the same parameters and results up to rounding.

    On a CPU three kinds of convolution are handed on in another form (factors measured where torch 2.13 has AVX-512):

    - float32, K x 1 x 1 without a stride: on one thread torch prefers an unfolding and a matrix product to oneDNN's
      convolution, which was about twice as quick in both directions: a step at the paper's shapes takes 3.6 s instead
      of 6.0 s. A dilation along axes in which the kernel has one tap means nothing, and makes torch choose oneDNN.
    - bfloat16 by autocast, channels-last, 1 x 1 x 1, and K x 1 x 1 where there are fewer positions than input
      channels: as a matrix product, whose backward pass was 1.2 to 1.7 times as quick (oneDNN's weight gradient is
      slow there): a step takes 2.2 s instead of 2.4 s (docs/performance.md).
    - bfloat16 by autocast, more taps than frames: padded beforehand. oneDNN's weight gradient there holds what memory
      happened to hold (torch 2.15, AVX-512).
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        form = self._form(input)
        if form == "product":
            return _product(input, weight, bias, self.stride)
        if form == "padded":
            frames = self.padding[0]
            padded = F.pad(input, (0, 0, 0, 0, frames, frames))
            return F.conv3d(padded, weight, bias, self.stride, (0, *self.padding[1:]), self.dilation, self.groups)
        if form == "dilated":
            return F.conv3d(input, weight, bias, self.stride, self.padding, (self.dilation[0], 2, 2))
        return super()._conv_forward(input, weight, bias)

    def _form(self, x: torch.Tensor) -> str:
        taps = self.kernel_size[0]
        if x.device.type != "cpu" or x.dim() != 5 or self.padding_mode != "zeros":
            return "plain"
        low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if low and taps > x.shape[2]:
            return "padded"
        if self.kernel_size[1:] != (1, 1) or self.groups != 1 or self.stride[0] != 1:
            return "plain"
        if torch.is_autocast_enabled("cpu"):
            same = taps % 2 == 1 and self.padding == (taps // 2, 0, 0) and self.dilation == (1, 1, 1)
            few = x.shape[0] * x.shape[2:].numel() < x.shape[1] * self.stride[1] * self.stride[2]
            last = x.is_contiguous(memory_format=torch.channels_last_3d)
            return "product" if low and same and last and (taps == 1 or few) else "plain"
        return "dilated" if x.dtype == torch.float32 and self.stride == (1, 1, 1) else "plain"


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, ...]) -> torch.Tensor:
    """x [B, I, T, H, W] by weight [O, I, K, 1, 1], as many frames as before -> [B, O, T, H', W'], channels-last."""
    rows = x[:, :, :, :: stride[1], :: stride[2]].permute(0, 2, 3, 4, 1)
    frames, taps = rows.shape[1], weight.shape[2]
    if taps > 1:
        padded = F.pad(rows, (0, 0, 0, 0, 0, 0, taps // 2, taps // 2))
        rows = torch.cat([padded[:, tap : tap + frames] for tap in range(taps)], dim=-1)
    return F.linear(rows, weight.permute(0, 2, 3, 4, 1).flatten(1), bias).permute(0, 4, 1, 2, 3)
