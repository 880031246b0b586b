"""MER-DG: an entropy term on every encoder (Yarici, AlRegib, ICML 2026, arXiv 2605.01967).

Letters: B clips of the global batch, M modalities, D columns of a feature z.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import model_validator
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.layers import product
from mbcd_cli.methods.base import Context, Method, Outputs, Term
from mbcd_cli.methods.parts import full_precision, projection, supervised_contrast, unit_rows
from mbcd_cli.settings import AROUND, Count, MethodSettings, NonNegative, Positive

FLOOR = 1e-4
"""Added to variances, deviations and the diagonal of the spectral term."""


class MERDGSettings(MethodSettings):
    """MER-DG."""

    weight: NonNegative = 3.0
    """Weight of both entropy terms."""
    marginal: Annotated[NonNegative, AROUND] = 1.0
    """alpha_m, weight of the hinge on each column's deviation."""
    spectral: Annotated[NonNegative, AROUND] = 1.0
    """alpha_s, weight of the log-determinant of the correlations."""
    on: Literal["feature", "projection"] = "feature"
    """What the terms read: pooled features before the norm (the paper), or a projection of 128 numbers (its code)."""
    contrast: NonNegative = 0.0
    """alpha_c, weight of the supervised contrast of the projections."""
    hidden: Count = 2048
    """Width of the projections."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""

    @model_validator(mode="after")
    def _contrast_needs_projections(self):
        if self.contrast and self.on == "feature":
            raise ValueError("contrast compares projections: set on = projection")
        return self


class MERDG(Method):
    """CE(fused) + weight sum_k [ alpha_m marg(z_k) + alpha_s spec(z_k) ] + alpha_c supcon({hat(z_k)}).

    marg(z) = mean_c max(0, 1 - sqrt(var_c + 1e-4)), var_c the unbiased variance of a column over the batch;
    spec(z) = -(1 / D) log det(W^T W / (B - 1) + 1e-4 I), W the columns centred and divided by their biased deviation
    plus 1e-4. Nothing is detached. z_k is h_k before the norm, or P'_k(h_k), not normalised.
    """

    Settings = MERDGSettings
    settings: MERDGSettings
    ticker = ("ce_fused", "marginal", "spectral")

    def __init__(self, settings: MERDGSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._contrasts = settings.contrast > 0
        dims = context.model.dims if settings.on == "projection" else {}
        self.projections = nn.ModuleDict(
            {name: projection(dim, hidden=settings.hidden, norm=nn.LayerNorm) for name, dim in dims.items()}
        )

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, `marginal` [M], `spectral` [M], and `contrast` where it has a weight."""
        settings, group = self.settings, self.context.group
        z = list(out.pooled.values())
        if settings.on == "projection":
            with self.context.autocast():
                z = [self.projections[name](h) for name, h in out.features.items()]
        rows = [exact(group.gather(h)) for h in z]
        dtype = full_precision(out.fused).dtype
        terms = super().losses(batch, out) | {
            "marginal": Term(torch.stack([marginal(r) for r in rows]).to(dtype), settings.weight * settings.marginal),
            "spectral": Term(torch.stack([spectral(r) for r in rows]).to(dtype), settings.weight * settings.spectral),
        }
        if self._contrasts:
            contrast = supervised_contrast(
                [unit_rows(h) for h in z], batch.labels, temperature=settings.temperature, group=group
            )
            terms["contrast"] = Term(contrast, settings.contrast)
        return terms


def exact(x: torch.Tensor) -> torch.Tensor:
    """`x`, [*], in float64 where the device has it: eigenvalues of the spectral term span 1e-4 to D."""
    return full_precision(x) if x.device.type == "mps" else x.double()


def marginal(z: torch.Tensor) -> torch.Tensor:
    """mean_c max(0, 1 - sqrt(var_c + 1e-4)), []: z [B, D]; 0 for a single clip."""
    if len(z) < 2:
        return z.sum() * 0
    return (1 - (z.var(dim=0) + FLOOR).sqrt()).clamp(min=0).mean()


def spectral(z: torch.Tensor) -> torch.Tensor:
    """-(1 / D) log det(W^T W / (B - 1) + 1e-4 I), []: z [B, D]; 0 where B < 2 or D < 2.

    W^T W [D, D] and W W^T [B, B] share their eigenvalues but for zeros: the smaller one is factorised.
    """
    clips, width = z.shape
    if min(clips, width) < 2:
        return z.sum() * 0
    centred = z - z.mean(dim=0)
    # The root's own gradient at a constant column is infinite.
    variance = centred.square().mean(dim=0)
    deviation = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
    w = centred / (deviation + FLOOR)
    gram = (product(w, w.T) if clips < width else product(w.T, w)) / (clips - 1)
    factor, _ = torch.linalg.cholesky_ex(gram + FLOOR * torch.eye(len(gram), dtype=z.dtype, device=z.device))
    log_det = 2 * factor.diagonal().log().sum() + (width - len(gram)) * torch.log(torch.full_like(z[0, 0], FLOOR))
    return -log_det / width
