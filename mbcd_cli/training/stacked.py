"""What a method works on inside a population: draws, modules and gradients of all members at once, below vmap.

Letters: K members, B clips, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from mbcd_cli.methods.base import Context
from mbcd_cli.randomness import Randomness
from mbcd_cli.settings import Slice
from mbcd_cli.training.step import TrainStep


class StackedRandomness:
    """The draws of all members at once, each from its own generators: what `Randomness` is to one.

    Attributes:
        member: which member is asked for, [], inside vmap.
    """

    def __init__(self, draws: Sequence[Randomness]) -> None:
        self._draws = list(draws)
        self.device = draws[0].device
        self.member = torch.zeros((), dtype=torch.int64)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), float32."""
        return self._of_each(lambda draws: draws.uniform(*shape))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal of floating type `dtype`."""
        return self._of_each(lambda draws: draws.normal(*shape, dtype=dtype))

    def kept(self, *shape: int, rates: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """Dropout's factors: 0 with probability `rate`, else 1 / (1 - rate), of each member's rate."""

        def draw() -> torch.Tensor:
            ones = torch.ones(shape, dtype=dtype, device=self._draws[0].dropout.device)
            each = zip(self._draws, rates, strict=True)
            return torch.stack([draws.kept(ones, rate=rate) for draws, rate in each]).to(self.device)

        return _Stacked.apply(draw, self.member)

    def _of_each(self, draw: Callable[[Randomness], torch.Tensor]) -> torch.Tensor:
        return _Stacked.apply(lambda: torch.stack([draw(one) for one in self._draws]), self.member)


class StackedDropout(nn.Dropout):
    """nn.Dropout whose masks are those that each member would draw alone."""

    def __init__(self, rates: Sequence[float], randomness: StackedRandomness) -> None:
        super().__init__(max(rates))
        self._rates, self._randomness = rates, randomness

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        if not self.training or not self.p:
            return x
        return x * self._randomness.kept(*x.shape, rates=self._rates, dtype=x.dtype)


def replace_dropouts(module: nn.Module, like: Sequence[nn.Module], randomness: StackedRandomness) -> None:
    """Have each member's masks drawn from its own generators; `like` are the members' own modules."""
    for parent, *each in zip(list(module.modules()), *(list(one.modules()) for one in like), strict=True):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                rates = [getattr(one, name).p for one in each]
                setattr(parent, name, StackedDropout(rates, randomness).train(child.training))


# ---- gradients: autograd sees the stacked tensors below vmap, where members are rows of one sum


class StackedContext(Context):
    """What a method works on inside vmap."""

    @staticmethod
    def of_members(steps: Sequence[TrainStep], draws: Sequence[Randomness]) -> StackedContext:
        """The context of all members' steps; model and average are set by the template."""
        first = steps[0].context
        return StackedContext(
            model=first.model,
            randomness=StackedRandomness(draws),
            average=None,
            precision=first.precision,
            group=first.group,
            sources=first.sources,
            epoch=first.epoch,
            step=first.step,
        )

    def backward(self, loss: torch.Tensor) -> None:
        """See `Context.backward`."""
        _Backward.apply(loss)

    def gradients(
        self, loss: torch.Tensor, parameters: Sequence[torch.Tensor], **how: bool | None
    ) -> list[torch.Tensor]:
        """See `Context.gradients`."""
        return list(_Gradients.apply(how, loss, *parameters)) if parameters else []

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        """See `Context.gradient`."""
        return _Gradient.apply(parameter)

    def set_gradient(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """See `Context.set_gradient`."""
        _SetGradient.apply(parameter, gradient)

    def modulate(
        self,
        factors: torch.Tensor,
        *,
        of: Literal["gradient", "update"],
        only: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """See `Context.modulate`."""
        Context.modulate(self, factors, of=of, only=only)
        if of == "update":  # below vmap: of all members
            _Below.apply(self._keep_factors, factors.detach() + 0 * self.step)

    def _keep_factors(self, factors: torch.Tensor) -> None:
        self.factors = replace(self.factors, value=factors)


class _BelowVmap(torch.autograd.Function):
    """Base of what is done on the stacked tensors themselves: only `vmap` of these is ever called."""

    @staticmethod
    def forward(*_):
        raise TypeError("a method's loss or parameter does not depend on the member")

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass


class _Stacked(_BelowVmap):
    @staticmethod
    def vmap(info, in_dims, draw, member):
        return draw(), 0


class _Below(_BelowVmap):
    @staticmethod
    def vmap(info, in_dims, take, tensor):
        take(tensor.movedim(in_dims[1], 0))
        return tensor.new_zeros(info.batch_size), 0


class _Backward(_BelowVmap):
    @staticmethod
    def vmap(info, in_dims, loss):
        loss.sum().backward()
        return torch.zeros_like(loss), 0


class _Gradients(_BelowVmap):
    @staticmethod
    def vmap(info, in_dims, how, loss, *parameters):
        gradients = torch.autograd.grad(loss.sum(), parameters, materialize_grads=True, **how)
        return gradients, tuple(0 for _ in gradients)


class _Gradient(_BelowVmap):
    @staticmethod
    def vmap(info, in_dims, parameter):
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, 0


class _SetGradient(_BelowVmap):
    @staticmethod
    def vmap(info, in_dims, parameter, gradient):
        if in_dims[1] is None:
            gradient = gradient.expand_as(parameter)
        else:
            gradient = gradient.movedim(in_dims[1], 0)
        parameter.grad = gradient.detach().contiguous()
        return parameter.new_zeros(info.batch_size), 0


# ---- numbers that members' settings differ in


class Numbers:
    """Numbers of the members' methods that differ: of the template's, tensors with a value for each of them.

    Found are those in the settings and among the attributes of the method's modules (a loss weight, the strength of a
    gradient reversal); what a method keeps elsewhere shows in the comparison of the first step.

    Attributes:
        values: of each number, [K].
    """

    def __init__(self, template: TrainStep, steps: Sequence[TrainStep]) -> None:
        self._places: list[tuple[nn.Module, tuple[str, ...]]] = []
        self.values: list[torch.Tensor] = []
        like = next(template.model.parameters())
        for module, *each in zip(template.method.modules(), *(step.method.modules() for step in steps), strict=True):
            numbers = [dict(_numbers(vars(one))) for one in each]
            for path in numbers[0]:
                values = [one[path] for one in numbers]
                if len(set(values)) > 1 and not isinstance(module, StackedDropout):
                    self._places.append((module, path))
                    self.values.append(torch.tensor(values, dtype=like.dtype, device=template.context.step.device))

    def set(self, values: Sequence[torch.Tensor]) -> None:
        """Have the template's methods read `values`, each []."""
        for (module, (name, *path)), value in zip(self._places, values, strict=True):
            setattr(module, name, _with(getattr(module, name), path, value) if path else value)


def _numbers(of: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], float]]:
    """(names, number) of all numbers that are no integers."""
    for name, value in of.items():
        if isinstance(value, float):
            yield (name,), value
        elif isinstance(value, Slice):
            yield from (((name, *path), number) for path, number in _numbers(dict(value)))


def _with(settings: Slice, path: Sequence[str], value: torch.Tensor) -> Slice:
    name, *rest = path
    return settings.model_copy(update={name: _with(getattr(settings, name), rest, value) if rest else value})
