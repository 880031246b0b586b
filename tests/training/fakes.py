"""The in-memory dataset of trainings, and settings to train on it."""

from __future__ import annotations

import signal

import numpy as np
import torch
from memory import ArrayDataset

from mbcd_cli.resolved import validate
from mbcd_cli.settings import Settings


class MemoryDataset(ArrayDataset):
    """Vectors whose class shows in both modalities; 3 domains, 4 classes, 2 views per training clip."""

    def __init__(self, *, per_domain: int = 24, classes: int = 4, names=("left", "right"), width: int = 6) -> None:
        generator = np.random.default_rng(5)
        count = 3 * per_domain
        labels = np.arange(count) % classes
        centres = {name: generator.normal(size=(classes, width)) for name in names}
        values = {
            name: (centres[name][labels][:, None] + 0.7 * generator.normal(size=(count, 3, width))).astype(np.float32)
            for name in names
        }
        super().__init__(
            arrays={name: torch.from_numpy(value[:, 0]) for name, value in values.items()},
            training={name: torch.from_numpy(value[:, 1:]) for name, value in values.items()},
            labels=labels,
            domain=np.repeat(np.arange(3), per_domain),
            split=(np.arange(count) // classes % 3 == 2).astype(np.int64),
            domains=("a", "b", "c"),
            label_names=tuple(f"class{k}" for k in range(classes)),
            modalities=dict(memory_settings(names=names, width=width).modalities),
            fingerprints={name: f"print-{name}" for name in names},
        )


class Signalling(MemoryDataset):
    """Sends this process a signal before its n-th batch, of training views or of all."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGTERM, *, training: bool = True) -> None:
        super().__init__()
        self.left, self.number, self.only_training = at, number, training

    def batches(self, clips, **options):
        for batch in super().batches(clips, **options):
            if options["training"] or not self.only_training:
                self.left -= 1
                if self.left == 0:
                    signal.raise_signal(self.number)
            yield batch


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
