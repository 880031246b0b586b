"""Flatness: how the loss grows with the distance from a checkpoint, on average and at worst.

Letters: R radii, S random directions, n moving values; w the weights, g a perturbation of them, L the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from mbcd_cli.landscape.directions import Sphere, Vector, move
from mbcd_cli.landscape.objective import BatchLoss, LossFunction
from mbcd_cli.landscape.store import Grid


@dataclass(frozen=True, slots=True)
class FlatnessCurve:
    """Loss increase over radii (Cha et al. 2021: E over ||g|| = r of L(w + g) - L(w)).

    Attributes:
        radii: [R].
        mean: [R] mean increase over the directions whose loss is finite; NaN where none is.
        half_width: [R] half of the 95 % confidence interval of the mean (Student's t); NaN below two
            directions.
        accuracy: [R] mean accuracy.
        directions: [R] directions with a finite loss.
        non_finite: computed points whose loss is not finite.
    """

    radii: np.ndarray
    mean: np.ndarray
    half_width: np.ndarray
    accuracy: np.ndarray
    directions: np.ndarray
    non_finite: int


def flatness_curve(grid: Grid, *, centre: float) -> FlatnessCurve:
    """Statistics over the random directions (rows) of a grid [S, R] that `fill_radii` filled; `centre` is L(w)."""
    finite = np.isfinite(grid.loss)
    count = finite.sum(axis=0)
    increase = np.where(finite, grid.loss - centre, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(count > 0, increase.sum(axis=0) / count, np.nan)
        accuracy = np.where(count > 0, np.where(finite, grid.accuracy, 0.0).sum(axis=0) / count, np.nan)
        spread = np.where(finite, (increase - mean) ** 2, 0.0).sum(axis=0)
        half = stats.t.ppf(0.975, count - 1) * np.sqrt(spread / (count - 1) / count)
    half = np.where(count > 1, half, np.nan)
    return FlatnessCurve(grid.x, mean, half, accuracy, count, grid.non_finite)


def gradient(terms: Sequence[BatchLoss], at: Vector) -> Vector:
    """Gradient [n] of the summed terms at `at` [n], one term's graph in memory at a time."""
    total = {name: torch.zeros_like(tensor) for name, tensor in at.items()}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in at.items()}
    for term in terms:
        parts = torch.autograd.grad(term(leaves), list(leaves.values()), allow_unused=True)
        for name, part in zip(leaves, parts, strict=True):
            if part is not None:
                total[name] += part
    return total


def worst_case(
    loss: LossFunction,
    sphere: Sphere,
    *,
    radius: float,
    steps: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """Largest loss found on the sphere of `radius` around the start, and the accuracy there.

    Projected gradient ascent: the first step is SAM's (Foret et al. 2021), along the steepest perturbation
    at the start; each further one goes half of the radius, falling linearly, along the steepest
    perturbation at the present point and back onto the sphere. The best point of the ascent counts, so this
    is a lower bound of the maximum. Where the gradient at the start is zero or not finite, a random
    perturbation is the first step.

    Args:
        loss: around the checkpoint. sphere: the perturbations of radius 1 around it.
        radius: of the sphere; 0 is the checkpoint itself.
        steps: of the ascent, one gradient and one loss each. seed: of the random first step.
    """
    start = loss.start
    terms = loss.terms()
    if radius == 0:
        return tuple(loss.measure(start).tolist())
    best = (-np.inf, np.nan)
    away = sphere.steepest(gradient(terms, start))
    if not all(bool(t.isfinite().all()) for t in away.values()) or all(not t.any() for t in away.values()):
        away = sphere.sample(seed=seed, index=0)
    for step in range(steps):
        point = move(start, [away], [radius])
        value, accuracy = loss.measure(point).tolist()
        if not np.isfinite(value):
            return value, accuracy
        best = max(best, (value, accuracy))
        if step + 1 < steps:
            uphill = sphere.steepest(gradient(terms, point))
            length = 0.5 * (1 - step / steps)
            away = sphere.project(move(away, [uphill], [length]))
    return best
