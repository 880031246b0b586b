"""How well a linear classifier tells the domain of a clip from its cached features.

Letters: N clips, D values of a clip.
"""

from __future__ import annotations

import numpy as np
import torch

from mbcd_cli.audit.findings import DomainProbe
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import SPLITS, TEST_VIEW

CLIPS, FOLDS, SEED = 2000, 5, 0
_CELLS = 4
"""Pooled values along each axis of a map."""
_TOGETHER = 64


def probe_domains(dataset: Dataset, name: str) -> DomainProbe | None:
    """Accuracy of logistic regression for the domain, over five folds, on one stored view of at most 2,000 clips.

    Domains count alike, in the fit and in the accuracy, however many clips each has. Of training clips where their
    views are stored, else of test clips; None where no two domains have five of them.
    Maps are averaged over 4 cells along each axis.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    cache = dataset.caches[name]
    view, split = (0, "train") if cache.views else (TEST_VIEW, "test")
    if not (cache.stored(view) & (dataset.clips.splits == SPLITS.index(split))).any():
        return None
    clips = dataset.select(domains=dataset.domains, splits=[split], limit=CLIPS)
    many = np.bincount(dataset.clips.domains[clips]) >= FOLDS
    clips = clips[many[dataset.clips.domains[clips]]]
    domains = dataset.clips.domains[clips]
    if many.sum() < 2:
        return None
    features = np.concatenate(
        [
            pooled(cache.read(some, np.full(len(some), view)))
            for at in range(0, len(clips), _TOGETHER)
            if len(some := clips[at : at + _TOGETHER])
        ]
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
    accuracy = float(cross_val_score(model, features, domains, cv=folds, scoring="balanced_accuracy").mean())
    return DomainProbe(name, accuracy, float(1 / many.sum()), len(clips))


def pooled(parts: tuple[torch.Tensor, ...]) -> np.ndarray:
    """Parts of a view -> [B, D]: vectors as they are, the mean step of sequences [B, T, D], of maps [B, C, ...] the
    means of 4 cells along each axis."""
    rows = []
    for part in parts:
        part = part.float()
        if part.ndim == 3:
            part = part.mean(dim=1)
        else:
            for axis in range(2, part.ndim):
                cells = part.tensor_split(min(_CELLS, part.shape[axis]), dim=axis)
                part = torch.cat([cell.mean(dim=axis, keepdim=True) for cell in cells], dim=axis)
        rows.append(part.flatten(1).numpy())
    return np.concatenate(rows, axis=1)
