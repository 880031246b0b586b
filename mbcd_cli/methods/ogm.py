"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement (Peng et al., CVPR 2022, arXiv 2203.15332).

Letters: M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.methods import modality_dropout as amd
from mbcd_cli.methods.base import Context, Figures, Method, Outputs, total
from mbcd_cli.methods.parts import ModulatedSettings, modulation
from mbcd_cli.settings import NonNegative, Range

Epochs = Annotated[int, Field(ge=0)]


class OGMGESettings(ModulatedSettings):
    """OGM-GE."""

    alpha: Annotated[NonNegative, Range(0.1, 1)] = 0.8
    """Strength of the modulation: kappa = 1 - tanh(alpha rho)."""
    noise: bool = True
    """Add Gaussian noise to the modulated gradients (GE); without it the method is OGM."""
    start: Epochs = 0
    """Epochs before the modulation begins (the authors' later code: 6)."""
    stop: Epochs = 51
    """Epochs after which it has ended."""


class OGMGE(Method):
    """ERM whose encoders' gradients become kappa_k g + N(0, std(g) + 1e-8), kappa_k < 1 for the dominant modalities.

    modulate = "update": the gradients are g + N(0, std(g) + 1e-8), and what the optimizer makes of them times kappa_k.

    rho_k = mean_{j != k} s_k / s_j with s_k the summed probability of the true class; kappa_k = 1 - tanh(alpha rho_k)
    where rho_k > 1, else 1. A linear fused head gives the authors' s_k, from W_k h_k + b / M; an MLP is no sum over
    modalities, and s_k comes from the uni-modal heads, which probe. Changed are the weights of convolutions over space,
    as in the authors' code; in an encoder without any, all its matrices.
    """

    Settings = OGMGESettings
    settings: OGMGESettings
    ticker = ("ce_fused", "kappa")
    neutral: ClassVar[Mapping[str, object]] = {"alpha": 0.0, "noise": False}

    def __init__(self, settings: OGMGESettings, context: Context) -> None:
        super().__init__(settings, context)
        model = context.model
        self._modulated = {name: modulated(model.tails[name]) for name in model.modalities}

    def gradients(self, batch: Batch) -> Figures:
        """ERM's gradients, modulated."""
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        loss = total(terms)
        self.context.backward(loss)
        rho = self.ratios(batch, out)
        return self.figures(batch, out, loss, terms, rho=rho, kappa=self.modulate(rho))

    def ratios(self, batch: Batch, out: Outputs) -> torch.Tensor:
        """rho_k of the global batch, [M]."""
        scores = amd.scores(self.told_alone(out.features, out.unimodal), batch.labels, score="true_class")
        return amd.ratios(self.context.group.sum_(scores))

    @torch.no_grad()
    def modulate(self, rho: torch.Tensor) -> torch.Tensor:
        """Change what the encoders take, after their gradients are those of the global batch; kappa [M]."""
        settings, context = self.settings, self.context
        active = (context.epoch >= settings.start) & (context.epoch < settings.stop)
        kappa = torch.where(active, modulation(rho, settings.alpha), 1.0)
        weights = self._weights() if settings.noise else []
        gradients = [context.gradient(parameter) for parameter in weights]
        context.group.average_(gradients)
        deviations = [active * (_deviation(gradient) + 1e-8) for gradient in gradients]
        context.modulate(kappa, of=settings.modulate, only=self._modulated)
        for parameter, deviation in zip(weights, deviations, strict=True):
            noise = context.randomness.normal(*parameter.shape, dtype=parameter.dtype)
            context.set_gradient(parameter, context.gradient(parameter) + noise * deviation)
        return kappa

    def _weights(self) -> list[torch.Tensor]:
        theta = self.context.model.theta()
        return [theta[modality][name] for modality, names in self._modulated.items() for name in names]


def _deviation(gradient: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of all values, []; torch's own rounds otherwise below vmap."""
    return ((gradient - gradient.mean()).square().sum() / (gradient.numel() - 1)).sqrt()


def modulated(tail: nn.Module) -> list[str]:
    """Weights of a tail whose gradients are changed: of its 2-D and 3-D convolutions, else all its matrices."""
    trained = [(name, p) for name, p in tail.named_parameters() if p.requires_grad and p.numel() > 1]
    return [name for name, p in trained if p.dim() >= 4] or [name for name, p in trained if p.dim() >= 2]
