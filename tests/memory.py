"""Fakes of what training and evaluation read: a prepared dataset, a checkpoint's weights, an epoch's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mbcd_cli.data.records import SPLITS, Batch
from mbcd_cli.errors import CacheError
from mbcd_cli.model import MultiModalModel
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.settings import OptimizerSettings
from mbcd_cli.training.optimizer import build_optimizer
from mbcd_cli.training.step import TrainStep


@dataclass
class MemoryClips:
    """Stands for a `ClipTable`."""

    ids: list[str]
    domains: np.ndarray
    splits: np.ndarray
    labels: np.ndarray

    @property
    def recordings(self) -> np.ndarray:
        return np.arange(len(self))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ArrayDataset:
    """Tensors at the cut: `arrays` modality -> test views [N, ...], `training` modality -> training views [N, V, ...].

    `passes` counts the streams of batches asked for.
    """

    arrays: dict[str, torch.Tensor]
    labels: np.ndarray
    domain: np.ndarray
    split: np.ndarray
    domains: tuple[str, ...]
    label_names: tuple[str, ...]
    modalities: dict
    training: dict[str, torch.Tensor] = field(default_factory=dict)
    name: str = "memory"
    fingerprints: dict = field(default_factory=dict)
    passes: int = 0
    rejected: tuple = ()
    tail_weights: dict = field(default_factory=dict)
    pretrained: frozenset = frozenset()
    trunk_weights: dict = field(default_factory=dict)
    caches: dict = field(default_factory=dict)
    online: None = None
    nbytes: int = 0

    @property
    def classes(self) -> int:
        return len(self.label_names)

    @property
    def clips(self):
        ids = [f"{self.domains[d]}_{i}" for i, d in enumerate(self.domain)]
        return MemoryClips(ids, domains=self.domain, splits=self.split, labels=self.labels)

    def has_test_views(self, clips) -> bool:
        return True

    def select(self, domains=None, splits=SPLITS, limit=None) -> np.ndarray:
        wanted = [self.domains.index(d) for d in (domains if domains is not None else self.domains)]
        keep = np.isin(self.domain, wanted) & np.isin(self.split, [SPLITS.index(s) for s in splits])
        if not keep.any():
            raise CacheError("no usable clips")
        return np.nonzero(keep)[0][:limit].astype(np.int64)

    def batches(
        self,
        clips,
        *,
        batch_size=16,
        training=False,
        seed=0,
        epoch=0,
        drop_last=False,
        start=0,
        share=(0, 1),
        views=1,
        read=None,
    ):
        assert not training or self.training, "a finished model is measured on the test view"
        self.passes += 1
        order, chosen = np.asarray(clips), np.zeros((len(clips), 1), np.int64)
        if training:
            generator = np.random.default_rng([seed, epoch])
            order = order[generator.permutation(len(order))]
            chosen = (generator.integers(2, size=(len(order), 1)) + np.arange(views)) % 2
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        for first in range(start * batch_size, stop, batch_size):
            span = slice(first, min(first + batch_size, stop))
            rows, view = (np.array_split(x[span], share[1])[share[0]] for x in (order, chosen))
            rows, view = np.repeat(rows, chosen.shape[1]), view.ravel()
            held = {n: x[rows, view] for n, x in self.training.items()} if training else None
            yield Batch(
                inputs={n: (x,) for n, x in (held or {n: x[rows] for n, x in self.arrays.items()}).items()},
                labels=torch.from_numpy(self.labels[rows]),
                domains=torch.from_numpy(self.domain[rows]),
                clips=torch.from_numpy(rows),
            )


@dataclass
class MemoryWeights:
    """The one fake of `mbcd_cli.scoring.deployed.Weights`: what of a checkpoint is evaluated."""

    student: dict[str, torch.Tensor]
    teacher: dict[str, torch.Tensor] | None
    label_names: tuple[str, ...]
    epoch: int = 1


@dataclass
class MemoryEpoch:
    """The one fake of `mbcd_cli.methods.base.EpochClips`: batches written down.

    Attributes:
        of_epoch: so many epochs later -> its batches. held_out: those of the sources' test split.
        step, built: whose train mode and optimizer they are.
        read: how many batches of the epoch were asked for.
    """

    of_epoch: Callable[[int], Sequence[Batch]] = lambda ahead: ()
    held_out: Sequence[Batch] = ()
    seed: int = 3
    step: TrainStep | None = None
    built: OptimizerSettings | None = None
    read: int = 0

    @property
    def batches(self) -> int:
        return len(self.of_epoch(0))

    def training(self, ahead: int = 0) -> Iterator[Batch]:
        for batch in self.of_epoch(ahead):
            self.read += 1
            yield batch

    def validation(self) -> Iterator[Batch]:
        yield from self.held_out

    def optimizer(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(parameters, self.built)

    def train_mode(self, model: MultiModalModel) -> None:
        self.step.train_mode(model)


def checkpoint_of(settings, dataset: ArrayDataset, *, student: dict, teacher: dict | None, epoch: int) -> Checkpoint:
    """A checkpoint that only holds weights, of a training on the dataset."""
    return Checkpoint(
        settings=settings,
        modalities=dataset.modalities,
        dataset=dataset.name,
        label_names=tuple(dataset.label_names),
        domains=tuple(dataset.domains),
        fingerprints=dict(dataset.fingerprints),
        student=student,
        teacher=teacher,
        epoch=epoch,
        epoch_step=0,
        step=epoch,
        history=[],
        best=None,
        warnings=[],
    )
