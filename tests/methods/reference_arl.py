"""ARL from its formulas: the encoders' outputs get their gradient times 1 + c_k where it enters them."""

from __future__ import annotations

import math

import torch
from plain import Plain


def shares(values):
    return [value / sum(values) for value in values]


def pushed(logits, probabilities, temperature):
    """d, q and c of M times logits [B, C]."""
    count, rows = len(logits), len(logits[0])
    d = shares([float(one.abs().sum()) / rows for one in logits])
    entropy = shares([-float((p * torch.log(p + 1e-16)).sum()) / rows for p in map(probabilities, logits)])
    q = shares([1 / max(e, 0.6 / count) for e in entropy])
    if count == 1:
        return d, q, [0.0]
    c = shares([math.exp(temperature * q[k] * (1 - d[k]) / (count - 1)) for k in range(count)])
    return d, q, c


class ARLReference(Plain):
    def loss(self, s):
        o, terms = self.settings, self.erm(s)
        alone = [self.fused([h if j == k else torch.zeros_like(h) for j, h in enumerate(s.h)]) for k in range(len(s.h))]
        active = self.epoch >= o.start
        terms["alone"] = (
            torch.stack([self.ce(logits, s.labels) for logits in alone]),
            o.gamma if active else o.first_gamma,
        )
        _, _, c = pushed([logits.detach() for logits in alone], self.probabilities, o.temperature)
        self.pace = [1 + one if active else 1.0 for one in c]
        return terms

    def changed(self, gradients, s):
        return self.modulated(gradients, self.pace)
