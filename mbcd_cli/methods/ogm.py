"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement (Peng et al., CVPR 2022, arXiv 2203.15332).

Letters: M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.methods import modality_dropout as amd
from mbcd_cli.methods.base import Context, Figures, Method, Outputs, total
from mbcd_cli.methods.own_settings import OGMGESettings
from mbcd_cli.methods.parts import modulation


class OGMGE(Method):
    """ERM whose encoders' gradients become kappa_k g + N(0, std(g) + 1e-8), kappa_k < 1 for the dominant modalities.

    rho_k = mean_{j != k} s_k / s_j with s_k the summed probability of the true class; kappa_k = 1 - tanh(alpha rho_k)
    where rho_k > 1, else 1. Two modalities with one linear fused layer give the authors' s_k from W_k h_k + b / 2; here
    the fused head is no sum over modalities, and s_k comes from the uni-modal heads, which probe. Changed are the
    weights of convolutions over space, as in the authors' code; in an encoder without any, all its matrices.
    """

    Settings = OGMGESettings
    settings: OGMGESettings
    ticker = ("ce_fused", "kappa")
    neutral: ClassVar[Mapping[str, object]] = {"alpha": 0.0, "noise": False}

    def __init__(self, settings: OGMGESettings, context: Context) -> None:
        super().__init__(settings, context)
        self._modulated = [modulated(context.model.tails[name]) for name in context.model.modalities]

    def gradients(self, batch: Batch) -> Figures:
        """ERM's gradients, modulated."""
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        loss = total(terms)
        loss.backward()
        rho = self.ratios(batch, out)
        return self.figures(batch, out, loss, terms, rho=rho, kappa=self.modulate(rho))

    def ratios(self, batch: Batch, out: Outputs) -> torch.Tensor:
        """rho_k of the global batch, [M]."""
        scores = amd.scores(list(out.unimodal.values()), batch.labels, score="true_class")
        return amd.ratios(self.context.group.sum_(scores))

    @torch.no_grad()
    def modulate(self, rho: torch.Tensor) -> torch.Tensor:
        """Change the encoders' gradients in place, after they are those of the global batch; kappa [M]."""
        settings, epoch = self.settings, self.context.epoch
        active = (epoch >= settings.start) & (epoch < settings.stop)
        kappa = torch.where(active, modulation(rho, settings.alpha), 1.0)
        self.context.group.average_([p.grad for weights in self._modulated for p in weights if p.grad is not None])
        for factor, weights in zip(kappa, self._modulated, strict=True):
            for gradient in (p.grad for p in weights if p.grad is not None):
                deviation = active * (gradient.std() + 1e-8)
                gradient.mul_(factor)
                if settings.noise:
                    noise = self.context.randomness.normal(*gradient.shape, dtype=gradient.dtype)
                    gradient.add_(noise * deviation)
        return kappa


def modulated(tail: nn.Module) -> list[nn.Parameter]:
    """Weights of a tail whose gradients are changed: of its 2-D and 3-D convolutions, else all its matrices."""
    trained = [p for p in tail.parameters() if p.requires_grad and p.numel() > 1]
    return [p for p in trained if p.dim() >= 4] or [p for p in trained if p.dim() >= 2]
