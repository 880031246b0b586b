"""What a method reads before an epoch of a training: `methods.base.EpochClips`.

Letters: N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.model import MultiModalModel
from mbcd_cli.settings import Settings
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.optimizer import build_optimizer
from mbcd_cli.training.step import TrainStep


class InterruptedReading(Exception):
    """The training is to stop; what the method had begun between epochs is undone by its own blocks first."""


@dataclass(frozen=True, slots=True)
class TrainingClips:
    """Those of one epoch.

    Attributes:
        step: whose method asks. epoch: epochs finished.
        clips, held_out: training clips and those of the sources' test split, [N] indices into the clip table.
        interrupted: whether to stop.
    """

    step: TrainStep
    feed: Feed
    settings: Settings
    clips: np.ndarray
    held_out: np.ndarray
    epoch: int
    interrupted: Callable[[], bool]

    @property
    def seed(self) -> int:
        """See `EpochClips`."""
        return self.settings.training.seed

    @property
    def batches(self) -> int:
        """See `EpochClips`."""
        return len(self.clips) // self.settings.training.batch_size

    def training(self, ahead: int = 0) -> Iterator[Batch]:
        """See `EpochClips`."""
        training = self.settings.training
        batches = self.feed.training(
            self.clips,
            batch_size=training.batch_size,
            seed=training.seed,
            epoch=self.epoch + ahead,
            start=0,
            views=self.step.method.views,
        )
        with closing(batches):
            for _, batch in batches:
                self._look()
                if self.feed.inputs is not None:
                    inputs = {name: self.feed.inputs(name, parts) for name, parts in batch.inputs.items()}
                    batch = replace(batch, inputs=inputs).to(self.feed.device)
                yield self.step.prepared(batch)

    def validation(self) -> Iterator[Batch]:
        """See `EpochClips`."""
        for batch in self.feed.testing(self.held_out, batch_size=self.settings.evaluation.batch_size):
            self._look()
            yield self.step.prepared(batch.to(self.feed.device))

    def _look(self) -> None:
        if self.interrupted():
            raise InterruptedReading

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """See `EpochClips`."""
        return build_optimizer(parameters, self.settings.optimizer)

    def train_mode(self, model: MultiModalModel) -> None:
        """See `EpochClips`."""
        self.step.train_mode(model)
