"""The named loss terms and their total (Eq. 8 and 9).

Letters: B clips, M modalities, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

TEACHER_FLOOR = 1e-12
"""Teacher probabilities are clamped from below here, as in the reference."""


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Half-precision tensors as float32 (losses and statistics need the range), others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the batch: logits [B, C], labels [B] -> []."""
    return F.cross_entropy(full_precision(logits), labels)


def teacher_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """p_EMA: softmax of the teacher's fused logits, clamped at 1e-12; [B, C] -> [B, C]."""
    return full_precision(logits).softmax(dim=1).clamp(min=TEACHER_FLOOR)


def distillation(teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(p_EMA || p) = sum_c p_EMA (log p_EMA - log p), averaged over the batch (Eq. 8); -> [].

    Args:
        teacher: p_EMA [B, C].
        logits: the student's logits [B, C] that give p.
    """
    return F.kl_div(full_precision(logits).log_softmax(dim=1), teacher, reduction="batchmean")


@dataclass(frozen=True, slots=True)
class Terms:
    """Loss terms of one batch, each with its graph until `detach`.

    Attributes:
        ce_fused: L_cls(theta', phi_mm), [].
        ce_unimodal: L_cls(theta_k, phi_k) per modality, [M].
        kl_fused: KL(p_EMA || p_mm), []; zero without distillation.
        kl_unimodal: KL(p_EMA || p_k) per modality, [M]; zeros without distillation.
        weight: lambda.
    """

    ce_fused: torch.Tensor
    ce_unimodal: torch.Tensor
    kl_fused: torch.Tensor
    kl_unimodal: torch.Tensor
    weight: float

    def total(self) -> torch.Tensor:
        """Eq. 9: ce_fused + sum_k ce_k + lambda (kl_fused + sum_k kl_k), []."""
        return self.ce_fused + self.ce_unimodal.sum() + self.weight * (self.kl_fused + self.kl_unimodal.sum())

    def detach(self) -> Terms:
        """The same numbers without their graph."""
        return Terms(
            ce_fused=self.ce_fused.detach(),
            ce_unimodal=self.ce_unimodal.detach(),
            kl_fused=self.kl_fused.detach(),
            kl_unimodal=self.kl_unimodal.detach(),
            weight=self.weight,
        )
