"""Many trainings as one: the gradients of all members of a population in one step on stacked weights.

A member is an ordinary training whose weights are views of stacked tensors. Where its loop asks for a step, all
members' batches go through `torch.func.vmap` of the method's `gradients` together; optimizer, average, validation,
logs and checkpoints are each member's own. Letters: K members, B clips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, vmap

from mbcd_cli.data.records import Batch
from mbcd_cli.errors import MbcdError
from mbcd_cli.methods.base import Context
from mbcd_cli.randomness import Randomness
from mbcd_cli.training.step import TrainStep


@dataclass(frozen=True, slots=True)
class Member:
    """A training's step, and its draws."""

    step: TrainStep
    randomness: Randomness


class StackedStep:
    """`step(batches)`: one step of every member, equal to what each would do alone but for rounding.

    Args:
        members: of one method with the same settings, with models of the same shapes, on one device, each with its
            draws to itself (`Randomness.own_globals`). Their tensors become views of stacked ones; a later
            `StackedStep` of some of them takes them over. None is a row that is computed for nobody.
    """

    def __init__(self, members: Sequence[Member | None]) -> None:
        first = next(member for member in members if member is not None)
        self.steps = [member.step for member in members if member is not None]
        everyone = [member or _nobody(first) for member in members]
        steps, draws = [member.step for member in everyone], [member.randomness for member in everyone]
        self._everyone = steps
        self._context = StackedContext.of_members(steps, draws)
        self._step = _template(first.step, first.randomness, self._context)
        self._whole = _Whole(self._step)
        self._stacked = _stack([_Whole(step) for step in steps])
        self._trained = [
            (self._stacked[name], parameters)
            for name, *parameters in _by_name([_Whole(step) for step in steps])
            if self._stacked[name].requires_grad
        ]
        device = self._context.sources.device
        self._optimizer = _JointOptimizer([step.optimizer for step in self.steps])
        self._members = torch.arange(len(steps), device=device)
        self._first: Member | None = first
        self._at = next(k for k, member in enumerate(members) if member is not None)
        self._sources = torch.stack([step.context.sources for step in steps])

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """One step of every member on its batch; its figures as one vector each.

        Raises:
            StackingError: at the first step, a member's gradients are not those that it finds alone.
        """
        alone = None if self._first is None else _alone(self._first.step, self._first.randomness, batches[self._at])
        for step in self.steps:
            step.context.step += 1
        for leaf, _ in self._trained:
            leaf.grad = None
        inputs = {
            name: tuple(torch.stack(part) for part in zip(*(batch.inputs[name] for batch in batches), strict=True))
            for name in batches[0].inputs
        }
        labels, domains, clips = (torch.stack([getattr(batch, of) for batch in batches]) for of in _OF_CLIPS)
        counters = [torch.stack([getattr(step.context, of) for step in self._everyone]) for of in ("step", "epoch")]
        with torch.enable_grad():
            vectors = vmap(self._one)(
                self._stacked, self._members, self._sources, *counters, inputs, labels, domains, clips
            )
        if alone is not None:
            gradients = [None if leaf.grad is None else leaf.grad[self._at] for leaf, _ in self._trained]
            _compare(alone, vectors[self._at], gradients)
            self._first = None
        for leaf, parameters in self._trained:
            gradients = [None] * len(parameters) if leaf.grad is None else leaf.grad.unbind()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        self._optimizer.step()
        for step in self.steps:
            step.layout = self._step.layout
            step.follow()
        return list(vectors.unbind())

    def _one(
        self,
        weights: dict[str, torch.Tensor],
        member: torch.Tensor,
        sources: torch.Tensor,
        step: torch.Tensor,
        epoch: torch.Tensor,
        inputs: dict[str, tuple[torch.Tensor, ...]],
        labels: torch.Tensor,
        domains: torch.Tensor,
        clips: torch.Tensor,
    ) -> torch.Tensor:
        """The figures of one member, inside vmap; its gradients are left in those of the stacked weights."""
        context = self._context
        context.sources, context.step, context.epoch = sources, step, epoch
        context.randomness.member = member
        batch = Batch(inputs=inputs, labels=labels, domains=domains, clips=clips)
        return functional_call(self._whole, weights, (batch,))


def _nobody(like: Member) -> Member:
    """A copy of a member whose results nobody reads."""
    memo: dict[int, object] = {id(like.step.context.group): like.step.context.group}
    randomness = Randomness(seed=0, device=like.randomness.device)
    randomness.own_globals()
    memo[id(like.randomness)] = randomness
    method = copy.deepcopy(like.step.method, memo)
    return Member(like.step.like(method, copy.deepcopy(like.step.average, memo)), randomness)


class StackingError(MbcdError):
    """A method's step cannot be taken for many trainings at once."""


@dataclass(frozen=True, slots=True)
class _Alone:
    """A member's figures and gradients (of what trains, in order), found without the others."""

    vector: torch.Tensor
    gradients: list[torch.Tensor | None]


def _alone(step: TrainStep, draws: Randomness, batch: Batch) -> _Alone:
    """What a step of this member begins with, after which everything is as it was."""
    whole = _Whole(step)
    buffers = [(buffer, buffer.clone()) for buffer in whole.buffers()]
    drawn, dropout, outside = draws.state(), draws.dropout.get_state(), torch.get_rng_state()
    step.optimizer.zero_grad(set_to_none=True)
    step.context.step += 1
    torch.set_rng_state(dropout)
    try:
        vector = step.gradients(batch)
    finally:
        torch.set_rng_state(outside)
        step.context.step -= 1
        draws.load(drawn)
        for buffer, before in buffers:
            buffer.copy_(before)
    found = _Alone(vector, [parameter.grad for parameter in whole.parameters() if parameter.requires_grad])
    step.optimizer.zero_grad(set_to_none=True)
    return found


def _compare(alone: _Alone, vector: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> None:
    """A method that takes gradients by itself, or keeps parameters from before, is told by this alone."""
    pairs = [(alone.vector, vector)]
    for one, other in zip(alone.gradients, gradients, strict=True):
        if one is not None or other is not None:
            pairs.append((torch.zeros_like(other) if one is None else one, other))
    for one, other in pairs:
        apart = other is None or not (one - other).norm() <= 1e-2 * (one.norm() + 1e-3)
        if apart and bool(one.isfinite().all()):
            raise StackingError(
                "A method's gradients in a population are not those of a training alone.",
                "Take them by its context, and look parameters up when they are used; or say stackable = False.",
            )


_OF_CLIPS = ("labels", "domains", "clips")


class _Whole(nn.Module):
    """All that a step changes or reads: student, the method's own modules, teacher."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__()
        self.student = step.model
        self.method = step.method
        self.teacher = None if step.average is None else step.average.model
        self._step = [step]

    def forward(self, batch: Batch) -> torch.Tensor:
        """The figures of a step."""
        return self._step[0].gradients(batch)


def _by_name(members: Sequence[_Whole]) -> list[tuple]:
    """(name, tensor of each member) of all parameters and buffers."""
    named = [{**dict(member.named_parameters()), **dict(member.named_buffers())} for member in members]
    return [(name, *(tensors[name] for tensors in named)) for name in named[0]]


def _stack(members: Sequence[_Whole]) -> dict[str, torch.Tensor]:
    """Name -> all members' tensors as one, [K, ...], of which theirs are views from now on."""
    stacked = {}
    for name, *tensors in _by_name(members):
        together = torch.stack([tensor.detach() for tensor in tensors])
        for tensor, view in zip(tensors, together.unbind(), strict=True):
            tensor.data = view
        stacked[name] = together.requires_grad_(tensors[0].requires_grad)
    for member in members:
        step = member._step[0]
        if step.average is not None:
            step.average.moved()
    return stacked


def _template(step: TrainStep, draws: Randomness, context: StackedContext) -> TrainStep:
    """A copy of the step whose method works on the stacked context; its own weights are never used."""
    memo: dict[int, object] = {
        id(step.context): context,
        id(draws): context.randomness,
        id(step.context.group): step.context.group,
    }
    # Nothing may compute with what the stacked weights do not stand for: a list of parameters kept from __init__, say.
    whole = _Whole(step)
    memo |= {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in whole.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in whole.buffers()}
    method = copy.deepcopy(step.method, memo)
    context.model = copy.deepcopy(step.model, memo)
    average = copy.deepcopy(step.average, memo)
    context.average = average
    for module in (context.model, method):
        _replace_dropout(module, context.randomness)
    return step.like(method, average)


class _JointOptimizer:
    """The optimizers of all members as one, so that one call updates all; their states stay their own.

    Parameters of equal settings stand in one group. Learning rates are the members': where one changes, the groups are
    made anew.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._own = list(optimizers)
        self._rates: list[float] = []
        self._joint: torch.optim.Optimizer | None = None

    def step(self) -> None:
        """One step of every member's optimizer."""
        rates = [group["lr"] for one in self._own for group in one.param_groups]
        if self._joint is None or rates != self._rates:
            self._rates, self._joint = rates, self._joined()
        self._joint.step()
        for one in self._own:
            if not one.state:  # of a first step
                for group in one.param_groups:
                    one.state.update({p: self._joint.state[p] for p in group["params"] if p in self._joint.state})

    def _joined(self) -> torch.optim.Optimizer:
        groups: dict[tuple, dict] = {}
        for one in self._own:
            for group in one.param_groups:
                settings = {key: value for key, value in group.items() if key not in ("params", "first_lr")}
                alike = groups.setdefault(tuple(settings.values()), {**settings, "params": []})
                alike["params"].extend(group["params"])
        joint = type(self._own[0])(list(groups.values()))
        for one in self._own:
            joint.state.update(one.state)
        return joint


# ---- draws


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

    def kept(self, *shape: int, rate: float, dtype: torch.dtype) -> torch.Tensor:
        """Dropout's factors: 0 with probability `rate`, else 1 / (1 - rate)."""
        return self._of_each(lambda draws: draws.kept(*shape, rate=rate, dtype=dtype))

    def _of_each(self, draw: Callable[[Randomness], torch.Tensor]) -> torch.Tensor:
        return _Stacked.apply(lambda: torch.stack([draw(one) for one in self._draws]), self.member)


class _StackedDropout(nn.Dropout):
    """nn.Dropout whose masks are those that each member would draw alone."""

    def __init__(self, p: float, randomness: StackedRandomness) -> None:
        super().__init__(p)
        self._randomness = randomness

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        if not self.training or not self.p:
            return x
        return x * self._randomness.kept(*x.shape, rate=self.p, dtype=x.dtype)


def _replace_dropout(module: nn.Module, randomness: StackedRandomness) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, _StackedDropout(child.p, randomness).train(child.training))


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
