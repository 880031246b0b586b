"""The one optimizer of tails and heads."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mbcd_cli.settings import OptimizerSettings


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """Adam with coupled weight decay (the paper), AdamW or SGD, in its fused form where the device has one.

    Args:
        capturable: keep the step count on the GPU, so that a CUDA graph can hold the update.
    """
    trained = [p for p in parameters if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in trained)
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": fused}
    if settings.name == "sgd":
        return torch.optim.SGD(trained, momentum=settings.momentum, **common)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(trained, betas=(settings.momentum, 0.999), capturable=capturable, **common)
