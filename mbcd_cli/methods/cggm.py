"""CGGM: classifier-guided gradient modulation (Guo et al., NeurIPS 2024).

Letters: B clips (of this process), M modalities, C classes, H features that the heads' last layers read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.base import Context, Figures, Method, Outputs, Term, total
from mbcd_cli.methods.parts import ModulatedSettings, cross_entropy, full_precision
from mbcd_cli.settings import AROUND, Fraction, NonNegative

FLOOR = 1e-8
"""Added to both sides of the ratio of improvements."""


class CGGMSettings(ModulatedSettings):
    """CGGM."""

    rho: Annotated[NonNegative, AROUND] = 1.3
    """What the balance B_k of every encoder is multiplied with."""
    direction: Annotated[NonNegative, AROUND] = 0.1
    """lambda, weight of the term that aligns the output layers (the authors': 0.05 to 0.2)."""
    magnitude: bool = True
    """Encoders take rho B_k times their gradient; without, only the output layers are aligned."""
    bounded: bool = True
    """B_k is held between 0 and M; the authors' code does not: it may be negative, or as large as 1e8."""
    score: Literal["accuracy", "likelihood"] = "accuracy"
    """What improves: a batch's accuracy (the paper), or its mean log-likelihood, which moves in smaller steps."""
    memory: Annotated[Fraction, AROUND] = 0.0
    """Share of a score that stays from the steps before (0: the paper's, of this batch alone)."""


class CGGM(Method):
    """CE(fused) + lambda L_gm, and what encoder k takes times rho B_k.

    B_k = (sum_j D_j - D_k) / sum_j D_j, D_k what the score of head k, which probes, has gained since the step before
    (0 at first). L_gm = (1 / M) sum_k [ |B_k| - B_k cos(w_k, w_fused) ] with B of the step before and the weights of
    the output layers of heads and fused head, as they are; its gradient goes to w_fused alone.
    """

    Settings = CGGMSettings
    settings: CGGMSettings
    ticker = ("ce_fused", "balance")
    neutral: ClassVar[Mapping[str, object]] = {"magnitude": False, "direction": 0.0}

    def __init__(self, settings: CGGMSettings, context: Context) -> None:
        super().__init__(settings, context)
        model = context.model
        if output_weight(model.fused_head).shape != output_weight(model.heads[model.modalities[0]]).shape:
            raise SettingsError(
                "Method cggm compares the output layers of uni-modal and fused heads, which differ in width.",
                "Set model.unimodal_head=mlp and model.fused_head=mlp.",
            )
        self.register_buffer("score", torch.zeros(len(model.modalities)))
        self.register_buffer("balance", torch.zeros(len(model.modalities)))

    def gradients(self, batch: Batch) -> Figures:
        """One pass."""
        context, settings = self.context, self.settings
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out) | {"direction": Term(self.misaligned(), settings.direction)}
        loss = total(terms)
        context.backward(loss)
        with torch.no_grad():
            (now,) = context.group.average([self.scores_of(batch, out)])
            now = torch.where(context.step > 1, settings.memory * self.score + (1 - settings.memory) * now, now)
            gained = now - self.score
            balance = balance_of(gained, bounded=settings.bounded)
            self.score.copy_(now)
            self.balance.copy_(balance)
        if settings.magnitude:
            context.modulate(settings.rho * balance, of=settings.modulate)
        return self.figures(batch, out, loss, terms, balance=balance)

    def misaligned(self) -> torch.Tensor:
        """L_gm, []; 0 in the first step."""
        model = self.context.model
        fused = output_weight(model.fused_head)
        own = [output_weight(model.heads[name]).detach() for name in model.modalities]
        return misalignment(fused, own, self.balance.clone())

    def scores_of(self, batch: Batch, out: Outputs) -> torch.Tensor:
        """e_k of this process' clips, [M]."""
        if self.settings.score == "likelihood":
            return -torch.stack([cross_entropy(logits, batch.labels) for logits in out.unimodal.values()])
        right = [full_precision(logits).argmax(dim=1) == batch.labels for logits in out.unimodal.values()]
        return torch.stack(right).to(self.score.dtype).mean(dim=1)


def output_weight(head: nn.Module) -> torch.Tensor:
    """The weight [C, H] of a head's last layer."""
    return head.weight if isinstance(head, nn.Linear) else head[-1].weight


def balance_of(gained: torch.Tensor, *, bounded: bool) -> torch.Tensor:
    """B [M] from what scores have gained, [M]; ones for a single modality, which has nothing to be balanced with."""
    if len(gained) == 1:
        return torch.ones_like(gained)
    whole = gained.sum() + FLOOR
    balance = (whole - gained) / whole
    return balance.clamp(min=0, max=len(gained)) if bounded else balance


def misalignment(fused: torch.Tensor, own: Sequence[torch.Tensor], balance: torch.Tensor) -> torch.Tensor:
    """L_gm, [], of the output layers' weights, [C, H] each, and B [M]."""
    cosines = torch.stack([(weight * fused).sum() / (weight.norm() * fused.norm()) for weight in own])
    return (balance.abs().sum() - (balance * cosines).sum()) / len(own)
