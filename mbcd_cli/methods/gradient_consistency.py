"""Gradient consistency (GCC, Eq. 5-6): the inner step on the tails' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from mbcd_cli.model import TailWeights
from mbcd_cli.settings import NonNegative, Range, Slice


class ConsistencySettings(Slice):
    """Gradient consistency (GCC, Eq. 5-6)."""

    order: Literal["off", "first", "second"] = "first"
    """No inner step, one whose gradient is a constant (the reference), or one that is differentiated through."""
    alpha: Annotated[NonNegative, Range(0.1, 10, times=True, only=("order", "first", "second"))] = 1e-4
    """Learning rate of the inner step."""


def inner_step(theta: TailWeights, gradients: Sequence[torch.Tensor], *, alpha: float | torch.Tensor) -> TailWeights:
    """theta'_k = theta_k - alpha g_k (Eq. 5).

    Args:
        theta: parameters of the tails.
        gradients: g in the order of `in_order(theta)`, each of its parameter's shape; constants for the first order,
            else with a graph.
        alpha: learning rate of the inner step; a tensor [] inside a population whose members' differ.
    """
    remaining = iter(gradients)

    def stepped(value: torch.Tensor) -> torch.Tensor:
        gradient = next(remaining)
        return value - alpha * gradient if isinstance(alpha, torch.Tensor) else torch.sub(value, gradient, alpha=alpha)

    return {name: {key: stepped(value) for key, value in weights.items()} for name, weights in theta.items()}


def in_order(theta: TailWeights) -> list[torch.Tensor]:
    """All tensors of `theta`, each of its own shape, modality after modality."""
    return [value for weights in theta.values() for value in weights.values()]
