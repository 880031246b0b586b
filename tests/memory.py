"""An in-memory prepared dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from mbcd_cli.data.records import SPLITS, Batch
from mbcd_cli.errors import CacheError


@dataclass
class MemoryDataset:
    """What evaluation and landscape see of a prepared dataset: `arrays` modality -> [N, ...] tensors at the cut.

    `passes` counts the streams of batches asked for.
    """

    arrays: dict[str, torch.Tensor]
    labels: np.ndarray
    domain: np.ndarray
    split: np.ndarray
    domains: tuple[str, ...]
    label_names: tuple[str, ...]
    modalities: dict
    name: str = "memory"
    fingerprints: dict = field(default_factory=dict)
    passes: int = 0
    rejected: tuple = ()
    tail_weights: dict = field(default_factory=dict)
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
        return SimpleNamespace(ids=ids, domains=self.domain, splits=self.split, labels=self.labels)

    def has_test_views(self, clips) -> bool:
        return True

    def select(self, domains=None, splits=SPLITS, limit=None) -> np.ndarray:
        wanted = [self.domains.index(d) for d in (domains if domains is not None else self.domains)]
        keep = np.isin(self.domain, wanted) & np.isin(self.split, [SPLITS.index(s) for s in splits])
        if not keep.any():
            raise CacheError("no usable clips")
        return np.nonzero(keep)[0][:limit].astype(np.int64)

    def batches(self, clips, batch_size=16, training=True, seed=0, epoch=0, drop_last=True, start=0):
        assert not training, "a finished model is measured on the test view"
        self.passes += 1
        for at in range(0, len(clips), batch_size):
            index = torch.as_tensor(np.asarray(clips)[at : at + batch_size])
            yield Batch(
                inputs={name: (values[index],) for name, values in self.arrays.items()},
                labels=torch.as_tensor(self.labels)[index],
                domains=torch.as_tensor(self.domain)[index],
                clips=index,
            )
