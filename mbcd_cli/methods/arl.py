"""ARL: asymmetric representation learning (Wei, Luo, Luo, ICCV 2025, arXiv 2507.10203), its coefficients applied.

Letters: B clips (of this process), M modalities, C classes, s_k fused logits with all features but h_k zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Figures, Method, Term, total
from mbcd_cli.methods.parts import (
    ModulatedSettings,
    cross_entropy,
    full_precision,
    logits_of_some,
    mean_entropies,
)
from mbcd_cli.settings import AROUND, NonNegative, Range

LEAST_SHARE = 0.6
"""Least share of a modality in all entropies, times M (the authors' 0.3 of two)."""
TEMPERATURE = 4.0
"""T by default."""


class ARLSettings(ModulatedSettings):
    """ARL."""

    gamma: Annotated[NonNegative, AROUND] = 4.0
    """Weight of the modalities' own cross-entropies (the authors': 3 to 5 by dataset)."""
    first_gamma: NonNegative = 1.0
    """The same in the epochs before `start`."""
    temperature: Annotated[NonNegative, Range(1, 16, benchmark=4)] = TEMPERATURE
    """T, how far apart the coefficients are (the authors': 8 on CREMA-D, else 4)."""
    start: Annotated[int, Field(ge=0)] = 6
    """Epochs before encoders are scaled."""


class ARL(Method):
    """CE(fused) + gamma sum_k CE(s_k), and what encoder k takes times 1 + c_k.

    c = softmax_k(T q_k (1 - d_k) / (M - 1)).
    d_k, dependence, is the share of E sum_c |s_kc| in that of all; q_k, reliability, is 1 / n_k over sum_j 1 / n_j, n_k
    the share of s_k's mean entropy in that of all, 0.6 / M at least. So the modality that is used less than it can be
    relied on is pushed. All of them are constants for the gradient. M = 2 is the authors'; M = 1: the factor is 1.
    """

    Settings = ARLSettings
    settings: ARLSettings
    ticker = ("ce_fused", "factor")
    neutral: ClassVar[Mapping[str, object]] = {"first_gamma": 0.0, "start": 1000}

    def gradients(self, batch: Batch) -> Figures:
        """One pass of the tails, M + 1 of the fused head."""
        context, settings = self.context, self.settings
        batch = self.at_cut(batch)
        out = self(batch)
        with context.autocast():
            alone = logits_of_some(context.model, out.features, [{k} for k in range(len(out.features))])
        active = context.epoch >= settings.start
        terms = self.losses(batch, out) | {"alone": self.own_losses(batch, alone, active)}
        loss = total(terms)
        context.backward(loss)
        with torch.no_grad():
            sizes = torch.stack([full_precision(logits).abs().sum(dim=1).mean() for logits in alone])
            sizes, entropies = context.group.average([sizes, torch.stack(mean_entropies(alone))])
            d, q = sizes / sizes.sum(), reliance(entropies)
            factor = torch.where(active, 1 + pushes(d, q, temperature=settings.temperature), 1.0)
        context.modulate(factor, of=settings.modulate)
        return self.figures(batch, out, loss, terms, dependence=d, reliability=q, factor=factor)

    def own_losses(self, batch: Batch, alone: Sequence[torch.Tensor], active: torch.Tensor) -> Term:
        """CE(s_k), [M], and its weight, []; `alone` are M times s_k [B, C]."""
        ce = torch.stack([cross_entropy(logits, batch.labels) for logits in alone])
        one = torch.ones_like(ce[0].detach())
        return Term(ce, torch.where(active, self.settings.gamma * one, self.settings.first_gamma * one))


def reliance(entropies: torch.Tensor) -> torch.Tensor:
    """q [M] from mean entropies, [M]."""
    inverse = 1 / (entropies / entropies.sum()).clamp(min=LEAST_SHARE / len(entropies))
    return inverse / inverse.sum()


def pushes(d: torch.Tensor, q: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """c [M] from dependence and reliability, [M]; 0 for a single modality."""
    if len(d) == 1:
        return torch.zeros_like(d)
    return (temperature * q * (1 - d) / (len(d) - 1)).softmax(dim=0)
