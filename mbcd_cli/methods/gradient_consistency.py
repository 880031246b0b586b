"""Gradient consistency (GCC, Eq. 5-6): the inner step on the tails' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from mbcd_cli.model import TailWeights
from mbcd_cli.settings import NonNegative, Slice


class ConsistencySettings(Slice):
    """Gradient consistency (GCC, Eq. 5-6)."""

    order: Literal["off", "first", "second"] = "first"
    """No inner step, one whose gradient is a constant (the reference), or one that is differentiated through."""
    alpha: NonNegative = 1e-4
    """Learning rate of the inner step."""


def inner_step(theta: TailWeights, gradients: Sequence[torch.Tensor], *, alpha: float) -> TailWeights:
    """theta'_k = theta_k - alpha g_k (Eq. 5).

    Args:
        theta: parameters of the tails.
        gradients: g in the order of `flatten(theta)`; constants for the first order, else with a graph.
        alpha: learning rate of the inner step.
    """
    remaining = iter(gradients)
    return {
        name: {key: torch.sub(value, next(remaining), alpha=alpha) for key, value in weights.items()}
        for name, weights in theta.items()
    }


def in_order(theta: TailWeights) -> list[torch.Tensor]:
    """All tensors of `theta`, in order."""
    return [value for weights in theta.values() for value in weights.values()]
