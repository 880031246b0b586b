"""What CORAL and MMD share: a distance between source domains, of fused features and of each modality's.

Letters: B clips of the global batch, M modalities, S source domains, D features.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Method, Outputs, Term
from mbcd_cli.methods.parts import full_precision, need_domains
from mbcd_cli.settings import AROUND, MethodSettings, NonNegative


class AlignmentSettings(MethodSettings):
    """A distance between source domains."""

    weight: Annotated[NonNegative, AROUND] = 1.0
    """Weight of the distance between the source domains."""
    on: Literal["fused", "unimodal", "both"] = "both"
    """Features that are aligned: those that the fused head reads together, each modality's, or both."""


class Alignment(Method):
    """CE(fused) + weight [ d(h_1 (+) ... (+) h_M) + mean_k d(h_k) ], d a mean over pairs of source domains.

    h_k is what the heads read, (+) joins columns. The domains are those of the global batch, as a mask: a pair that
    lacks clips in a batch counts nothing. One source domain has no pair, and is refused.
    """

    Settings = AlignmentSettings
    settings: AlignmentSettings

    def __init__(self, settings: AlignmentSettings, context: Context) -> None:
        super().__init__(settings, context)
        need_domains(settings.name, len(context.sources))

    def distance(self, h: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """d, []: features h [B, D], member [B, S] of 0 and 1."""
        raise NotImplementedError

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, `distance_fused` [] and `distance` [M]."""
        settings, context = self.settings, self.context
        domains = context.group.gather(context.source_domains(batch))
        member = F.one_hot(domains, len(context.sources))
        rows = [full_precision(context.group.gather(h)) for h in out.features.values()]
        terms = super().losses(batch, out)
        if settings.on != "unimodal":
            terms["distance_fused"] = Term(self.distance(torch.cat(rows, dim=1), member), settings.weight)
        if settings.on != "fused":
            each = torch.stack([self.distance(h, member) for h in rows])
            terms["distance"] = Term(each, settings.weight / len(rows))
        return terms


def mean_over_pairs(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Mean of values [S, S] over the pairs i < j of domains that are both present [S], []; 0 without such a pair."""
    both = (present[:, None] & present[None, :]).triu(1)
    return torch.where(both, values, 0.0).sum() / both.sum().clamp(min=1)
