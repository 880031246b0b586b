"""NEL: non-polarised embedding learning (Neurocomputing 658, 2025, 131754), as the public benchmark has it.

Letters: B clips (of this process), N = 2 B W rows of two views of the clips of all W processes, M modalities,
D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.layers import product
from mbcd_cli.methods.base import Context, Method, Outputs, Term
from mbcd_cli.methods.parts import (
    cross_entropy,
    full_precision,
    shared_projections,
    shared_rows,
    supervised_contrast,
    unit_rows,
)
from mbcd_cli.settings import Count, Fraction, MethodSettings, NonNegative, Positive, Range

LEAST = 1e-6
"""Eigenvalues up to this one are none."""


class NELSettings(MethodSettings):
    """NEL."""

    scale: Positive = 0.5
    """What the whole objective is multiplied with."""
    agreement: Annotated[Fraction, Range(0, 1, benchmark=1)] = 0.7
    """alpha, weight of the contrast of two views' mean-shifted projections."""
    contrast: NonNegative | None = None
    """Weight of the supervised contrast of the projections; default: 1 - alpha."""
    flatness: Annotated[NonNegative, Range(0, 1, benchmark=4)] = 0.0625
    """beta, weight of the spectrum's negative entropy."""
    neighbours: Annotated[Count, Range(choices=(4, 8, 12, 16), benchmark=0)] = 8
    """K, nearest rows that a mean shift takes in; all others, where there are fewer."""
    agreement_temperature: Annotated[Positive, Range(0.1, 1, benchmark=1)] = 0.25
    """Temperature of the contrast of two views."""
    temperature: Annotated[Positive, Range(0.1, 1, benchmark=1)] = 0.1
    """Temperature of the supervised contrast."""
    hidden: Count = 2048
    """Width of the projections."""


class NEL(Method):
    """1/2 [CE(fused) + alpha L_UNC + (1 - alpha) supcon({z_k}) + beta L_NEE] over two views of every clip.

    z_k = hat(P_k(shared half of h_k)). A row's mean shift m_k is hat(z_k / 2 + mean of its K nearest rows / 2); q is
    hat(m_1 (+) ... (+) m_M). L_UNC is the cross-entropy of the first view's q against the second views' of all clips,
    the own one being right. L_NEE = sum_i p_i log p_i, p the spectrum of E^T E / N as shares, E = h_1 (+) ... (+) h_M.
    """

    Settings = NELSettings
    settings: NELSettings
    views = 2
    capturable = False  # the eigenvalue solver looks at its own success on the host
    ticker = ("ce_fused", "agreement")
    neutral: ClassVar[Mapping[str, object]] = {"scale": 1.0, "agreement": 0.0, "contrast": 0.0, "flatness": 0.0}

    def __init__(self, settings: NELSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.projections = shared_projections(context.model.dims, hidden=settings.hidden, method=settings.name)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, `agreement` (L_UNC), `contrast` and `flatness` (L_NEE); the heads that probe are not scaled."""
        settings, terms, group = self.settings, super().losses(batch, out), self.context.group
        with self.context.autocast():
            rows = shared_rows(self.projections, out.features)
        contrast = supervised_contrast(rows, batch.labels, temperature=settings.temperature, group=group)
        shifted = [mean_shift(group.gather(z), settings.neighbours) for z in rows]
        fused = group.gather(full_precision(torch.cat(list(out.features.values()), dim=1)))
        scale, weight = settings.scale, 1 - settings.agreement if settings.contrast is None else settings.contrast
        return terms | {
            "ce_fused": Term(terms["ce_fused"].value, scale),
            "agreement": Term(view_agreement(shifted, settings.agreement_temperature), scale * settings.agreement),
            "contrast": Term(contrast, scale * weight),
            "flatness": Term(spectral_negative_entropy(fused), scale * settings.flatness),
        }


def mean_shift(rows: torch.Tensor, neighbours: int) -> torch.Tensor:
    """m_i = hat(z_i / 2 + mean of the K nearest other rows by cosine / 2), [N, D] -> [N, D].

    Neighbours carry gradient, their choice does not.

    Args:
        rows: unit rows z, N of at least 2.
        neighbours: K, at most N - 1 are taken.
    """
    count = min(neighbours, len(rows) - 1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    likeness = product(rows.detach(), rows.detach().T).masked_fill(itself, -2.0)  # under any cosine
    nearest = torch.zeros_like(likeness).scatter(1, likeness.topk(count, dim=1).indices, 1 / count)
    return unit_rows(0.5 * rows + 0.5 * product(nearest, rows))


def view_agreement(shifted: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """L_UNC of M times mean-shifted rows [N, D], two views of each clip after one another, []."""
    q = unit_rows(torch.cat(list(shifted), dim=1))
    logits = product(q[0::2], q[1::2].T) / temperature
    return cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def spectral_negative_entropy(rows: torch.Tensor) -> torch.Tensor:
    """L_NEE of E [N, D]: sum_i p_i log(p_i + 1e-10), p the shares of the eigenvalues of E^T E / N over 1e-6, [].

    They are those of the N x N matrix E E^T / N, which is the smaller one.
    """
    # What is not finite shows in the other terms; the solver would raise.
    gram = torch.nan_to_num(product(rows, rows.T) / len(rows), nan=0.0, posinf=0.0, neginf=0.0)
    spectrum = torch.linalg.eigvalsh(gram)
    kept = torch.where(spectrum > LEAST, spectrum, 0.0)
    shares = kept / kept.sum().clamp(min=LEAST)
    return (shares * (shares + 1e-10).log()).sum()
