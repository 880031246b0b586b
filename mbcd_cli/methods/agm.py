"""AGM: adaptive gradient modulation (Li, Li, Hu, Li, Lyu, ICCV 2023, arXiv 2308.07686), for any number of modalities.

Letters: B clips (of this process), M modalities, C classes, f(S) fused logits of the modalities in S, zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import comb
from typing import Annotated, ClassVar

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Figures, Method, Outputs, Term, total
from mbcd_cli.methods.parts import ModulatedSettings, full_precision, logits_of_some
from mbcd_cli.settings import AROUND, NonNegative, Positive

Subset = frozenset[int]


class AGMSettings(ModulatedSettings):
    """AGM."""

    alpha: Annotated[NonNegative, AROUND] = 2.5
    """Strength of the modulation."""
    cap: Positive = 10.0
    """Largest difference of ratios that counts (the authors': 10 of two modalities, 7 of three)."""


class AGM(Method):
    """ERM whose gradient is multiplied with kappa_k where it enters modality k's part phi_k of the fused logits.

    phi_k is the Shapley value of k in f, with f(none) = 0: sum_k phi_k = f(all). With l_k the mean negative
    log-likelihood of phi_k, r_k = exp(M / (M - 1) (mean_j l_j - l_k)), and r*_k the same of the mean of l_k over all
    steps before (0 at first), kappa_k = exp(alpha min(r*_k - r_k, cap)). M = 1: kappa = 1.
    modulate = "update": the gradient is ERM's, and what the optimizer makes of encoder k's is multiplied with kappa_k.
    """

    Settings = AGMSettings
    settings: AGMSettings
    ticker = ("ce_fused", "kappa")
    neutral: ClassVar[Mapping[str, object]] = {"alpha": 0.0}

    def __init__(self, settings: AGMSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.register_buffer("history", torch.zeros(len(context.model.modalities)))

    def gradients(self, batch: Batch) -> Figures:
        """One pass of the tails, and one of the fused head for each set of modalities."""
        batch = self.at_cut(batch)
        out = self(batch)
        parts = logit_shares(self.logits(out), len(out.features))
        with torch.no_grad():
            alone = torch.stack([negative_log_likelihood(phi, batch.labels) for phi in parts])
            (alone,) = self.context.group.average([alone])
            kappa = coefficients(alone, self.history, alpha=self.settings.alpha, cap=self.settings.cap)
            self.history += (alone - self.history) / self.context.step
        terms = self.losses(batch, out)
        if self.settings.modulate == "gradient":
            terms["ce_fused"] = self.modulated(batch, out, parts, kappa)
        loss = total(terms)
        self.context.backward(loss)
        if self.settings.modulate == "update":
            self.context.modulate(kappa, of="update")
        return self.figures(batch, out, loss, terms, alone=alone, kappa=kappa)

    def modulated(self, batch: Batch, out: Outputs, parts: list[torch.Tensor], kappa: torch.Tensor) -> Term:
        """CE(f(all)), whose value does not know of kappa [M]; `parts` are M times phi_k [B, C]."""
        logits = full_precision(out.fused)
        for phi, factor in zip(parts, kappa, strict=True):
            logits = logits + (factor - 1) * (phi - phi.detach())
        fused = Outputs(out.pooled, out.features, out.unimodal, logits)
        return self.losses(batch, fused)["ce_fused"]

    def logits(self, out: Outputs) -> dict[Subset, torch.Tensor]:
        """f(S) of every set S but the empty one, each [B, C]; in eval mode (no dropout) but for f(all)."""
        count = len(out.features)
        sets = [frozenset(some) for size in range(1, count) for some in combinations(range(count), size)]
        with self.context.autocast():
            logits = logits_of_some(self.context.model, out.features, sets)
        return {frozenset(range(count)): full_precision(out.fused), **dict(zip(sets, logits, strict=True))}


def logit_shares(logits: Mapping[Subset, torch.Tensor], count: int) -> list[torch.Tensor]:
    """phi_k = sum over S without k of (f(S and k) - f(S)) / (M binom(M - 1, |S|)), f(none) = 0; M times [B, C]."""
    parts = [torch.zeros_like(next(iter(logits.values()))) for _ in range(count)]
    for some, value in logits.items():
        for k in range(count):
            if k in some:
                parts[k] = parts[k] + value / (count * comb(count - 1, len(some) - 1))
            else:
                parts[k] = parts[k] - value / (count * comb(count - 1, len(some)))
    return parts


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p[y], p floored at 1e-8: logits [B, C], labels [B] -> []."""
    true = logits.softmax(dim=1).gather(1, labels[:, None])
    return -true.clamp(min=1e-8).log().mean()


def coefficients(alone: torch.Tensor, history: torch.Tensor, *, alpha: float, cap: float) -> torch.Tensor:
    """kappa [M] from l_k and its mean over the steps before, [M]; ones for a single modality."""
    if len(alone) == 1:
        return torch.ones_like(alone)
    scale = len(alone) / (len(alone) - 1)
    now, before = (torch.exp(scale * (x.mean() - x)) for x in (alone, history))
    return torch.exp(alpha * (before - now).clamp(max=cap))
