"""OPM: on-the-fly prediction modulation (Wei, Hu, Du, Wen, T-PAMI 2024, arXiv 2410.11582).

Letters: B clips (of this process), M modalities, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from mbcd_cli.data.records import Batch
from mbcd_cli.methods import modality_dropout as amd
from mbcd_cli.methods.base import Figures, Method, Outputs, total
from mbcd_cli.settings import Fraction, MethodSettings, NonNegative, Range


class OPMSettings(MethodSettings):
    """OPM."""

    rate: Annotated[Fraction, Range(0.1, 0.9)] = 0.5
    """q_0, the drop rate of a modality that barely dominates."""
    strength: Annotated[NonNegative, Range(0.1, 1)] = 0.5
    """lambda, by how much the rate grows with dominance."""
    probability: Fraction = 0.7
    """Probability that a batch is modulated."""
    start: Annotated[int, Field(ge=0)] = 6
    """Epochs before the modulation begins."""


class OPM(Method):
    """ERM whose fused head loses the dominant modalities of some clips.

    With rho_k = mean_{j != k} s_k / s_j and s_k the summed probability of the true class, h_k is zeroed per clip with
    probability q_k = clip(q_0 (1 + lambda tanh(rho_k - 1)), 0, 1) where rho_k > 1, else 0; what survives is divided by
    1 - theta, theta = sum_k D_k q_k / sum_k D_k. The authors' code takes clips that lost all modalities out of the
    batch; there are none, since the modality of the smallest s_k has rho_k <= 1. s_k comes from W_k h_k + b / M
    where the fused head is linear, as the authors'; an MLP has no part for each modality, and the heads probe.
    """

    Settings = OPMSettings
    settings: OPMSettings
    ticker = ("ce_fused", "q")
    neutral: ClassVar[Mapping[str, object]] = {"probability": 0.0}

    def gradients(self, batch: Batch) -> Figures:
        """The gradient of ERM with modalities dropped."""
        batch, model = self.at_cut(batch), self.context.model
        with self.context.autocast():
            pooled = model.pooled(batch.inputs)
            features = model.normalised(pooled)
            unimodal = model.unimodal(self.seen_by_heads(features))
            rho, q, keep = self.drop(self.told_alone(features, unimodal), batch.labels)
            theta = theta_of(q, list(model.dims.values()))
            out = Outputs(pooled, features, unimodal, model.fuse(features, keep / (1 - theta)))
        terms = self.losses(batch, out)
        loss = total(terms)
        self.context.backward(loss)
        return self.figures(batch, out, loss, terms, rho=rho, q=q)

    @torch.no_grad()
    def drop(
        self, alone: Sequence[torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """rho [M] and q [M] of the global batch (0 where it is not modulated), and the mask [B, M] of 0 and 1."""
        group, randomness, settings = self.context.group, self.context.randomness, self.settings
        rho = amd.ratios(group.sum_(amd.scores(alone, labels, score="true_class")))
        active = (randomness.uniform(1) < settings.probability) & (self.context.epoch >= settings.start)
        q = active * drop_rates(rho, rate=settings.rate, strength=settings.strength)
        return rho, q, group.own(amd.keep_mask(q, len(labels) * group.world, randomness))


def drop_rates(rho: torch.Tensor, *, rate: float, strength: float) -> torch.Tensor:
    """q_k [M] from rho_k [M]."""
    return torch.where(rho > 1, (rate * (1 + strength * torch.tanh(rho - 1))).clamp(0, 1), 0.0)


def theta_of(q: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """theta, the share of all features that is dropped on average, []: q [M], M numbers of features."""
    return sum(d * rate for d, rate in zip(dims, q.unbind(), strict=True)) / sum(dims)
