"""A small in-memory prepared dataset with two array modalities, and checkpoints of tiny models for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from memory import ArrayDataset, checkpoint_of

from mbcd_cli.model import build_model
from mbcd_cli.resolved import validate
from mbcd_cli.settings import Settings


def make_settings(method: str = "mbcd", **training) -> Settings:
    """Two array modalities, small heads; the target is `street`."""
    array = {"kind": "array", "dimension": 6, "width": 2}
    return validate(
        {
            "modalities": {"video": array, "audio": array},
            "model": {"hidden": 8},
            "method": {"name": method},
            "training": {"target_domain": "street", **training},
            "evaluation": {"batch_size": 7, "top_k": 2, "analyses": (), "export": (), "report": False},
        }
    )


def make_dataset(settings: Settings, clips: int = 60, classes: int = 4, seed: int = 0) -> ArrayDataset:
    """Clips whose class shows in both modalities, less in video outside the sources."""
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % classes
    domain = rng.integers(0, 3, clips)
    centres = rng.normal(size=(2, classes, 6)) * 2
    arrays = {}
    for index, name in enumerate(settings.modalities):
        values = centres[index][labels] + rng.normal(size=(clips, 6)) * (1 + 2 * (domain == 2) * (index == 0))[:, None]
        arrays[name] = torch.tensor(values, dtype=torch.float32)
    return ArrayDataset(
        arrays=arrays,
        labels=labels.astype(np.int64),
        domain=domain.astype(np.int64),
        split=rng.integers(0, 2, clips).astype(np.int64),
        domains=("studio", "tilted", "street"),
        label_names=tuple(f"class {i}" for i in range(classes)),
        modalities=dict(settings.modalities),
    )


def make_checkpoint(settings: Settings, dataset: ArrayDataset, *, teacher: bool = True, seed: int = 0, epoch: int = 3):
    """Random weights of the right shape, in the form of a checkpoint."""

    def state(seed: int):
        torch.manual_seed(seed)
        model = build_model(dataset.modalities, settings=settings.model, classes=dataset.classes)
        return {key: value.clone() for key, value in model.state_dict().items()}

    averaged = {k: v for k, v in state(seed + 100).items() if not k.startswith("heads.")}
    teacher_state = averaged if teacher else None
    return checkpoint_of(settings, dataset, student=state(seed), teacher=teacher_state, epoch=epoch)


@pytest.fixture
def settings() -> Settings:
    return make_settings()


@pytest.fixture
def dataset(settings) -> ArrayDataset:
    return make_dataset(settings)
