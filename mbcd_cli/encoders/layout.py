"""Memory layout of convolution weights, inputs and gradients.

In bfloat16 a forward and a backward pass of the paper's tails, contiguous, takes 1.21 (video), 1.16 (flow) and 0.98
(sound) times the processor time of channels-last; in float32 1.06, 1.01 and 0.97 times, so weights stay as they are
there (`runtime.channels_last`; AMD EPYC with AVX-512 and bfloat16, one thread, two clips, medians of three).

Letters: C channels, T H W positions.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] or [B, C, T, H, W] with the channels innermost in memory; other tensors as they are."""
    return x.contiguous(memory_format=_FORMATS[x.dim()]) if x.dim() in _FORMATS else x


def weights_channels_last(module: nn.Module) -> None:
    """Bring every convolution weight of `module` into the channels-last layout, in place."""
    # Some kernels return gradients in another layout; `match_layout` mends that, the warning would only puzzle.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = channels_last(parameter.data)


def match_layout(parameter: nn.Parameter) -> None:
    """Give the gradient of `parameter` the parameter's strides.

    Not for speed: a fused optimizer walks both in memory order, and would mix the values up.
    """
    gradient = parameter.grad
    if gradient is None or gradient.stride() == parameter.stride():
        return
    if _order(gradient) == _order(parameter):
        parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())
    else:
        parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def _order(x: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the axes that have more than one place: what the memory looks like."""
    return [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
