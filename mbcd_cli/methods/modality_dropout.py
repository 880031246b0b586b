"""Adaptive modality dropout (AMD, Eq. 2-4).

Letters: B clips, M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from mbcd_cli.methods.parts import full_precision
from mbcd_cli.randomness import Randomness
from mbcd_cli.settings import Fraction, Range, Slice


class DropoutSettings(Slice):
    """Modality dropout before fusion (AMD, Eq. 2-4)."""

    strategy: Literal["none", "fixed", "adaptive"] = "adaptive"
    """No modality dropout, one fixed rate, or the adaptive rate of Eq. 3-4."""
    rate: Annotated[Fraction, Range(0.1, 0.9, only=("strategy", "fixed"))] = 0.5
    """Rate of the fixed strategy."""
    score: Literal["confidence", "true_class"] = "confidence"
    """What s_k sums: the largest class probability (the paper), or the true class's (a label-aware variant)."""
    agreement: bool = False
    """A clip loses modalities only where the head of one that is left is right (ours)."""


@torch.no_grad()
def scores(logits: Sequence[torch.Tensor], labels: torch.Tensor, *, score: str) -> torch.Tensor:
    """s_k of Eq. 2, summed over the batch: M uni-modal logits, each [B, C] -> [M].

    `confidence` sums the largest class probability (no label is used), `true_class` the label's.
    """
    sums = []
    for of_modality in logits:
        probabilities = full_precision(of_modality.detach()).softmax(dim=1)
        if score == "true_class":
            sums.append(probabilities.gather(1, labels[:, None]).sum())
        else:
            sums.append(probabilities.amax(dim=1).sum())
    return torch.stack(sums)


def ratios(s: torch.Tensor) -> torch.Tensor:
    """r_k = 1/(M-1) sum_{j != k} s_k / s_j (Eq. 3), [M] -> [M]; ones for a single modality."""
    count = s.shape[0]
    if count == 1:
        return torch.ones_like(s)
    table = s[:, None] / s[None, :]
    return (table.sum(dim=1) - table.diagonal()) / (count - 1)


def drop_probabilities(r: torch.Tensor, settings: DropoutSettings) -> torch.Tensor:
    """p_k [M]: tanh(max(r_k - 1, 0)) (Eq. 4), the fixed rate, or zeros.

    A single modality is never dropped: there is nothing to balance it with.
    """
    if settings.strategy == "none" or r.shape[0] == 1:
        return torch.zeros_like(r)
    if settings.strategy == "fixed":
        return torch.ones_like(r) * settings.rate
    return torch.tanh(torch.clamp(r - 1, min=0))


def keep_mask(p: torch.Tensor, batch: int, randomness: Randomness) -> torch.Tensor:
    """One Bernoulli per clip and modality: [B, M] of 0 and 1, zero with probability p_k; p = 0 keeps all."""
    return (randomness.uniform(batch, p.shape[0]) >= p).to(p.dtype)


@torch.no_grad()
def only_where_others_agree(keep: torch.Tensor, logits: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """The mask [B, M] for clips of which a kept modality's head is right; ones for the others.

    Args:
        logits: uni-modal logits, M times [B, C].
    """
    right = torch.stack([(full_precision(one).argmax(dim=1) == labels) for one in logits], dim=1)
    return torch.where((right & (keep > 0)).any(dim=1, keepdim=True), keep, 1.0)
