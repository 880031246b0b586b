"""MIRO: mutual information regularisation with an oracle (Cha, Lee, Park, Chun, ECCV 2022, arXiv 2203.10789).

Letters: B clips (of this process), M modalities, D_k features of modality k.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Method, Outputs, ParameterGroup, Term
from mbcd_cli.methods.parts import full_precision
from mbcd_cli.settings import AROUND, MethodSettings, NonNegative, Positive

FLOOR = 1e-5
"""Least variance."""


class MIROSettings(MethodSettings):
    """MIRO."""

    weight: Annotated[NonNegative, AROUND] = 0.1
    """lambda, weight of the regularisation."""
    variance: Positive = 0.1
    """Variance of every feature at first."""
    speed: Positive = 10.0
    """How much quicker the variances train: with Adam, times the learning rate."""


class MIRO(Method):
    """CE(fused) + lambda sum_k E mean_c 1/2 [ log v_kc + (z_kc - z0_kc)^2 / v_kc ].

    z_k are the pooled features before the norm, z0_k those of the tail as it was before training (the oracle), frozen
    and in eval mode. The mean encoder is the identity, the variance encoder a trained number per feature:
    v = softplus(b) + 1e-5. The oracle is as good as the encoder's pretrained weights.
    """

    Settings = MIROSettings
    settings: MIROSettings
    ticker = ("ce_fused", "information")

    def __init__(self, settings: MIROSettings, context: Context) -> None:
        super().__init__(settings, context)
        model = context.model
        self.oracle = copy.deepcopy(model.tails).requires_grad_(False).eval()
        first = math.log(math.expm1(max(settings.variance - FLOOR, FLOOR))) / settings.speed
        self.raw = nn.ParameterDict({name: nn.Parameter(torch.full((d,), first)) for name, d in model.dims.items()})

    @property
    def least_batch(self) -> int:
        """One clip: the oracle's batch norms are in eval mode."""
        return 1

    def train(self, mode: bool = True) -> MIRO:
        """Train or eval mode of all but the oracle."""
        super().train(mode)
        self.oracle.eval()
        return self

    def parameter_groups(self) -> list[ParameterGroup]:
        """Decay would pull the variances to softplus(0)."""
        return [ParameterGroup(list(self.raw.values()), weight_decay=0.0)]

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms and `information` [M]."""
        with torch.no_grad(), self.context.autocast():
            first = {name: self.oracle[name](parts) for name, parts in batch.inputs.items()}
        each = [
            divergence(z, first[name], F.softplus(self.settings.speed * self.raw[name]) + FLOOR)
            for name, z in out.pooled.items()
        ]
        return super().losses(batch, out) | {"information": Term(torch.stack(each), self.settings.weight)}


def divergence(z: torch.Tensor, oracle: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """E mean_c 1/2 [ log v_c + (z_c - z0_c)^2 / v_c ], []: z and z0 [B, D], v [D]."""
    apart = (full_precision(z) - full_precision(oracle)).square()
    return (variance.log() + apart / variance).mean() / 2
