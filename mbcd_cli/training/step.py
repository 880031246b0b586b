"""One optimisation step, of whatever method.

Letters: B clips (of this process, where torchrun started several), M modalities, F numbers in a step's figures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.layout import channels_last, match_layout
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.base import Method
from mbcd_cli.model import MultiModalModel
from mbcd_cli.training.average import Average
from mbcd_cli.training.figures import Layout
from mbcd_cli.training.optimizer import multiplied_changes
from mbcd_cli.training.snapshots import Snapshots

_LONE = "Expected more than 1 value per channel"
"""What torch says where a batch norm has a single value of a channel: of one clip without positions."""


class TrainStep:
    """`step(batch)`: the method's gradients, one optimizer step, one update of the weight average.

    There is no branch on data and no wait for the device. Live trunks run once for all passes of the student, and their
    running statistics move as if they had run in each; the average's run in eval mode with the statistics it has
    averaged.

    Attributes:
        layout: of the vector of figures; the first step fixes it, None before.

    Args:
        method: with its context; the student and the method's own modules are already on the device.
        optimizer: over the trained parameters of both.
        average: the weight average (the method's context holds the same), or None.
        snapshots: what else is averaged, for afterwards, or None.
        batch_norm: "tracked" (train mode; every student pass updates the running statistics) or "frozen"
            (running statistics are used and kept; affine parameters still train).
        channels_last: hand inputs to the tails in the channels-last layout (their weights have it already).
    """

    def __init__(
        self,
        *,
        method: Method,
        optimizer: torch.optim.Optimizer,
        average: Average | None = None,
        snapshots: Snapshots | None = None,
        batch_norm: str = "tracked",
        channels_last: bool = False,
    ) -> None:
        self.method = method
        self.context = method.context
        self.model = method.context.model
        self.optimizer = optimizer
        self.average = average
        self.snapshots = snapshots
        self.layout: Layout | None = None
        self._channels_last = channels_last
        self._group = self.context.group
        self._is_frozen = frozen = batch_norm == "frozen"
        still = [*self.model.tails.modules(), *method.modules()] if frozen else []
        self._frozen = [m for m in still if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._dtype = next(self.model.parameters()).dtype
        self._trained = [p for module in (self.model, method) for p in module.parameters() if p.requires_grad]
        moving = [self.model.trunks] if frozen else [self.model, method]
        self._statistics = [b for module in moving for b in module.buffers() if b.is_floating_point()]
        for trunk in self.model.trunks.values():
            trunk.update_as_if(method.passes)

    def like(self, method: Method, average: Average | None) -> TrainStep:
        """A step of the same kind of another method and average, without an optimizer: for its gradients only."""
        return TrainStep(
            method=method,
            optimizer=self.optimizer,
            average=average,
            batch_norm="frozen" if self._is_frozen else "tracked",
            channels_last=self._channels_last,
        )

    def __call__(self, batch: Batch) -> torch.Tensor:
        """One step on `batch` (already on the device), updating everything in place; its figures, [F]."""
        self.optimizer.zero_grad(set_to_none=True)
        self.context.step += 1
        vector = self.gradients(batch)
        self._group.average_([p.grad for p in self._trained if p.grad is not None])
        for parameter in self._trained:
            match_layout(parameter)
        self.update()
        return vector

    def gradients(self, batch: Batch) -> torch.Tensor:
        """The first half of a step: gradients of everything that trains; its figures, [F].

        Raises:
            SettingsError: a batch norm meets one clip without positions.
        """
        self.model.train()
        self.method.train()
        for module in (*self._frozen, *(self.average.followed if self.average is not None else ())):
            module.eval()
        self.context.factors = None
        try:
            figures = self.method.gradients(self.prepared(batch))
        except ValueError as error:
            if _LONE not in str(error):
                raise
            raise SettingsError(
                "training.batch_size: batch norm has no statistics in a batch of one clip.",
                "Raise it, or set training.batch_norm=frozen.",
            ) from error
        if self.layout is None:
            self.layout = Layout.of(figures, self.model.modalities)
        return self.layout.pack(figures)

    def update(self) -> None:
        """The second half: what the gradients change."""
        factors = self.context.factors
        chosen = [] if factors is None else factors.parameters(self.model)
        with multiplied_changes([(parameter, factors.value[k]) for parameter, k in chosen]):
            self.optimizer.step()
        self.follow()

    def follow(self, *, averaged: bool = False) -> None:
        """What follows the optimizer's step; `averaged`: but for the weight average's."""
        self._group.average_(self._statistics)
        if self.average is not None and not averaged:
            self.average.update(self.context.step)
        if self.snapshots is not None:
            self.snapshots.update(self.context.step)
        self.method.after_update()

    def train_mode(self, model: MultiModalModel) -> None:
        """Put a copy of the student in train mode, its tails' batch norms as the student's."""
        model.train()
        for module in model.tails.modules() if self._is_frozen else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def prepared(self, batch: Batch) -> Batch:
        """Inputs in the weights' type and layout: converted once, not in every pass."""

        def prepared(part: torch.Tensor) -> torch.Tensor:
            part = part.to(self._dtype)
            return channels_last(part) if self._channels_last else part

        return replace(batch, inputs={name: tuple(map(prepared, parts)) for name, parts in batch.inputs.items()})
