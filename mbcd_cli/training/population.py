"""Many trainings as one: the gradients of all members of a population in one step on stacked weights.

A member is an ordinary training whose weights are views of stacked tensors. Where its loop asks for a step, all
members' batches go through `torch.func.vmap` of the method's `gradients` together (`stacked`), and optimizers and
averages that stand alike take one step (`alike`); validation, logs and checkpoints are each member's own. Trainings of
small models on vectors go on 3 to 5 times as quickly as in processes of their own (docs/performance.md).

Letters: K members, B clips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, vmap

from mbcd_cli.data.records import Batch, Parts
from mbcd_cli.errors import MbcdError
from mbcd_cli.randomness import Randomness
from mbcd_cli.say import SILENT, Say
from mbcd_cli.training.alike import Alike, Whole, by_name
from mbcd_cli.training.assemble import Training
from mbcd_cli.training.stacked import Numbers, StackedContext, replace_dropouts
from mbcd_cli.training.static_step import StaticStep
from mbcd_cli.training.step import TrainStep

Inputs = Callable[[str, Parts], Parts]


class StackedStep:
    """`step(batches)`: one step of every member, equal to what each would do alone but for rounding.

    Captured in a CUDA graph where the members' own steps are, their draws included: kernel by kernel, 64 members on
    vectors take 9 (ERM) and 12 times (MBCD) as long (docs/performance.md).

    Args:
        members: of one method, with models of the same shapes, on one device, each with its draws to itself
            (`Randomness.own_globals`). Their settings may differ in numbers of the method, the optimizer and the
            average and in dropout rates, but for whether they are zero. Their tensors become views of stacked ones; a
            later `StackedStep` of some of them takes them over.
        inputs: (modality, parts of all batches [K, ...]) -> its inputs [K, B, ...], where batches hold something that
            stands for them (rows of what lies in memory).
        say: told where a capture failed and is not required; the step goes on kernel by kernel.
    """

    def __init__(self, members: Sequence[Training], *, inputs: Inputs | None = None, say: Say = SILENT) -> None:
        self._inputs = inputs or (lambda name, parts: parts)
        steps, draws = [member.step for member in members], [member.randomness for member in members]
        self._steps = steps
        self._context = StackedContext.of_members(steps, draws)
        self._step = _template(steps[0], draws[0], self._context, steps)
        self._numbers = Numbers(self._step, steps)
        self._whole = Whole(self._step)
        self._stacked = _stack([Whole(step) for step in steps])
        self._device = self._context.sources.device
        self._members = torch.arange(len(steps), device=self._device)
        # What a member finds alone at its first step: of one, or, where numbers differ, of all.
        self._unlike = list(members if self._numbers.values else members[:1])
        self._sources = torch.stack([step.context.sources for step in steps])
        self._rates: list[list[float]] = []
        self._alike: list[Alike] = []
        self._run: Callable[[Batch], torch.Tensor] | None = None
        alone = members[0].run_step
        self._static = alone and {"draws": draws, "device": self._device, "required": alone.required, "say": say}

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """One step of every member on its batch, wherever that lies; its figures as one vector each.

        Raises:
            StackingError: at the first step, a member's gradients are not those that it finds alone.
            RunError: the capture failed and is required.
        """
        rates = [[group["rate"] for group in step.optimizer.param_groups] for step in self._steps]
        if rates != self._rates:
            # A captured step reads those of each run's first member, from the device.
            kept = self._run is not None and self._static is not None
            if not (kept and all(run.shares(rates) for run in self._alike)):
                self.release()
                self._alike = Alike.runs(self._steps, self._stacked)
                self._run = self._taken if self._static is None else StaticStep(self._taken, **self._static)
            self._rates = rates
        inputs = {}
        for name in batches[0].inputs:
            parts = zip(*(batch.inputs[name] for batch in batches), strict=True)
            inputs[name] = tuple(map(torch.stack, parts))
        labels, domains, clips = (torch.stack([getattr(batch, of) for batch in batches]) for of in _OF_CLIPS)
        every = Batch(inputs=inputs, labels=labels, domains=domains, clips=clips)
        vectors = self._run(every.to(self._device, non_blocking=self._device.type == "cuda"))
        for step in self._steps:
            step.layout = self._step.layout
        return list(vectors.unbind())

    def _taken(self, every: Batch) -> torch.Tensor:
        """One step of every member on its row of a batch of batches, [K, B, ...]; their figures, [K, F]."""
        inputs = {name: self._inputs(name, parts) for name, parts in every.inputs.items()}
        labels, domains, clips = every.labels, every.domains, every.clips
        alone = []
        for k, member in enumerate(self._unlike):
            its = {name: tuple(part[k] for part in parts) for name, parts in inputs.items()}
            batch = Batch(inputs=its, labels=labels[k], domains=domains[k], clips=clips[k])
            alone.append(_alone(member.step, member.randomness, batch))
        steps = self._steps
        torch._foreach_add_([step.context.step for step in steps], 1)
        trained = [leaf for leaf in self._stacked.values() if leaf.requires_grad]
        for leaf in trained:
            leaf.grad = None
        counters = [torch.stack([getattr(step.context, of) for step in steps]) for of in ("step", "epoch")]
        with torch.enable_grad():
            vectors = vmap(self._one)(
                self._stacked,
                self._numbers.values,
                self._members,
                self._sources,
                *counters,
                inputs,
                labels,
                domains,
                clips,
            )
        for k, found in enumerate(alone):
            _compare(found, vectors[k], [None if leaf.grad is None else leaf.grad[k] for leaf in trained])
        self._unlike = []
        for run in self._alike:
            run.update(self._context.factors)
        return vectors

    def release(self) -> None:
        """Leave to every member's optimizer what it would have alone; a graph that was captured goes."""
        for run in self._alike:
            run.release()
        self._rates, self._alike, self._run = [], [], None

    def _one(
        self,
        weights: dict[str, torch.Tensor],
        numbers: list[torch.Tensor],
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
        self._numbers.set(numbers)
        batch = Batch(inputs=inputs, labels=labels, domains=domains, clips=clips)
        return functional_call(self._whole, weights, (batch,))


class StackingError(MbcdError):
    """A method's step cannot be taken for many trainings at once."""


@dataclass(frozen=True, slots=True)
class _Alone:
    """A member's figures and gradients (of what trains, in order), found without the others."""

    vector: torch.Tensor
    gradients: list[torch.Tensor | None]


def _alone(step: TrainStep, draws: Randomness, batch: Batch) -> _Alone:
    """What a step of this member begins with, after which everything is as it was."""
    whole = Whole(step)
    buffers = [(buffer, buffer.clone()) for buffer in whole.buffers()]
    drawn, dropout = draws.state(), draws.dropout.get_state()
    step.optimizer.zero_grad(set_to_none=True)
    step.context.step += 1
    try:
        with draws.as_globals():
            vector = step.gradients(batch)
    finally:
        step.context.step -= 1
        draws.load(drawn)
        draws.dropout.set_state(dropout)
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


def _stack(members: Sequence[Whole]) -> dict[str, torch.Tensor]:
    """Name -> all members' tensors as one, [K, ...], of which theirs are views from now on."""
    stacked = {}
    for name, *tensors in by_name(members):
        together = torch.stack([tensor.detach() for tensor in tensors])
        for tensor, view in zip(tensors, together.unbind(), strict=True):
            tensor.data = view
        stacked[name] = together.requires_grad_(tensors[0].requires_grad)
    for member in members:
        step = member.steps[0]
        for average in (step.average, step.snapshots):
            if average is not None:
                average.moved()
    return stacked


def _template(step: TrainStep, draws: Randomness, context: StackedContext, everyone: Sequence[TrainStep]) -> TrainStep:
    """A copy of the step whose method works on the stacked context; its own weights are never used."""
    memo: dict[int, object] = {
        id(step.context): context,
        id(draws): context.randomness,
        id(step.context.group): step.context.group,
    }
    # Nothing may compute with what the stacked weights do not stand for: a list of parameters kept from __init__, say.
    whole = Whole(step)
    memo |= {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in whole.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in whole.buffers()}
    method = copy.deepcopy(step.method, memo)
    context.model = copy.deepcopy(step.model, memo)
    average = copy.deepcopy(step.average, memo)
    context.average = average
    for module, like in (
        (context.model, [one.model for one in everyone]),
        (method, [one.method for one in everyone]),
    ):
        replace_dropouts(module, like, context.randomness)
    return step.like(method, average)
