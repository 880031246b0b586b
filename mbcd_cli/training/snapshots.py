"""Averages of the student that are kept beside any training (`average.snapshots`), one file after every epoch.

Two power-function averages (`profiles`), from which other profiles are put together afterwards, and the mean of the
epoch's own weights, which a window and SWAD's valley are exact means of. They are of the student, whatever teaches it.
"""

from __future__ import annotations

from typing import Any

import torch

from mbcd_cli.model import MultiModalModel
from mbcd_cli.runs.snapshot_files import Snapshot
from mbcd_cli.training.average import Segment, move_towards
from mbcd_cli.training.profiles import KEPT, gamma_of


class Snapshots:
    """Takes in the student's weights after every step; all but frozen ones, uni-modal heads and statistics included.

    Args:
        student: its tensors are referred to, so it must be updated in place.
    """

    def __init__(self, student: MultiModalModel) -> None:
        self._student = student
        self._gammas = [gamma_of(sigma) for sigma in KEPT]
        self._averages: list[list[torch.Tensor]] = [[] for _ in KEPT]
        self._segment = Segment(next(student.parameters()).device)
        self._weights: dict[str, torch.Tensor] | None = None

    def moved(self) -> None:
        """The student's tensors lie elsewhere now."""
        self._weights = None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What is averaged, by name."""
        if self._weights is None:
            frozen = {name for name, parameter in self._student.named_parameters() if not parameter.requires_grad}
            state = self._student.state_dict()
            self._weights = {n: v for n, v in state.items() if v.is_floating_point() and n not in frozen}
        return self._weights

    def update(self, step: torch.Tensor) -> None:
        """Take in the weights after an optimizer step; `step` [] is how many were done, on the device."""
        weights = list(self.weights.values())
        for number, gamma in enumerate(self._gammas):
            average = self._averages[number] = self._averages[number] or [value.clone() for value in weights]
            # 1 - beta_t, without the digits that 1 - (1 - 1/t)^(gamma + 1) would lose in float32.
            move_towards(average, weights, -torch.expm1((gamma + 1) * torch.log1p(-1 / step.to(weights[0].dtype))))
        self._segment.update(weights, step)

    def close(self, epoch: int, step: int) -> Snapshot:
        """What is kept of epoch `epoch`, which ends with step `step`."""
        steps, mean = self._segment.close(step)
        state = self._student.state_dict()
        return Snapshot(
            epoch=epoch,
            step=step,
            steps=steps,
            gammas=list(self._gammas),
            averages=[dict(zip(self.weights, average, strict=True)) for average in self._averages],
            mean=dict(zip(self.weights, mean, strict=True)),
            counters={name: value for name, value in state.items() if not value.is_floating_point()},
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"averages": self._averages, **self._segment.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        device = next(self._student.parameters()).device
        self._averages = [[value.to(device, copy=True) for value in average] for average in state["averages"]]
        self._segment.load(state)

    def nbytes(self) -> int:
        """Bytes that it takes in memory, and its file on the disk."""
        return (len(KEPT) + 1) * sum(value.nbytes for value in self.weights.values())
