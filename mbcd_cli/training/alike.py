"""What follows the gradients of a population, taken as one for members whose optimizers and averages stand alike.

Of the 64 ms that a step of 32 members of ERM on vectors took it saved 7 (docs/performance.md).

Letters: K members, n of them in a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import EncoderFactors
from mbcd_cli.training.average import Average
from mbcd_cli.training.optimizer import multiplied_changes
from mbcd_cli.training.step import TrainStep

_VECTOR = 64
"""Elements; torch's kernels treat those beyond the last full vector otherwise (no fused multiply-add)."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a stacked tensor that are updated as one: [n, ...], of members `begin` to `begin + n` of a run."""

    rows: torch.Tensor
    begin: int
    leaf: torch.Tensor
    among: slice


class Alike:
    """Members side by side whose optimizers and averages have the same settings and counts: updated as one.

    Members' optimizers know of it when they are asked for their state. Tensors whose rows are no whole vectors are
    updated one by one: what a row rounds to must not depend on what lies beside it.

    Args:
        steps: of the members.
        first: row of the first of them in the stacked tensors, which `stacked` has by name.
    """

    def __init__(self, steps: Sequence[TrainStep], first: int, stacked: Mapping[str, torch.Tensor]) -> None:
        self._steps, self._first, self._stacked = steps, first, stacked
        self._names = {tensor.data_ptr(): name for name, tensor in by_name([Whole(steps[0])])}
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
    def runs(cls, steps: Sequence[TrainStep], stacked: Mapping[str, torch.Tensor]) -> list[Alike]:
        """As few as possible, of all members."""
        runs: list[list[int]] = []
        for row in range(len(steps)):
            if runs and _standing(steps[row]) == _standing(steps[row - 1]):
                runs[-1].append(row)
            else:
                runs.append([row])
        return [cls([steps[row] for row in run], run[0], stacked) for run in runs]

    def update(self, factors: EncoderFactors | None = None) -> None:
        """What the stacked gradients change, the encoders' times `factors` of all members [K, M]."""
        for piece, _ in self._pieces:
            piece.rows.grad = None if piece.leaf.grad is None else piece.leaf.grad[piece.among]
        with multiplied_changes([] if factors is None else self._multiplied(factors)):
            self._optimizer.step()
        if self._average is not None:
            self._average.update(self._steps[0].context.step)
        for step in self._steps:
            step.follow(averaged=self._average is not None)

    def _multiplied(self, factors: EncoderFactors) -> list[tuple[torch.Tensor, torch.Tensor]]:
        chosen = factors.parameters(self._steps[0].model)
        modality = {id(self._stacked[self._names[parameter.data_ptr()]]): k for parameter, k in chosen}
        parts = []
        for piece, _ in self._pieces:
            if (k := modality.get(id(piece.leaf))) is not None:
                its = factors.value[piece.among, k]
                parts.append((piece.rows, its.reshape(-1, *([1] * (piece.rows.dim() - 1)))))
        return parts

    def shares(self, rates: Sequence[list[float]]) -> bool:
        """Whether its members have one learning rate still, of those of all members."""
        mine = rates[self._first : self._first + len(self._steps)]
        return all(one == mine[0] for one in mine)

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


class Whole(nn.Module):
    """All that a step changes or reads: student, the method's own modules, teacher."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__()
        self.student = step.model
        self.method = step.method
        self.teacher = None if step.average is None else step.average.model
        self.steps = [step]  # in a list: no module of this one

    def forward(self, batch: Batch) -> torch.Tensor:
        """The figures of a step."""
        return self.steps[0].gradients(batch)


def by_name(members: Sequence[Whole]) -> list[tuple]:
    """(name, tensor of each member) of all parameters and buffers."""
    named = [{**dict(member.named_parameters()), **dict(member.named_buffers())} for member in members]
    return [(name, *(tensors[name] for tensors in named)) for name in named[0]]
