"""AGM from its formulas: the Shapley values as means over orders of arrival."""

from __future__ import annotations

import math
from itertools import permutations

import torch
from plain import Plain, Scaled


def shares(f, count):
    """phi_k as the mean, over all orders in which modalities join, of what k adds."""
    total = [0 for _ in range(count)]
    for order in permutations(range(count)):
        for place, k in enumerate(order):
            before = f(set(order[:place])) if place else 0
            total[k] = total[k] + f(set(order[: place + 1])) - before
    return [one / math.factorial(count) for one in total]


class AGMReference(Plain):
    def loss(self, s):
        o, count, terms = self.settings, len(self.names), self.erm(s)

        def f(some):
            return self.fused([h if k in some else torch.zeros_like(h) for k, h in enumerate(s.h)])

        parts, history = shares(f, count), self.buffers["method.history"]
        alone = []
        for phi in parts:
            p = self.probabilities(phi.detach())
            alone.append(sum(-math.log(max(float(p[i, int(y)]), 1e-8)) for i, y in enumerate(s.labels)) / len(p))
        kappa = [1.0] * count
        if count > 1:
            scale = count / (count - 1)
            ratio = [math.exp(scale * (sum(alone) / count - one)) for one in alone]
            past = [math.exp(scale * (float(history.mean()) - float(one))) for one in history]
            kappa = [math.exp(o.alpha * min(b - a, o.cap)) for a, b in zip(ratio, past, strict=True)]
        n = self.time
        self.buffers["method.history"] = history * (n - 1) / n + torch.tensor(alone, dtype=torch.float64) / n
        if o.modulate == "update":
            self.modulated({}, kappa)
            kappa = [1.0] * count
        logits = sum(Scaled.apply(phi, factor) for phi, factor in zip(parts, kappa, strict=True))
        return {"ce_fused": (self.ce(logits, s.labels), 1.0), "ce": terms["ce"]}
