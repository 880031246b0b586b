"""Conflicts of modalities that the sources do not have, made of their clips (ours).

Letters: B clips (of this process), M modalities, C classes, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch

from mbcd_cli.methods.base import Context, Term
from mbcd_cli.methods.parts import distillation, full_precision
from mbcd_cli.settings import AROUND, NonNegative, Slice


class ConflictSettings(Slice):
    """Modalities that disagree, for the fused head alone (ours)."""

    weight: Annotated[NonNegative, AROUND] = 0.0
    """Weight of the fused head's divergence from the product of the heads, on modalities of unlike clips."""


def conflict(
    context: Context, features: Mapping[str, torch.Tensor], unimodal: Mapping[str, torch.Tensor], weight: float
) -> Term:
    """KL(product || p_mm), [], on clips whose modalities are each of another clip of the global batch.

    The product is softmax_c(sum_k log p_k), what heads of classes alike in number say that know nothing of one another:
    a head that is sure overrules one that is not. Only the fused head learns from it.

    Args:
        features: normalised, [B, D_k]; unimodal: logits of the heads, [B, C].
    """
    group, clips = context.group, len(next(iter(features.values()))) * context.group.world
    strange: dict[str, torch.Tensor] = {}
    said = torch.zeros_like(full_precision(next(iter(unimodal.values()))))
    for k, name in enumerate(features):
        h, logits = features[name].detach(), full_precision(unimodal[name]).detach()
        if k:  # of the first modality each clip's own
            other = group.own(context.randomness.uniform(clips).argsort())
            h, logits = group.gather(h)[other], group.gather(logits)[other]
        strange[name], said = h, said + logits.log_softmax(dim=1)
    with context.autocast():
        fused = context.model.fuse(strange)
    return Term(distillation(said.softmax(dim=1), fused), weight)
