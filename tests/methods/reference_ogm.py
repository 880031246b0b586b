"""OGM-GE from its formulas."""

from __future__ import annotations

import math

import torch
from plain import Plain


class OGMReference(Plain):
    def changed(self, gradients, s):
        o, count = self.settings, len(self.names)
        score = [
            sum(float(self.probabilities(logits)[i, int(y)].detach()) for i, y in enumerate(s.labels))
            for logits in self.alone(s)
        ]
        rho = [sum(score[k] / score[j] for j in range(count) if j != k) / max(count - 1, 1) for k in range(count)]
        active = o.start <= self.epoch < o.stop
        changed, update = dict(gradients), o.modulate == "update"
        self.factors = {}
        for k, name in enumerate(self.names):
            kappa = 1 - math.tanh(o.alpha * rho[k]) if active and count > 1 and rho[k] > 1 else 1.0
            key = f"student.tails.{name}.layer.0.weight"
            g = gradients[key]
            if update:  # of the weight alone; the bias is changed like ERM's
                self.factors[key] = kappa
                kappa = 1.0
            changed[key] = kappa * g
            if o.noise:
                mean = g.sum() / g.numel()
                deviation = torch.sqrt(((g - mean) ** 2).sum() / (g.numel() - 1)) + 1e-8
                draw = s.draws.pop(0)
                changed[key] = changed[key] + (draw * deviation if active else 0)
        return changed
