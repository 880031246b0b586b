"""A small in-memory dataset with the reader's methods, and settings to train on it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from mbcd_cli.data.records import SPLITS, Batch
from mbcd_cli.layers import validate
from mbcd_cli.settings import Settings


class MemoryDataset:
    """Vectors whose class shows in both modalities; 3 domains, 4 classes, 2 views per training clip."""

    def __init__(self, *, per_domain: int = 24, classes: int = 4, names=("left", "right"), width: int = 6) -> None:
        generator = np.random.default_rng(5)
        settings = memory_settings(names=names, width=width)
        self.name, self.domains = "memory", ("a", "b", "c")
        self.label_names = tuple(f"class{k}" for k in range(classes))
        self.classes = classes
        self.modalities = dict(settings.modalities)
        self.fingerprints = {name: f"print-{name}" for name in names}
        self.tail_weights, self.trunk_weights, self.caches = {}, {}, {}
        self.online, self.nbytes = None, 0
        self.rejected: list = []
        count = 3 * per_domain
        labels = np.arange(count) % classes
        domains = np.repeat(np.arange(3), per_domain)
        splits = (np.arange(count) // classes % 3 == 2).astype(np.int64)
        self.clips = SimpleNamespace(
            ids=[f"clip{i:03d}" for i in range(count)], domains=domains, splits=splits, labels=labels
        )
        centres = {name: generator.normal(size=(classes, width)) for name in names}
        self.values = {
            name: (centres[name][labels][:, None] + 0.7 * generator.normal(size=(count, 3, width))).astype(np.float32)
            for name in names
        }

    def has_test_views(self, clips):
        return True

    def select(self, *, domains, splits=SPLITS, limit=None):
        wanted = [self.domains.index(d) for d in domains]
        rows = np.flatnonzero(
            np.isin(self.clips.domains, wanted) & np.isin(self.clips.splits, [SPLITS.index(s) for s in splits])
        )
        return rows[:limit]

    def batches(self, clips, *, batch_size, training, seed=0, epoch=0, drop_last=False, start=0, share=(0, 1), views=1):
        order, chosen = np.asarray(clips), np.zeros((len(clips), 1), np.int64)
        if training:
            generator = np.random.default_rng([seed, epoch])
            order = order[generator.permutation(len(order))]
            first = generator.integers(2, size=(len(order), 1))
            chosen = 1 + (first + np.arange(views)) % 2
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        for first in range(start * batch_size, stop, batch_size):
            rows, view = (
                np.split(x[first : min(first + batch_size, stop)], share[1])[share[0]] for x in (order, chosen)
            )
            rows, view = np.repeat(rows, chosen.shape[1]), view.ravel()
            yield Batch(
                inputs={name: (torch.from_numpy(v[rows, view]),) for name, v in self.values.items()},
                labels=torch.from_numpy(self.clips.labels[rows]),
                domains=torch.from_numpy(self.clips.domains[rows]),
                clips=torch.from_numpy(rows),
            )


def memory_settings(*, names=("left", "right"), width: int = 6, **changes) -> Settings:
    """Settings of a two-epoch training on `MemoryDataset`, target domain c; `changes` replace slices."""
    tree = {
        "modalities": {name: {"kind": "array", "dimension": width, "width": 2} for name in names},
        "model": {"hidden": 8, "modalities": tuple(names)},
        "optimizer": {"lr": 1e-2},
        "training": {"target_domain": "c", "source_domains": ("a", "b"), "epochs": 2, "batch_size": 8, "log_steps": 3},
        "method": {"name": "mbcd"},
        "average": {"beta": 0.9},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value}
    return validate(tree)
