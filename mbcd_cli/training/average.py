"""The average of the student's weights: exponential (Eq. 7), or the simple mean from a step on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mbcd_cli.methods.base import AnyModule
from mbcd_cli.model import MultiModalModel
from mbcd_cli.settings import AverageSettings

_AVERAGED = ("trunks.", "tails.", "norms.", "fused_head.")


class Average:
    """Average of the encoders and the fused head (the teacher), beginning as a copy of the student.

    Floating buffers (batch-norm statistics, of live trunks too) are averaged as well, counters are copied. Uni-modal
    heads have no average: `model_for_evaluation` carries the student's current ones, so that uni-modal accuracy can be
    reported.

    Attributes:
        model: the averaged model. start: step from which it is one. followed: averaged copies of modules of the method.

    Args:
        student: the model that is averaged; its tensors are referred to, so it must be updated in place.
        settings: its kind (not none), beta and first step.
    """

    reads_validation: ClassVar[bool] = False
    """Whether it is to be told of the student's validation loss (`validated`)."""

    def __init__(self, student: MultiModalModel, settings: AverageSettings) -> None:
        self.student = student
        self.settings = settings
        self.start = settings.start
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        self.followed: list[nn.Module] = []
        self._modules: list[tuple[nn.Module, nn.Module, tuple[str, ...]]] = [(self.model, student, _AVERAGED)]
        self._tensors: _Tensors | None = None

    def follow(self, module: AnyModule) -> AnyModule:
        """A frozen copy of one of the method's own modules, averaged like the model; the method keeps and saves it."""
        copied = copy.deepcopy(module).requires_grad_(False).eval()
        self._modules.append((copied, module, ("",)))
        self.followed.append(copied)
        return copied

    def over(self, pieces: Callable[[torch.Tensor], list[torch.Tensor]]) -> Average:
        """This average over what stands for its own and the student's tensors (`pieces`, any shapes), for `update`."""
        other, own = copy.copy(self), self.tensors

        def all_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
            return [piece for tensor in tensors for piece in pieces(tensor)]

        averages, counters = zip(*own.counters, strict=True) if own.counters else ((), ())
        counted = list(zip(all_of(averages), all_of(counters), strict=True))
        other._tensors = _Tensors(all_of(own.averages), all_of(own.students), counted)
        return other

    def moved(self) -> None:
        """Tensors of student or average lie elsewhere now."""
        self._tensors = None

    @property
    def tensors(self) -> _Tensors:
        """What is averaged."""
        if self._tensors is None:  # not before: modules may move to the device after they are followed
            self._tensors = _Tensors.of(self._modules)
        return self._tensors

    @torch.no_grad()
    def update(self, step: torch.Tensor) -> None:
        """One averaging step; call it after every optimizer step.

        Args:
            step: how many optimizer steps were done, [] on the device (a captured step reads it anew).
        """
        averages, students = self.tensors.averages, self.tensors.students
        kind, start = self.settings.kind, self.settings.start
        if kind == "ema" and start == 0:
            if averages:
                torch._foreach_lerp_(averages, students, 1 - self.settings.beta)
        elif averages:
            # A copy until `start`; then the mean of the weights after steps start to step, or the exponential one.
            # In the weights' type: a float32 weight would round an average of float64.
            after = (step - start).clamp(min=0).to(averages[0].dtype)
            one_step = torch.full_like(after, 1 - self.settings.beta)
            weight = 1 / (after + 1) if kind == "sma" else torch.where(after > 0, one_step, 1.0)
            move_towards(averages, students, weight)
        for own, counter in self.tensors.counters:
            own.copy_(counter)

    def validated(self, loss: float, step: int) -> None:
        """After step `step` the student's validation loss is `loss`; only called where `reads_validation`."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside `model`: tensors and plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

    @torch.no_grad()
    def model_for_evaluation(self) -> MultiModalModel:
        """The averaged model with the student's current uni-modal heads, in eval mode."""
        self.model.heads.load_state_dict(self.student.heads.state_dict())
        return self.model.eval()


@torch.no_grad()
def move_towards(averages: list[torch.Tensor], weights: list[torch.Tensor], share: torch.Tensor) -> None:
    """averages <- averages + share (weights - averages), share [] on their device and of their type."""
    if averages and share.device.type == "cpu":  # in one pass: a sixth of the time
        torch._foreach_lerp_(averages, weights, float(share))
    elif averages:
        difference = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(averages, difference)


class Segment:
    """The mean of the weights after every step since the last `close`; a segment is what lies between two of these.

    Args:
        device: where the weights are.
    """

    def __init__(self, device: torch.device) -> None:
        self._mean: list[torch.Tensor] = []
        self._begun = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, weights: list[torch.Tensor], step: torch.Tensor) -> None:
        """Take in the weights after an optimizer step; `step` [] is how many were done."""
        if not self._mean:
            self._mean = [value.clone() for value in weights]
        if weights:
            move_towards(self._mean, weights, 1 / (step - self._begun).to(weights[0].dtype))

    def close(self, step: int) -> tuple[int, list[torch.Tensor]]:
        """The steps of the segment that ends with step `step`, and its mean on the CPU; the next one begins."""
        steps = step - int(self._begun)
        self._begun.fill_(step)
        return steps, [value.to("cpu", copy=True) for value in self._mean]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"begun": int(self._begun), "running": self._mean}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._begun.fill_(state["begun"])
        self._mean = [value.to(self._begun.device, copy=True) for value in state["running"]]


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What is averaged: the average's floating tensors and the student's, and pairs of integer ones."""

    averages: list[torch.Tensor]
    students: list[torch.Tensor]
    counters: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, modules: Sequence[tuple[nn.Module, nn.Module, tuple[str, ...]]]) -> _Tensors:
        """All pairs of (average, student, beginnings of the names that are averaged)."""
        pairs = cls([], [], [])
        for copied, module, beginnings in modules:
            averages, students = copied.state_dict(keep_vars=True), module.state_dict(keep_vars=True)
            # Frozen weights are the student's for good.
            frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
            for key in averages:
                if not key.startswith(beginnings) or key in frozen:
                    continue
                average, student = averages[key].detach(), students[key].detach()
                if average.is_floating_point():
                    pairs.averages.append(average)
                    pairs.students.append(student)
                else:
                    pairs.counters.append((average, student))
        return pairs
