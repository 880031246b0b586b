"""The one optimizer of tails, heads and the method's own modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from mbcd_cli.methods.base import ParameterGroup
from mbcd_cli.settings import OptimizerSettings


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    settings: OptimizerSettings,
    *,
    groups: Sequence[ParameterGroup] = (),
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Adam with coupled weight decay (the paper), AdamW or SGD, in its fused form where the device has one.

    Args:
        parameters: all that train; those of `groups` are among them.
        groups: which of them have a learning rate or a weight decay of their own.
        capturable: keep the step count on the GPU, so that a CUDA graph can hold the update.
    """
    trained = [p for p in parameters if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in trained)
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": fused}
    apart = {id(p) for group in groups for p in group.parameters}
    sets = [{"params": [p for p in trained if id(p) not in apart]}]
    for group in groups:
        own = {"lr": group.lr, "weight_decay": group.weight_decay}
        sets.append({"params": list(group.parameters), **{k: v for k, v in own.items() if v is not None}})
    if settings.name == "sgd":
        return torch.optim.SGD(sets, momentum=settings.momentum, **common)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(sets, betas=(settings.momentum, 0.999), capturable=capturable, **common)
