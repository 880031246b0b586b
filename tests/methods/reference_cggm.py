"""CGGM from its formulas, with branches and numbers that it keeps itself."""

from __future__ import annotations

import math

import torch
from plain import Plain


def balances(gained, bounded):
    if len(gained) == 1:
        return [1.0]
    whole = sum(gained) + 1e-8
    found = [(whole - one) / whole for one in gained]
    return [min(max(one, 0.0), float(len(gained))) for one in found] if bounded else found


class CGGMReference(Plain):
    score, before = None, None

    def loss(self, s):
        o, terms, count = self.settings, self.erm(s), len(self.names)
        last = "weight" if self.linear else "3.weight"
        value = terms["ce_fused"][0] * 0
        if self.before is not None:
            w_f = self.values["student.fused_head.3.weight"]
            for k, name in enumerate(self.names):
                w_k = self.values[f"student.heads.{name}.{last}"].detach()
                cos = (w_k * w_f).sum() / torch.sqrt((w_k**2).sum()) / torch.sqrt((w_f**2).sum())
                value = value + (abs(self.before[k]) - self.before[k] * cos) / count
        terms["direction"] = (value, o.direction)
        now = []
        for logits in s.unimodal:
            p = self.probabilities(logits.detach())
            rows = list(zip(p, s.labels, strict=True))
            if o.score == "accuracy":
                now.append(sum(int(row.argmax()) == int(y) for row, y in rows) / len(rows))
            else:
                now.append(sum(math.log(float(row[int(y)])) for row, y in rows) / len(rows))
        if self.score is not None:
            now = [o.memory * a + (1 - o.memory) * b for a, b in zip(self.score, now, strict=True)]
        self.before = balances([b - a for a, b in zip(self.score or [0.0] * count, now, strict=True)], o.bounded)
        self.score = now
        for name, kept in (("score", now), ("balance", self.before)):
            self.buffers[f"method.{name}"] = torch.tensor(kept, dtype=torch.float64)
        return terms

    def changed(self, gradients, s):
        if not self.settings.magnitude:
            return gradients
        return self.modulated(gradients, [self.settings.rho * one for one in self.before])
