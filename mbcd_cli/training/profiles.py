"""Profiles of weight averages: how much the weights after each step count in them (Karras et al. 2024, section 3).

A power function's profile at step t is proportional to s^gamma over 0 < s <= t: it looks the same at every length of a
training, and is named by its relative standard deviation sigma (of s, as a share of t). Letters: n snapshots, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbcd_cli.errors import SettingsError

KEPT = (0.05, 0.1)
"""Sigma of the two averages that `average.snapshots` keeps: from them, at several steps, others are put together."""
WIDEST = 12**-0.5
"""Sigma of gamma = 0: all steps alike."""
NARROWEST = 1e-3
"""Least sigma: far below what `KEPT` can be put together to."""


@dataclass(frozen=True, slots=True)
class PowerProfile:
    """The profile at step `t`, 1 or more, of exponent `gamma`."""

    t: int
    gamma: float

    def of_steps(self, steps: int) -> np.ndarray:
        """[T]: what the weights after each step, the first included, count: 1 in all.

        The recursion's own, exactly: its factors (1 - 1/s)^(gamma + 1) multiply to ratios of steps.
        """
        edges = np.minimum(np.arange(steps + 1) / self.t, 1.0) ** (self.gamma + 1)
        return np.diff(edges)


def gamma_of(sigma: float) -> float:
    """The exponent of relative standard deviation sigma = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))).

    Raises:
        SettingsError: sigma is not from `NARROWEST` to `WIDEST`, rounded as the message says it.
    """
    if not NARROWEST <= sigma <= round(WIDEST, 4):
        raise SettingsError(
            f"A profile of relative width {sigma:g} is none of a power function.",
            f"Choose a width from {NARROWEST:g} to {WIDEST:.4f}, where all steps count alike.",
        )
    roots = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2])
    return max(float(roots.real[np.abs(roots.imag) < 1e-6].max()), 0.0)


def inner(rows: Sequence[PowerProfile], columns: Sequence[PowerProfile]) -> np.ndarray:
    """Inner products [n, m] of profiles [n] and [m], as functions of the step."""
    (t, g), (u, h) = (np.array([(one.t, one.gamma) for one in many]).T for many in (rows, columns))
    t, g = t[:, None], g[:, None]
    scale = (g + 1) * (h + 1) * (t / u) ** np.where(t < u, h, -g)
    return scale / ((g + h + 1) * np.maximum(t, u))


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a profile is met by weighted snapshots.

    Attributes:
        wanted: the profile.
        distance: L1 distance of the snapshots' profile from it: 0 of the same, 2 where both have no step in common.
        free_sum, free_distance: sum of the weights, and distance, without the demand that they sum to 1.
    """

    wanted: PowerProfile
    distance: float
    free_sum: float
    free_distance: float


def fitted(snapshots: Sequence[PowerProfile], wanted: PowerProfile) -> tuple[list[float], Fit]:
    """Least squares over the step: weights [n] of `snapshots` with which their profile is nearest to `wanted`.

    Weights that sum to 0.85, say, would shrink the network by 15 %: they are made to sum to 1 (a Lagrange multiplier).
    """
    # In shares of the wanted step: of the order of 1 whatever the length of the training.
    products, towards = (inner(snapshots, many) * wanted.t for many in (snapshots, [wanted]))
    free = _solved(products, towards[:, 0])
    ones = np.ones((len(snapshots), 1))
    held = _solved(np.block([[products, ones], [ones.T, np.zeros((1, 1))]]), np.append(towards, 1.0))[:-1]
    steps = max(wanted.t, *(one.t for one in snapshots))
    profiles, target = np.stack([one.of_steps(steps) for one in snapshots]), wanted.of_steps(steps)

    def distance(weights: np.ndarray) -> float:
        return float(np.abs(weights @ profiles - target).sum())

    return held.tolist(), Fit(wanted, distance(held), float(free.sum()), distance(free))


def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The least solution [n]: profiles of neighbouring snapshots are nearly the same one."""
    return np.linalg.lstsq(matrix, right, rcond=1e-14)[0]
