"""Memory layout of convolution weights, inputs and gradients.

With channels-last and bfloat16 a step at the paper's shapes takes 2.1 s, contiguous in float32 3.6 s; what the layout
alone gives is measured by `tests/benchmarks/train_step.py`, whose floor is timed in both (docs/performance.md).

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
    """Give the gradient of `parameter` the parameter's strides: fused optimizers walk both in memory order."""
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


def laid_out_like(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`x` [...] in the layout of `reference` (of the same shape, contiguous or channels-last); differentiable.

    Arithmetic on two layouts walks one of them against its memory order: ten times slower than a copy first.
    """
    return x.contiguous() if reference.is_contiguous() else channels_last(x)
