"""Gradient consistency (GCC, Eq. 5-6): the inner step, and tails evaluated at the stepped weights.

Letters: B clips, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.func import functional_call

from mbcd_cli.encoders.staged import Parts
from mbcd_cli.engine.layout import laid_out_like
from mbcd_cli.model import MultiModalModel

TailWeights = dict[str, dict[str, torch.Tensor]]
"""Modality -> name of a tail's parameter -> tensor."""


def tail_parameters(model: MultiModalModel) -> TailWeights:
    """theta_k: the trained parameters of every tail."""
    return {
        name: {key: value for key, value in model.tails[name].named_parameters() if value.requires_grad}
        for name in model.modalities
    }


def inner_step(theta: TailWeights, gradients: Sequence[torch.Tensor], *, alpha: float) -> TailWeights:
    """theta'_k = theta_k - alpha g_k (Eq. 5).

    Args:
        theta: parameters of the tails.
        gradients: g in the order of `flatten(theta)`; constants for the first order, else with a graph.
        alpha: learning rate of the inner step.
    """
    remaining = iter(gradients)
    return {
        name: {
            key: torch.sub(value, laid_out_like(next(remaining), value), alpha=alpha) for key, value in weights.items()
        }
        for name, weights in theta.items()
    }


def flatten(theta: TailWeights) -> list[torch.Tensor]:
    """All tensors of `theta`, in order."""
    return [value for weights in theta.values() for value in weights.values()]


def features_at(model: MultiModalModel, theta: TailWeights, inputs: Mapping[str, Parts]) -> dict[str, torch.Tensor]:
    """Normalised pooled features with the tails' parameters replaced by `theta`, each [B, D_k].

    Buffers stay the model's own, so batch norm updates its running statistics as in any other pass.
    """
    return {
        name: model.norms[name](functional_call(model.tails[name], theta[name], (inputs[name],)))
        for name in model.modalities
    }
