"""What several methods are made of.

Letters: B clips, C classes.
"""

from __future__ import annotations

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


def modulation(ratio: torch.Tensor, alpha: float) -> torch.Tensor:
    """1 - tanh(alpha ratio) where the ratio is over 1, else 1; any shape. Not continuous at 1 (OGM-GE, GMP)."""
    return torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1.0)
