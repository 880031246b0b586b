"""Many trainings as one: the gradients of all members of a population in one step on stacked weights.

A member is an ordinary training whose weights are views of stacked tensors. Where its loop asks for a step, all
members' batches go through `torch.func.vmap` of the method's `gradients` together; optimizer, average, validation,
logs and checkpoints are each member's own. Letters: K members, B clips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call, vmap

from mbcd_cli.data.records import Batch, Parts
from mbcd_cli.errors import MbcdError
from mbcd_cli.methods.base import Context
from mbcd_cli.randomness import Randomness
from mbcd_cli.settings import Slice
from mbcd_cli.training.average import Average
from mbcd_cli.training.step import TrainStep

Inputs = Callable[[str, Parts], Parts]


@dataclass(frozen=True, slots=True)
class Member:
    """A training's step, and its draws."""

    step: TrainStep
    randomness: Randomness


class StackedStep:
    """`step(batches)`: one step of every member, equal to what each would do alone but for rounding.

    Args:
        members: of one method, with models of the same shapes, on one device, each with its draws to itself
            (`Randomness.own_globals`). Their settings may differ in numbers of the method, the optimizer and the
            average and in dropout rates, but for whether they are zero. Their tensors become views of stacked ones; a
            later `StackedStep` of some of them takes them over. None is a row that is computed for nobody.
        inputs: (modality, parts of all batches [K, ...]) -> its inputs [K, B, ...], where batches hold something that
            stands for them (rows of what lies in memory).
    """

    def __init__(self, members: Sequence[Member | None], *, inputs: Inputs | None = None) -> None:
        first = next(member for member in members if member is not None)
        self._inputs = inputs or (lambda name, parts: parts)
        everyone = [member or _nobody(first) for member in members]
        steps, draws = [member.step for member in everyone], [member.randomness for member in everyone]
        self._everyone = steps
        self._rows = [k for k, member in enumerate(members) if member is not None]
        self._context = StackedContext.of_members(steps, draws)
        self._step = _template(first.step, first.randomness, self._context, steps)
        self._numbers = _Numbers(self._step, steps)
        self._whole = _Whole(self._step)
        self._stacked = _stack([_Whole(step) for step in steps])
        self._members = torch.arange(len(steps), device=self._context.sources.device)
        # What a member finds alone at its first step: of one, or, where numbers differ, of all.
        self._unlike = [(k, member) for k, member in enumerate(members) if member is not None]
        self._unlike = self._unlike if self._numbers.values else self._unlike[:1]
        self._sources = torch.stack([step.context.sources for step in steps])
        self._rates: list[float] = []
        self._alike: list[_Alike] = []

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """One step of every member on its batch; its figures as one vector each.

        Raises:
            StackingError: at the first step, a member's gradients are not those that it finds alone.
        """
        inputs = {}
        for name in batches[0].inputs:
            parts = zip(*(batch.inputs[name] for batch in batches), strict=True)
            inputs[name] = self._inputs(name, tuple(map(torch.stack, parts)))
        alone = {}
        for k, member in self._unlike:
            its = {name: tuple(part[k] for part in parts) for name, parts in inputs.items()}
            alone[k] = _alone(member.step, member.randomness, replace(batches[k], inputs=its))
        steps = [self._everyone[k] for k in self._rows]
        for step in steps:
            step.context.step += 1
        trained = [leaf for leaf in self._stacked.values() if leaf.requires_grad]
        for leaf in trained:
            leaf.grad = None
        labels, domains, clips = (torch.stack([getattr(batch, of) for batch in batches]) for of in _OF_CLIPS)
        counters = [torch.stack([getattr(step.context, of) for step in self._everyone]) for of in ("step", "epoch")]
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
        for k, found in alone.items():
            _compare(found, vectors[k], [None if leaf.grad is None else leaf.grad[k] for leaf in trained])
        self._unlike = []
        rates = [group["lr"] for step in steps for group in step.optimizer.param_groups]
        if rates != self._rates:
            self.release()
            self._rates, self._alike = rates, _Alike.runs(self._everyone, self._rows, self._stacked)
        for run in self._alike:
            run.update()
        for step in steps:
            step.layout = self._step.layout
        return list(vectors.unbind())

    def release(self) -> None:
        """Leave to every member's optimizer what it would have alone."""
        for run in self._alike:
            run.release()
        self._rates, self._alike = [], []

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


def _template(step: TrainStep, draws: Randomness, context: StackedContext, everyone: Sequence[TrainStep]) -> TrainStep:
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
    for module, like in (
        (context.model, [one.model for one in everyone]),
        (method, [one.method for one in everyone]),
    ):
        _replace(module, like, context.randomness)
    return step.like(method, average)


_VECTOR = 64
"""Elements; torch's kernels treat those beyond the last full vector otherwise (no fused multiply-add)."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a stacked tensor that are updated as one: [n, ...], of members `begin` to `begin + n` of a run."""

    rows: torch.Tensor
    begin: int
    leaf: torch.Tensor
    among: slice


class _Alike:
    """Members side by side whose optimizers and averages have the same settings and counts: updated as one.

    Members' optimizers know of it when they are asked for their state. Tensors whose rows are no whole vectors are
    updated one by one: what a row rounds to must not depend on what lies beside it.

    Args:
        steps: of the members.
        first: row of the first of them in the stacked tensors, which `stacked` has by name.
    """

    def __init__(self, steps: Sequence[TrainStep], first: int, stacked: Mapping[str, torch.Tensor]) -> None:
        self._steps, self._first, self._stacked = steps, first, stacked
        self._names = {tensor.data_ptr(): name for name, tensor in _by_name([_Whole(steps[0])])}
        optimizers = [step.optimizer for step in steps]
        self._pieces: list[tuple[_Piece, Sequence[torch.Tensor]]] = []
        groups = []
        for each in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            joined = []
            for parameters in zip(*(group["params"] for group in each), strict=True):
                for piece in self._pieces_of(parameters[0]):
                    piece.rows.requires_grad_()
                    joined.append(piece.rows)
                    self._pieces.append((piece, parameters[piece.begin : piece.begin + len(piece.rows)]))
            groups.append({**each[0], "params": joined})
        self._optimizer = type(optimizers[0])(groups)
        for piece, parameters in self._pieces:
            owners = optimizers[piece.begin : piece.begin + len(piece.rows)]
            states = [owner.state.get(parameter) for owner, parameter in zip(owners, parameters, strict=True)]
            if states[0]:
                self._optimizer.state[piece.rows] = {
                    name: value.clone() if name == "step" else torch.stack([state[name] for state in states])
                    for name, value in states[0].items()
                }
        self._hooks = [optimizer.register_state_dict_pre_hook(self._hand_over) for optimizer in optimizers]
        self._average = None
        if type(steps[0].average) is Average:
            self._average = steps[0].average.over(lambda tensor: [piece.rows for piece in self._pieces_of(tensor)])

    @classmethod
    def runs(cls, steps: Sequence[TrainStep], rows: Sequence[int], stacked: Mapping[str, torch.Tensor]) -> list[_Alike]:
        """Those among `rows` of the stacked tensors, as few as possible."""
        runs: list[list[int]] = []
        for row in rows:
            if runs and runs[-1][-1] == row - 1 and _standing(steps[row]) == _standing(steps[row - 1]):
                runs[-1].append(row)
            else:
                runs.append([row])
        return [cls([steps[row] for row in run], run[0], stacked) for run in runs]

    def update(self) -> None:
        """What the stacked gradients change."""
        for piece, _ in self._pieces:
            piece.rows.grad = None if piece.leaf.grad is None else piece.leaf.grad[piece.among]
        self._optimizer.step()
        if self._average is not None:
            self._average.update(self._steps[0].context.step)
        for step in self._steps:
            step.follow(averaged=self._average is not None)

    def release(self) -> None:
        """Leave it to the members' own optimizers."""
        for hook in self._hooks:
            hook.remove()
        for step in self._steps:
            self._hand_over(step.optimizer)

    def _pieces_of(self, tensor: torch.Tensor) -> list[_Piece]:
        """Those of a tensor of the first member, and of the others' like it."""
        leaf, members = self._stacked[self._names[tensor.data_ptr()]], len(self._steps)
        long = members if tensor.numel() % _VECTOR == 0 else 1
        spans = [(k, slice(self._first + k, self._first + k + long)) for k in range(0, members, long)]
        return [_Piece(leaf.detach()[among], k, leaf, among) for k, among in spans]

    def _hand_over(self, optimizer: torch.optim.Optimizer) -> None:
        for piece, parameters in self._pieces:
            for k, parameter in enumerate(parameters):
                if optimizer is self._steps[piece.begin + k].optimizer and piece.rows in self._optimizer.state:
                    optimizer.state[parameter] = {
                        name: value.clone() if name == "step" else value[k]
                        for name, value in self._optimizer.state[piece.rows].items()
                    }


def _standing(step: TrainStep) -> tuple:
    """What two members share that are updated as one."""
    optimizer, average = step.optimizer, step.average
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return settings, counts, int(step.context.step), None if average is None else (type(average), average.settings)


# ---- numbers that members' settings differ in


class _Numbers:
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
                if len(set(values)) > 1 and not isinstance(module, _StackedDropout):
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

    def kept(self, *shape: int, rates: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """Dropout's factors: 0 with probability `rate`, else 1 / (1 - rate), of each member's rate."""

        def draw() -> torch.Tensor:
            factors = torch.empty((len(self._draws), *shape), dtype=dtype)
            for mine, draws, rate in zip(factors, self._draws, rates, strict=True):
                draws.keep_(mine, rate=rate)
            return factors.to(self.device)

        return _Stacked.apply(draw, self.member)

    def _of_each(self, draw: Callable[[Randomness], torch.Tensor]) -> torch.Tensor:
        return _Stacked.apply(lambda: torch.stack([draw(one) for one in self._draws]), self.member)


class _StackedDropout(nn.Dropout):
    """nn.Dropout whose masks are those that each member would draw alone."""

    def __init__(self, rates: Sequence[float], randomness: StackedRandomness) -> None:
        super().__init__(max(rates))
        self._rates, self._randomness = rates, randomness

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        if not self.training or not self.p:
            return x
        return x * self._randomness.kept(*x.shape, rates=self._rates, dtype=x.dtype)


class _StackedLinear(nn.Linear):
    """nn.Linear as (W x^T)^T: its gradients come out in the layout of the weights.

    F.linear leaves those of stacked weights transposed, and autograd copies them: a seventh of a population's step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D_in] -> [..., D_out]."""
        product = torch.mm(self.weight, x.reshape(-1, x.shape[-1]).mT).mT.reshape(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


class _StackedBatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d of rows as a layer norm of their transpose: torch's own walks the columns of all members."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        if x.dim() != 2 or len(x) == 1 or not self.training:
            return super().forward(x)
        columns = x.mT
        with torch.no_grad():
            mean = columns.mean(dim=1)
            variance = (columns - mean[:, None]).square().sum(dim=1) / (len(x) - 1)
            self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
            self.running_var.mul_(1 - self.momentum).add_(self.momentum * variance)
            self.num_batches_tracked.add_(1)
        return nn.functional.layer_norm(columns, (len(x),), eps=self.eps).mT * self.weight + self.bias


def _replace(module: nn.Module, like: Sequence[nn.Module], randomness: StackedRandomness) -> None:
    """Put what draws or multiplies in a form for vmap; `like` are the members' own modules."""
    for parent, *each in zip(list(module.modules()), *(list(one.modules()) for one in like), strict=True):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                rates = [getattr(one, name).p for one in each]
                setattr(parent, name, _StackedDropout(rates, randomness).train(child.training))
            elif type(child) is nn.Linear:
                child.__class__ = _StackedLinear
            elif type(child) is nn.BatchNorm1d and child.affine and child.momentum and child.track_running_stats:
                child.__class__ = _StackedBatchNorm


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
