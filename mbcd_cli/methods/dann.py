"""DANN: domain-adversarial training (Ganin et al., JMLR 2016, arXiv 1505.07818), between source domains.

Letters: B clips (of this process), M modalities, S source domains, D_k features of modality k.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.alignment import AlignmentSettings
from mbcd_cli.methods.base import Context, Method, Outputs, Term
from mbcd_cli.methods.parts import DomainAdversary, cross_entropy, full_precision, need_domains, reversed_gradient
from mbcd_cli.settings import AROUND, Count, NonNegative


class DANNSettings(AlignmentSettings):
    """DANN."""

    weight: NonNegative = 1.0
    """Weight of the domain losses, for the discriminators and, reversed, for the features."""
    reversal: Annotated[NonNegative, AROUND] = 1.0
    """lambda, what the domain gradient is multiplied with (and reversed) on its way into the features."""
    ramp: Annotated[int, Field(ge=0)] = 0
    """Steps in which lambda grows from 0 (the paper: the whole training); 0 has it from the first step."""
    hidden: Count = 512
    """Width of the discriminators."""


class DANN(Method):
    """CE(fused) + weight [ CE(D(R(h_1 (+) ... (+) h_M)), d) + mean_k CE(D'_k(R(h_k)), d) ].

    d is the source domain, R reverses the gradient times lambda (2 / (1 + exp(-10 p)) - 1), p = min(step / ramp, 1).
    The discriminators train, in the same optimizer. One source domain is refused.
    """

    Settings = DANNSettings
    settings: DANNSettings
    ticker = ("ce_fused", "domain_fused", "domain")

    def __init__(self, settings: DANNSettings, context: Context) -> None:
        super().__init__(settings, context)
        domains, dims = len(context.sources), context.model.dims
        need_domains(settings.name, domains)
        same = {"domains": domains, "hidden": settings.hidden, "strength": settings.reversal}
        self.fused = DomainAdversary({"fused": sum(dims.values())}, **same) if settings.on != "unimodal" else None
        self.unimodal = DomainAdversary(dims, **same) if settings.on != "fused" else None

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, `domain_fused` [] and `domain` [M]."""
        weight, domains = self.settings.weight, self.context.source_domains(batch)
        terms = super().losses(batch, out)
        grown = self.grown(full_precision(out.fused).dtype)
        # Reversed twice: the sign is the adversary's.
        features = {n: reversed_gradient(h, -grown) for n, h in out.features.items()}
        if self.fused is not None:
            with self.context.autocast():
                (judged,) = self.fused({"fused": torch.cat(list(features.values()), dim=1)})
            terms["domain_fused"] = Term(cross_entropy(judged, domains), weight)
        if self.unimodal is not None:
            with self.context.autocast():
                each = self.unimodal(features)
            loss = torch.stack([cross_entropy(logits, domains) for logits in each])
            terms["domain"] = Term(loss, weight / len(each))
        return terms

    def grown(self, dtype: torch.dtype) -> float | torch.Tensor:
        """The share of lambda that counts in this step, 0 to 1; [] on the device where it grows."""
        if not self.settings.ramp:
            return 1.0
        p = (self.context.step.to(dtype) / self.settings.ramp).clamp(max=1)
        return 2 / (1 + torch.exp(-10 * p)) - 1
