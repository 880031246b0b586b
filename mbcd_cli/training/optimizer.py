"""The one optimizer of tails, heads and the method's own modules, and its learning rate by epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        group["first_lr"] = group["rate"] = group.get("lr", settings.lr)
        if capturable and settings.schedule != "constant":
            group["lr"] = torch.tensor(group["first_lr"], device=trained[0].device)
    if settings.name == "sgd":
        return torch.optim.SGD(sets, momentum=settings.momentum, **common)
    betas = (settings.momentum, 0.999)
    if not fused:
        kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
        return kind(sets, betas=betas, capturable=capturable, **common)
    return Adam(sets, betas=betas, capturable=capturable, decoupled_weight_decay=settings.name == "adamw", **common)


class Adam(torch.optim.Adam):
    """torch's fused Adam (AdamW, with `decoupled_weight_decay`), bit for bit, whose step is the kernel's call alone.

    torch's own step imports torch's compiler, in order to be left out by it: 1.1 s at the start of every process
    (docs/performance.md). It also costs 0.4 ms of Python, which the hundreds of small models of a population feel.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Update everything that has a gradient."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            states = [self.state[p] or self._begun(p) for p in trained]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            update(
                trained,
                [p.grad for p in trained],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _begun(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        return self.state[parameter]


for _hidden in map(vars(torch.optim.Optimizer).get, ("add_param_group", "zero_grad", "state_dict", "load_state_dict")):
    # As in `Adam`: torch would import its compiler to hide them from it, and no compiled code of ours calls them.
    if _plain := getattr(_hidden, "__wrapped__", None):
        _plain.__dynamo_disable = _plain


def rate_factor(settings: OptimizerSettings, *, epoch: int, epochs: int) -> float:
    """What the learning rate of the first epoch is multiplied with when `epoch` of `epochs` are finished.

    cosine: from 1 along (1 + cos(pi epoch / epochs)) / 2 to least_lr / lr; step: 0.1 for each of `drops` that is over.
    """
    if settings.schedule == "cosine":
        least = settings.least_lr / settings.lr
        return least + (1 - least) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return 0.1 ** sum(epoch >= drop for drop in settings.drops) if settings.schedule == "step" else 1.0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Learning rates of the first epoch times `factor`, in place where they are tensors: a captured step reads them.

    What they are stands beside them (`rate`), for those who would have to wait for a tensor.
    """
    for group in optimizer.param_groups:
        rate = group["rate"] = group["first_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def multiplied_changes(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """What the block changes of a tensor, times its factor; a factor of 1 changes no bit.

    Operation by operation, so that a row rounds alike whatever lies beside it in a stacked tensor.

    Args:
        parts: (tensor [*], factor that spreads over it).
    """
    before = [tensor.detach().clone() for tensor, _ in parts]
    yield
    with torch.no_grad():
        for (tensor, factor), first in zip(parts, before, strict=True):
            tensor += (factor - 1) * (tensor - first)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state with the moments of all parameters, one after another, as one tensor of each name.

    torch takes 0.05 ms to save a tensor, and a small model has a hundred of them (docs/performance.md).
    """
    state = optimizer.state_dict()
    each = state["state"]
    names = [name for name, value in next(iter(each.values()), {}).items() if value is not None]
    flat = {name: torch.cat([torch.as_tensor(one[name]).reshape(-1) for one in each.values()]) for name in names}
    return {"param_groups": state["param_groups"], "of": list(each), "moments": flat}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` returned; rates and options stay what the settings say.

    Raises:
        ValueError: it belongs to another optimizer.
    """
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    of = [parameters[at] for at in state["of"]]
    each: list[dict[str, torch.Tensor]] = [{} for _ in of]
    for name, flat in state["moments"].items():
        sizes = [1 if name == "step" else parameter.numel() for parameter in of]
        if flat.shape != (sum(sizes),):
            raise ValueError("the optimizer's moments are not those of the weights")
        for one, parameter, part in zip(each, of, flat.split(sizes), strict=True):
            one[name] = part[0] if name == "step" else torch.empty_like(parameter).copy_(part.view_as(parameter))
    states = dict(zip(state["of"], each, strict=True))
    optimizer.load_state_dict({"state": states, "param_groups": state["param_groups"]})
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
