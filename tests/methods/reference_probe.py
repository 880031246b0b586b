"""The frozen probe from its formula: softmax regressions, whose gradients are in closed form."""

from __future__ import annotations

import torch
from plain import CLASSES, Plain


class ProbeReference(Plain):
    def __init__(self, training, settings):
        super().__init__(training, settings)
        named = training.step.model.tails.named_parameters(prefix="student.tails")
        self.still = {name: value.detach().clone() for name, value in named}
        self.teacher |= self.still

    def pooled(self, k, x, values=None):
        return super().pooled(k, x, self.still)

    def changed(self, gradients, s):
        """(p - y)^T h / B of every weight, the sum of (p - y) / B of its bias."""
        heads = [(f"heads.{n}", logits, h) for n, logits, h in zip(self.names, s.unimodal, s.h, strict=True)]
        found = {}
        for prefix, logits, h in [*heads, ("fused_head", s.fused, torch.cat(s.h, dim=1))]:
            error = (self.probabilities(logits).detach() - torch.eye(CLASSES)[s.labels]) / len(s.labels)
            found |= {f"student.{prefix}.weight": error.T @ h, f"student.{prefix}.bias": error.sum(dim=0)}
        assert gradients.keys() == found.keys()
        return found
