"""RNA-Net: relative norm alignment (Planamente et al., WACV 2022, arXiv 2110.10101).

Letters: B clips, M modalities, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Method, Outputs, Term
from mbcd_cli.methods.parts import full_precision, known_modalities
from mbcd_cli.settings import MethodSettings, Names, NonNegative, Range


class RNANetSettings(MethodSettings):
    """RNA-Net."""

    weight: Annotated[NonNegative, Range(0, 3, benchmark=1)] = 1.0
    """lambda, the weight of the norms' alignment."""
    priority: Names = ("video", "flow", "audio")
    """Modalities whose norm is the numerator of a ratio, first ones first; all others follow in fusion order."""


class RNANet(Method):
    """CE(fused) + lambda mean_{k<j} (n_k / n_j - 1)^2, n_k = E ||h_k||_2, nothing detached; 0 for M = 1.

    h_k is the feature before the norm: after a LayerNorm all norms are sqrt(D_k). The ratio is not symmetric in its two
    modalities; which one is on top is a convention (`priority`, the public port's).
    """

    Settings = RNANetSettings
    settings: RNANetSettings
    ticker = ("ce_fused", "alignment")
    symmetric = False  # (n_k / n_j - 1)^2 is not: the priority says which one is on top

    def __init__(self, settings: RNANetSettings, context: Context) -> None:
        super().__init__(settings, context)
        known_modalities("method.priority", settings.priority, context.model.dims)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms and `alignment`."""
        first = [name for name in self.settings.priority if name in out.pooled]
        order = [*first, *(name for name in out.pooled if name not in first)]
        norms = mean_norms({name: out.pooled[name] for name in order})
        alignment = norm_alignment(self.context.group.average(norms))
        return super().losses(batch, out) | {"alignment": Term(alignment, self.settings.weight)}


def mean_norms(pooled: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """n_k = E ||h_k||_2 of M features, each [B, D_k] -> M times []."""
    return [full_precision(h).norm(dim=1).mean() for h in pooled.values()]


def norm_alignment(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of (n_k / n_j - 1)^2 over the pairs k < j, []; 0 for a single modality."""
    pairs = [(top / bottom - 1).square() for top, bottom in combinations(norms, 2)]
    return torch.stack(pairs).mean() if pairs else norms[0] * 0
