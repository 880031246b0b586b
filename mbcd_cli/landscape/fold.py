"""Batch norm with fixed statistics folded into the convolution or linear layer before it.

In eval mode a batch norm is affine, so conv(x; w) followed by it is one convolution with weights w * gamma / sigma and
bias beta + (b - mu) * gamma / sigma: the same function of the same parameters (and differentiable in them), with two
passes over the activations less. Without it a Hessian-vector product of all parameters takes 1.49 times as long, and a
loss 1.01 times (the model of `tests/benchmarks/landscape_speed.py`, on and off in turns, one CPU thread).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from torch import nn

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(model: nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Make `model` (a private copy) fold its batch norms while they are in eval mode; returns how many.

    Parameters and buffers keep their names. Pairs are found by running the model once: a batch norm whose
    input is the very output of a layer that no other module received. In train mode (recalibration) layers
    work as before.

    Args:
        model: changed in place.
        run: one forward pass of the model in eval mode, returning a tensor [...] that depends on all of it.
    """
    outputs: dict[int, tuple[nn.Module, torch.Tensor]] = {}
    receivers: dict[int, list[nn.Module]] = {}

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        for value in args:
            if isinstance(value, torch.Tensor) and id(value) in outputs and not list(module.children()):
                receivers.setdefault(id(value), []).append(module)

    def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if isinstance(module, _LAYERS):
            outputs[id(output)] = (module, output)  # holding it keeps its id from being used again

    leaves = [m for m in model.modules() if not list(m.children())]
    handles = [m.register_forward_pre_hook(before) for m in leaves]
    handles += [m.register_forward_hook(after) for m in leaves if isinstance(m, _LAYERS)]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    pairs = []
    layers = [layer for layer, _ in outputs.values()]
    for key, (layer, _) in outputs.items():
        norms = receivers.get(key, [])
        if len(norms) == 1 and isinstance(norms[0], BATCH_NORMS) and layers.count(layer) == 1:
            norm = norms[0]
            if norm.track_running_stats and norm.affine and not norm.training:
                pairs.append((layer, norm))
    # Checked at uneven gains: at those of a fresh batch norm (1) a wrong fold would go unnoticed.
    gains = [norm.weight.detach().clone() for _, norm in pairs]
    with torch.no_grad():
        for _, norm in pairs:
            norm.weight.mul_(torch.linspace(0.5, 1.5, len(norm.weight)).to(norm.weight))
        expected = run()
        for layer, norm in pairs:
            layer.forward = MethodType(_forward(norm), layer)
            norm.forward = MethodType(_pass, norm)
        same = torch.allclose(run(), expected, rtol=1e-3, atol=1e-6, equal_nan=True)
        for (_, norm), gain in zip(pairs, gains, strict=True):
            norm.weight.copy_(gain)
    if not same:  # an output also went where no module told of it (a plain addition)
        for pair in pairs:
            for module in pair:
                del module.forward
        return 0
    return len(pairs)


def _forward(norm: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if norm.training:
            return type(self).forward(self, x)
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale.reshape(-1, *([1] * (self.weight.dim() - 1)))
        if isinstance(self, nn.Linear):
            return nn.functional.linear(x, weight, bias)
        return self._conv_forward(x, weight, bias)

    return forward


def _pass(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return type(self).forward(self, x) if self.training else x
