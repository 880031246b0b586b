"""MMPareto: Pareto integration of multi-modal and uni-modal gradients (Wei, Hu, ICML 2024, arXiv 2405.17730).

Letters: M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods import gradient_consistency as gcc
from mbcd_cli.methods.base import Figures, Method, total
from mbcd_cli.methods.parts import ModulatedSettings
from mbcd_cli.settings import Positive, Range

FLOOR = 1e-12
"""Least squared norm, and norm, that is divided by."""


class MMParetoSettings(ModulatedSettings):
    """MMPareto."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders, or only probe detached features, to be reported."""
    gamma: Annotated[Positive, Range(1, 3)] = 1.5
    """What every encoder's gradient (or update) is multiplied with at last."""


class MMPareto(Method):
    """Every encoder takes gamma s h, h = 2 a m + 2 (1 - a) u, with m = grad CE(fused) and u = grad CE_k.

    a = 1/2 where m and u agree; where m . u < 0 it gives the shortest h, a = u . (u - m) / ||m - u||^2. s, of each
    tensor, makes h as long as m + u where it is shorter. Heads take the plain sum.
    """

    Settings = MMParetoSettings
    settings: MMParetoSettings
    ticker = ("ce_fused", "share")
    neutral: ClassVar[dict[str, object]] = {"unimodal": "probe", "gamma": 1.0}

    def gradients(self, batch: Batch) -> Figures:
        """Two backward passes: the fused loss's, and one of all uni-modal losses, each with an encoder of its own."""
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        context, encoders = self.context, self.context.model.theta()
        theta, heads = gcc.in_order(encoders), list(context.model.heads.parameters())
        gradients = context.gradients(terms["ce"].value.sum(), [*theta, *heads], retain_graph=True)
        u, own = gradients[: len(theta)], gradients[len(theta) :]
        fused = terms["ce_fused"].value
        context.backward(fused)
        for head, gradient in zip(heads, own, strict=True):
            context.set_gradient(head, gradient)
        m = [context.gradient(p) for p in theta]
        context.group.average_([*m, *u])
        of_m, of_u, shares = iter(m), iter(u), []
        for weights in encoders.values():
            tensors = list(weights.values())
            multi, single = [next(of_m) for _ in tensors], [next(of_u) for _ in tensors]
            # An encoder that is cut after its last weight has none to share.
            share = pareto_share(multi, single) if tensors else torch.full_like(fused.detach(), 0.5)
            shares.append(share)
            for parameter, change in zip(tensors, pareto_step(multi, single, share), strict=True):
                context.set_gradient(parameter, change)
        share = torch.stack(shares)
        context.modulate(torch.ones_like(share) * self.settings.gamma, of=self.settings.modulate)
        return self.figures(batch, out, total(terms).detach(), terms, share=share)


def pareto_share(m: Sequence[torch.Tensor], u: Sequence[torch.Tensor]) -> torch.Tensor:
    """a, [], of one encoder's gradients m and u by parameter, taken as one vector each."""
    dot = sum((x * y).sum() for x, y in zip(m, u, strict=True))
    to_m = sum((y * (y - x)).sum() for x, y in zip(m, u, strict=True))
    apart = sum((x - y).square().sum() for x, y in zip(m, u, strict=True))
    return torch.where(dot < 0, to_m / apart.clamp(min=FLOOR), 0.5)


def pareto_step(m: Sequence[torch.Tensor], u: Sequence[torch.Tensor], share: torch.Tensor) -> list[torch.Tensor]:
    """h max(1, ||m + u|| / ||h||) of every tensor, in the shapes of m and u; `share` is a, []."""
    changes = []
    for x, y in zip(m, u, strict=True):
        h = 2 * share * x + 2 * (1 - share) * y
        longer = ((x + y).norm() / h.norm().clamp(min=FLOOR)).clamp(min=1)
        changes.append(longer * h)
    return changes
