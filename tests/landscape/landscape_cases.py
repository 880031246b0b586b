"""Losses with known values, a small model, and an in-memory prepared dataset."""

from __future__ import annotations

import numpy as np
import torch
from memory import ArrayDataset, checkpoint_of

from mbcd_cli.model import build_model
from mbcd_cli.resolved import validate
from mbcd_cli.settings import Settings


class Quadratic:
    """loss(p) = 1/2 p^T A p over all named tensors flattened in order; "accuracy" is 1 / (1 + loss)."""

    points_per_pass = 1

    def __init__(self, matrix: np.ndarray, start: dict[str, torch.Tensor]) -> None:
        self.matrix = torch.as_tensor(matrix, dtype=torch.float64)
        self.start = start
        self.calls = 0

    def loss(self, moved) -> torch.Tensor:
        flat = torch.cat([moved[name].double().reshape(-1) for name in self.start])
        return 0.5 * flat @ self.matrix @ flat

    def measure(self, moved) -> torch.Tensor:
        self.calls += 1
        loss = self.loss(moved).detach()
        return torch.stack((loss, 1 / (1 + loss)))

    def measure_many(self, moved) -> torch.Tensor:
        count = len(next(iter(moved.values())))
        return torch.stack([self.measure({n: t[p] for n, t in moved.items()}) for p in range(count)])

    def terms(self):
        return [lambda moved: 0.25 * self.loss(moved), lambda moved: 0.75 * self.loss(moved)]


def symmetric(eigenvalues, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))
    return q @ np.diag(eigenvalues) @ q.T


def make_settings(**landscape) -> Settings:
    array = {"kind": "array", "dimension": 6, "width": 1}
    return validate(
        {
            "modalities": {"video": array, "audio": array},
            "model": {"hidden": 7},
            "training": {"target_domain": "street"},
            "runtime": {"device": "cpu"},
            "landscape": {"points": 5, "directions": 3, "radii": (0.0, 0.2, 0.4), "batch_size": 9, **landscape},
        }
    )


def make_dataset(settings: Settings, clips: int = 60, seed: int = 0) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % 3
    centres = rng.normal(size=(2, 3, 6))
    arrays = {
        name: torch.tensor(centres[k][labels] + rng.normal(size=(clips, 6)), dtype=torch.float32)
        for k, name in enumerate(settings.modalities)
    }
    return ArrayDataset(
        arrays=arrays,
        labels=labels.astype(np.int64),
        domain=rng.integers(0, 3, clips).astype(np.int64),
        split=rng.integers(0, 2, clips).astype(np.int64),
        domains=("studio", "tilted", "street"),
        label_names=("a", "b", "c"),
        modalities=dict(settings.modalities),
        fingerprints={"video": "f1", "audio": "f2"},
    )


def make_model(settings: Settings, dataset: ArrayDataset, seed: int = 0):
    """A model whose batch norms have seen data, so that running statistics matter."""
    torch.manual_seed(seed)
    model = build_model(dataset.modalities, settings=settings.model, classes=dataset.classes)
    with torch.no_grad():
        for batch in dataset.batches(np.arange(40), batch_size=20, training=False):
            model.train()(batch.inputs)
    return model.eval()


def make_checkpoint(settings, dataset, *, seed: int = 0, teacher: bool = False, epoch: int = 1):
    def state(seed):
        return {k: v.clone() for k, v in make_model(settings, dataset, seed).state_dict().items()}

    teacher_state = state(seed + 100) if teacher else None
    return checkpoint_of(settings, dataset, student=state(seed), teacher=teacher_state, epoch=epoch)
