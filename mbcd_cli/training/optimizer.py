"""The one optimizer of tails, heads and the method's own modules, and its learning rate by epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
        capturable: keep the step count on the GPU, and a learning rate that is to change, so that a CUDA graph can hold
            the update.
    """
    trained = [p for p in parameters if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in trained)
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": fused}
    apart = {id(p) for group in groups for p in group.parameters}
    sets = [{"params": [p for p in trained if id(p) not in apart]}]
    for group in groups:
        own = {"lr": group.lr, "weight_decay": group.weight_decay}
        sets.append({"params": list(group.parameters), **{k: v for k, v in own.items() if v is not None}})
    for group in sets:
        group["first_lr"] = group.get("lr", settings.lr)
        if capturable and settings.schedule != "constant":
            group["lr"] = torch.tensor(group["first_lr"], device=trained[0].device)
    if settings.name == "sgd":
        return torch.optim.SGD(sets, momentum=settings.momentum, **common)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(sets, betas=(settings.momentum, 0.999), capturable=capturable, **common)


def rate_factor(settings: OptimizerSettings, *, epoch: int, epochs: int) -> float:
    """What the learning rate of the first epoch is multiplied with when `epoch` of `epochs` are finished.

    cosine: from 1 along (1 + cos(pi epoch / epochs)) / 2 to least_lr / lr; step: 0.1 for each of `drops` that is over.
    """
    if settings.schedule == "cosine":
        least = settings.least_lr / settings.lr
        return least + (1 - least) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return 0.1 ** sum(epoch >= drop for drop in settings.drops) if settings.schedule == "step" else 1.0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Learning rates of the first epoch times `factor`, in place where they are tensors: a captured step reads them."""
    for group in optimizer.param_groups:
        rate = group["first_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load `state`; rates and options stay what the settings say.

    Raises:
        ValueError: it belongs to another optimizer.
    """
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
    held = {tuple(sorted(values)) for values in optimizer.state.values()}
    moments = [(one, value) for one, values in optimizer.state.items() for value in values.values()]
    if len(held) > 1 or any(isinstance(v, torch.Tensor) and v.dim() and v.shape != one.shape for one, v in moments):
        raise ValueError("the optimizer's moments are not those of the weights")
