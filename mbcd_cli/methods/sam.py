"""SAM: sharpness-aware minimisation (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv 2010.01412)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Figures, Method, total
from mbcd_cli.settings import AROUND, MethodSettings, NonNegative


class SAMSettings(MethodSettings):
    """SAM."""

    rho: Annotated[NonNegative, AROUND] = 0.05
    """Radius of the step up the slope, in weights."""


class SAM(Method):
    """The gradient of L at w + eps, eps = rho g / ||g||_2, g the gradient of L at w, applied at w.

    g and its norm are those of the global batch over all trained weights; heads that only probe are left where they
    are, since what they measure must not change what is deployed. Running statistics are those of the pass at w. The
    figures are those at w, too; `sharpness` is L(w + eps) - L(w).
    """

    Settings = SAMSettings
    settings: SAMSettings
    ticker = ("ce_fused", "sharpness")
    neutral: ClassVar[dict[str, object]] = {"rho": 0.0}

    def __init__(self, settings: SAMSettings, context: Context) -> None:
        super().__init__(settings, context)
        probing = settings.unimodal == "probe"
        named = context.model.named_parameters()
        self._moved = {n for n, p in named if p.requires_grad and not (probing and n.startswith("heads."))}

    def gradients(self, batch: Batch) -> Figures:
        """Two passes; after the second the weights are w again, bit for bit, and so are the running statistics."""
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        loss = total(terms)
        model = self.context.model
        weights = [p for n, p in model.named_parameters() if n in self._moved]
        slopes = self.context.gradients(loss, weights)
        self.context.group.average_(slopes)
        with torch.no_grad():
            norm = torch.stack([slope.norm() for slope in slopes]).norm()
            moved = [*weights, *model.buffers()]
            kept = [value.clone() for value in moved]
            for weight, slope in zip(weights, slopes, strict=True):
                # As torch divides a number by a tensor; a member's rho is a tensor.
                weight.add_(slope * ((norm + 1e-12).reciprocal() * self.settings.rho))
        up = total(self.losses(batch, self(batch)))
        self.context.backward(up)
        with torch.no_grad():
            for value, before in zip(moved, kept, strict=True):
                value.copy_(before)
        return self.figures(batch, out, loss, terms, sharpness=up.detach() - loss.detach())
