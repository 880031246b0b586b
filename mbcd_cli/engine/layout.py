"""Memory layout of convolution weights, inputs and gradients.

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
    """Give `parameter.grad` the parameter's strides: fused optimizers walk both in memory order."""
    gradient = parameter.grad
    if gradient is not None and gradient.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
