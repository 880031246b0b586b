"""D&R's pull from its formulas: clusters by nearest of the given centres, purities by counting."""

from __future__ import annotations

import math

import torch


def scaled(h):
    columns = []
    for c in range(h.shape[1]):
        low, high = float(h[:, c].min()), float(h[:, c].max())
        columns.append((h[:, c] - low) / (high - low) * 2 - 1)
    return torch.stack(columns, dim=1)


def lloyd(h, centres, rounds=50):
    """Cluster of every row of h [N, D], from centres [C, D]."""
    for _ in range(rounds):
        nearest = [min(range(len(centres)), key=lambda c: float(((row - centres[c]) ** 2).sum())) for row in h]
        centres = [
            sum(r for r, n in zip(h, nearest, strict=True) if n == c) / nearest.count(c) for c in range(len(centres))
        ]
    return nearest


def purity(clusters, labels):
    right = 0
    for cluster in set(clusters):
        of = [int(y) for c, y in zip(clusters, labels, strict=True) if c == cluster]
        right += max(of.count(y) for y in set(of))
    return right / len(labels)


def pulled(theta, first, training, validation):
    """One parameter after the pull, from the two purities."""
    w = math.tanh(3 * abs(training - validation))
    return w * first + (1 - w) * theta
